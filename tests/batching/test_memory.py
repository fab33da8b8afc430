"""Rows that fit, from two measurements of a simulated memory; halves where they do not."""

import gc
import weakref

import pytest
import torch

from defend.batching.memory import (
    free_bytes,
    kept_bytes,
    peak_bytes,
    rows_that_fit,
    run_in_chunks,
)


class Memory:
    """fixed + per_row bytes, and a record of what was asked."""

    def __init__(self, fixed, per_row):
        self.fixed, self.per_row, self.asked = fixed, per_row, []

    def __call__(self, rows):
        self.asked.append(rows)
        return self.fixed + rows * self.per_row


@pytest.mark.parametrize("fixed", [0, 1_000_000])
@pytest.mark.parametrize("per_row", [1, 1_000, 777])
@pytest.mark.parametrize("free", [2_000_000, 50_000_000])
def test_uses_the_share_and_never_more(fixed, per_row, free):
    memory = Memory(fixed, per_row)
    rows = rows_that_fit(memory, free, most=10**9)
    assert fixed + rows * per_row <= 0.8 * free < fixed + (rows + 1) * per_row
    assert max(memory.asked) <= 12  # small steps only


def test_never_more_than_is_wanted():
    assert rows_that_fit(Memory(0, 1), 10**9, most=300) == 300


def test_never_less_than_one():
    assert rows_that_fit(Memory(10**9, 10**9), 1000, most=300) == 1


def test_batches_that_are_small_anyway_are_not_measured():
    memory = Memory(0, 10**9)
    assert rows_that_fit(memory, 1, most=3) == 3
    assert memory.asked == []


def test_memory_that_does_not_grow_is_no_division_by_zero():
    assert rows_that_fit(lambda rows: 5, 1000, most=50) == 50


def test_a_first_step_that_also_sets_up_does_not_count():
    """Workspaces of kernels, allocated once, would hide what twelve rows take more than four."""
    memory = Memory(1000, 100)

    def measure(rows):
        return memory(rows) + (10**6 if len(memory.asked) == 1 else 0)

    assert rows_that_fit(measure, 10_000, most=10**9) == 70


def test_a_smaller_share():
    assert rows_that_fit(Memory(1000, 100), 10_000, most=10**9, share=0.4) == 30


class Rows:
    """A run over rows that holds at most `fits` of them at once."""

    def __init__(self, fits=None, message="out of\nmemory"):
        self.fits, self.message, self.done, self.failed = fits, message, [], []

    def __call__(self, start, stop):
        if self.fits is not None and stop - start > self.fits:
            self.failed.append((start, stop))
            raise torch.OutOfMemoryError(self.message)
        self.done.append((start, stop))

    @property
    def sizes(self):
        return [stop - start for start, stop in self.done]

    def covers(self, rows):
        return [i for start, stop in self.done for i in range(start, stop)] == list(range(rows))


@pytest.mark.parametrize("rows", [1, 7, 64, 100])
@pytest.mark.parametrize("chunk_size", [None, 1, 7, 30, 1000])
def test_equal_chunks_that_cover_each_row_once(rows, chunk_size):
    run = Rows()
    size = run_in_chunks(run, rows, chunk_size)
    assert run.covers(rows)
    assert max(run.sizes) <= size == (chunk_size or rows)
    assert max(run.sizes) - min(run.sizes) <= 1
    assert len(run.sizes) == -(-rows // size)


@pytest.mark.parametrize("fits", [1, 2, 5, 24, 63])
@pytest.mark.parametrize("chunk_size", [None, 40])
@pytest.mark.filterwarnings("ignore:.*did not fit")
def test_halved_until_it_fits_and_no_row_twice(fits, chunk_size):
    run = Rows(fits)
    size = run_in_chunks(run, 64, chunk_size)
    assert run.covers(64)
    assert max(run.sizes) <= size <= fits
    assert all(start == 0 for start, _ in run.failed)  # the rest does not fail again


def test_says_so_each_time_it_halves():
    with pytest.warns(UserWarning, match="did not fit") as caught:
        assert run_in_chunks(Rows(3), 10, None) == 3
    assert [str(w.message) for w in caught] == [
        "10 rows did not fit (out of); going on with 5 at a time.",
        "5 rows did not fit (out of); going on with 3 at a time.",
    ]


@pytest.mark.filterwarnings("ignore:.*did not fit")
def test_a_failure_on_the_way_keeps_what_is_done():
    run = Rows(8)

    def later(start, stop):
        if start >= 16:
            run.fits = 3
        run(start, stop)

    assert run_in_chunks(later, 40, 8) == 2
    assert run.covers(40)
    assert run.failed == [(16, 24), (16, 20)]


@pytest.mark.filterwarnings("ignore:.*did not fit")
def test_a_row_that_does_not_fit_is_an_error():
    run = Rows(0, "simulated")
    with pytest.raises(torch.OutOfMemoryError, match="simulated"):
        run_in_chunks(run, 10, None)
    assert run.failed[-1] == (0, 1)


def test_other_errors_pass():
    def broken(start, stop):
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        run_in_chunks(broken, 10, None)


@pytest.mark.filterwarnings("ignore:.*did not fit")
@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried",
    ],
)
def test_a_lack_of_memory_goes_by_other_names_too(message):
    run = Rows(4)

    def other_names(start, stop):
        try:
            run(start, stop)
        except torch.OutOfMemoryError:
            raise RuntimeError(message) from None

    assert run_in_chunks(other_names, 10, None) == 3
    assert run.covers(10)
    run.fits = 0
    with pytest.raises(RuntimeError, match=r"ALLOC_FAILED|allocate memory"):
        run_in_chunks(other_names, 1, None)


@pytest.mark.filterwarnings("ignore:.*did not fit")
def test_nothing_of_what_did_not_fit_is_held_when_it_is_tried_again():
    """A traceback that is still around would keep the tensors that filled the memory."""
    held = []

    def run(start, stop):
        assert all(tensor() is None for tensor in held)
        large = torch.zeros(stop - start)
        held.append(weakref.ref(large))
        if stop - start > 3:
            raise torch.OutOfMemoryError("simulated")

    assert run_in_chunks(run, 10, None) == 3
    assert len(held) == 2 + 4


def test_kept_is_what_backward_needs_and_each_storage_once():
    x = torch.rand(100, requires_grad=True)
    weight = torch.rand(100)

    def run():
        y = x * weight  # keeps weight: x's factor needs it, weight itself wants no gradient
        z = y.view(10, 10) * weight.view(10, 10)  # the same storage again
        (z + 1).tanh().sum()  # keeps its output

    assert kept_bytes(run) == 400 + 400
    assert kept_bytes(lambda: x.detach() * weight) == 0


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("layout", [torch.strided, torch.sparse_coo, torch.sparse_csr], ids=str)
def test_measuring_what_is_kept_keeps_nothing(layout, backward):
    """tanh saves its own output, which owns the graph; a sparse tensor has no storage to ask."""
    made = []

    def run():
        x = torch.rand(4, 4, requires_grad=True)
        sparse = layout != torch.strided
        hidden = (torch.eye(4).to_sparse(layout=layout) @ x if sparse else x).tanh()
        made.append(weakref.ref(hidden))
        if backward:
            torch.autograd.grad(hidden.sum(), x)

    assert kept_bytes(run) >= 64
    gc.collect()
    assert made[0]() is None


@pytest.mark.parametrize(
    ("share", "expected"), [(1.0, 400 + 50), (0.5, 500 - 200 + 50), (0.1, 0 + 50)]
)
def test_free_is_what_is_left_of_the_device_and_of_what_is_allowed(monkeypatch, share, expected):
    made_up = {
        "mem_get_info": lambda device: (400, 1000),
        "memory_reserved": lambda device: 200,
        "memory_allocated": lambda device: 150,
        "get_per_process_memory_fraction": lambda device: share,
    }
    for name, value in made_up.items():
        monkeypatch.setattr(torch.cuda, name, value, raising=False)
    assert free_bytes(torch.device("cuda", 0)) == expected


@pytest.mark.cuda
def test_bytes_on_cuda():
    device = torch.device("cuda", 0)
    kept = []

    def run():
        kept.append(torch.empty(2**20, dtype=torch.uint8, device=device))
        torch.empty(2**22, dtype=torch.uint8, device=device)

    before = free_bytes(device)
    assert peak_bytes(run, device) == 2**20 + 2**22
    assert before - 2**24 <= free_bytes(device) <= before - 2**20
