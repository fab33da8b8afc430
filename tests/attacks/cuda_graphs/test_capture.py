"""What recording asks of CUDA and leaves behind, on a CUDA that is made up.

It keeps the rules that matter: the end of a spoiled capture raises, leaves the stream current and
the pool open, and a second end of a pool is an error.
"""

import contextlib
import warnings
from types import SimpleNamespace

import pytest
import torch

from defend.attacks.cuda_graphs import capture as recording

DEVICE = torch.device("cuda", 0)


class Cuda:
    """Streams, captures and the allocator's pools."""

    def __init__(self):
        self.main = SimpleNamespace(name="main", device=DEVICE, wait_stream=lambda other: None)
        self.current, self.capturing, self.spoiled = self.main, None, False
        self.open, self.held, self.mode, self.taken = [], [], 0, 100
        self.captured_by = []

    def stream(self, stream):
        @contextlib.contextmanager
        def context():
            before, self.current = self.current, stream
            try:
                yield
            finally:
                self.current = before

        return context()

    def graph(self, graph, pool=None, stream=None, capture_error_mode="global"):
        assert capture_error_mode == "thread_local"
        cuda = self

        class Context:
            def __enter__(self):
                assert cuda.capturing is None
                self.before, cuda.current = cuda.current, stream
                graph.its_pool = pool or ("own", len(cuda.held))
                cuda.open.append(graph.its_pool)
                cuda.held.append(graph.its_pool)
                cuda.capturing = graph

            def __exit__(self, *error):
                cuda.capturing = None
                if cuda.spoiled:  # torch leaves the stream, and the pool, as they are
                    cuda.spoiled = False
                    raise RuntimeError("the capture was invalidated")
                cuda.open.remove(graph.its_pool)
                graph.ended = True
                cuda.captured_by.append(graph)
                cuda.current = self.before

        return Context()

    def end_pool(self, index, pool):
        if pool not in self.open:
            raise RuntimeError("not recording to this pool")
        self.open.remove(pool)

    def waits(self):
        if self.mode == 1:
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)

    def is_waiting_spoils(self):
        if self.capturing:
            self.spoiled = True
            raise RuntimeError("operation not permitted when stream is capturing")


class Graph:
    ended = was_reset = False

    def replay(self):
        pass

    def reset(self):
        self.was_reset = True

    def pool(self):
        if not self.ended:
            raise RuntimeError("without a preceding successful capture")
        return self.its_pool


@pytest.fixture
def cuda(monkeypatch):
    cuda = Cuda()

    def peak_bytes(run, device):
        run()
        return cuda.taken

    def set_mode(mode):
        cuda.mode = {"warn": 1}.get(mode, mode)

    side = SimpleNamespace(name="side", device=DEVICE, wait_stream=lambda other: None)
    made_up = {
        "device": lambda device: contextlib.nullcontext(),
        "Stream": lambda device: side,
        "current_stream": lambda device: cuda.current,
        "stream": cuda.stream,
        "graph": cuda.graph,
        "CUDAGraph": Graph,
        "graph_pool_handle": lambda: ("new", len(cuda.held)),
        "get_sync_debug_mode": lambda: cuda.mode,
        "set_sync_debug_mode": set_mode,
    }
    for name, value in made_up.items():
        monkeypatch.setattr(torch.cuda, name, value)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, device=None: zeros(*size))
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", cuda.end_pool, raising=False)
    monkeypatch.setattr(
        torch._C, "_cuda_releasePool", lambda i, pool: cuda.held.remove(pool), raising=False
    )
    monkeypatch.setattr(recording, "peak_bytes", peak_bytes)
    monkeypatch.setattr(recording, "free_bytes", lambda device: 1000)
    monkeypatch.setattr(recording, "_CAPTURE_STREAMS", {})
    monkeypatch.setattr(recording, "_FAILED_GRAPHS", [])
    return cuda


def assert_clean(cuda):
    assert cuda.current is cuda.main
    assert (cuda.open, cuda.capturing, cuda.mode) == ([], None, 0)
    assert torch.is_autocast_cache_enabled()


def test_warms_up_on_the_stream_that_captures_with_no_cache_of_casts(cuda):
    calls = []

    def work():
        assert not torch.is_autocast_cache_enabled()
        calls.append((cuda.current.name, cuda.capturing is not None))

    replay, pool = recording.record(work, DEVICE)
    assert calls == [("side", False)] * 3 + [("side", True)]
    assert cuda.captured_by[0].pool() == pool
    assert replay.__self__ is cuda.captured_by[0]
    assert_clean(cuda)


def test_shares_the_pool_that_it_is_given(cuda):
    _, pool = recording.record(lambda: None, DEVICE)
    assert recording.record(lambda: None, DEVICE, pool)[1] == pool
    assert cuda.held == [pool, pool]


def test_work_that_waits_is_refused_before_a_capture(cuda):
    with pytest.raises(RuntimeError, match=r"it waits for the device \(.*test_capture.py, line"):
        recording.record(cuda.waits, DEVICE)
    assert cuda.held == []
    assert_clean(cuda)


def test_warnings_of_other_kinds_are_no_reason(cuda):
    recording.record(lambda: warnings.warn("something else", stacklevel=1), DEVICE)
    assert_clean(cuda)


@pytest.mark.parametrize(("taken", "fits"), [(250, True), (251, False)])
def test_a_graph_keeps_a_quarter_of_the_free_memory_at_most(cuda, taken, fits):
    cuda.taken = taken
    refused = contextlib.nullcontext() if fits else pytest.raises(RuntimeError, match="would keep")
    with refused:
        recording.record(lambda: None, DEVICE)
    assert len(cuda.held) == fits
    assert_clean(cuda)


def test_a_spoiled_capture_leaves_nothing_behind(cuda):
    with pytest.raises(RuntimeError, match="invalidated"):
        recording.record(cuda.is_waiting_spoils, DEVICE)
    assert_clean(cuda)
    assert cuda.held == [("own", 0)]  # only that of the capture that sets the generator right
    assert [graph.was_reset for graph in recording._FAILED_GRAPHS] == [True]
    recording.record(lambda: None, DEVICE)
    assert_clean(cuda)


def test_a_spoiled_capture_does_not_touch_a_pool_that_others_use(cuda):
    _, pool = recording.record(lambda: None, DEVICE)
    with pytest.raises(RuntimeError, match="invalidated"):
        recording.record(cuda.is_waiting_spoils, DEVICE, pool)
    assert cuda.held.count(pool) == 1
    assert_clean(cuda)


def test_an_error_in_a_capture_that_ends_well_is_passed_on(cuda):
    def full():
        if cuda.capturing:
            raise torch.OutOfMemoryError("in the capture")

    with pytest.raises(torch.OutOfMemoryError, match="in the capture"):
        recording.record(full, DEVICE)
    assert len(cuda.held) == 1  # the graph's own to give back, as it ended
    assert recording._FAILED_GRAPHS == []
    assert_clean(cuda)


def test_memory_that_runs_out_in_the_warm_up_is_passed_on(cuda):
    def full():
        raise torch.OutOfMemoryError("in the warm-up")

    with pytest.raises(torch.OutOfMemoryError, match="in the warm-up"):
        recording.record(full, DEVICE)
    assert cuda.held == []
    assert_clean(cuda)


def test_random_numbers_are_kept():
    before = torch.get_rng_state()
    with recording.keep_random_numbers(torch.device("cpu")):
        torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)
