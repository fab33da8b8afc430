"""Record work on a GPU as a CUDA graph, and leave nothing behind where that fails.

A capture that fails half-way leaves more than an exception: the capturing stream stays the current
one, the allocator goes on routing memory to the graph's pool, and (before torch 2.11) the default
generator takes itself to be captured. So what can be known before is asked before: whether the work
waits for the device, and how much memory the graph would keep. The rest is put back afterwards.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from defend.batching.memory import free_bytes, peak_bytes

_WARM_UP_RUNS = 3  # runs before a capture, for the choice of kernels and their workspaces
_MAX_SHARE_OF_FREE_MEMORY = (
    0.25  # of the free memory, at most: training needs the rest, and large steps gain nothing
)

# One for each device: kernels' workspaces are kept for every stream that was ever used.
_CAPTURE_STREAMS: dict[torch.device, torch.cuda.Stream] = {}
_FAILED_GRAPHS: list[
    torch.cuda.CUDAGraph
] = []  # the allocator may go on asking them; they hold nothing


def record(
    work: Callable[[], object], device: torch.device, pool: Any = None
) -> tuple[Callable[[], None], Any]:
    """Capture `work` and return what replays it.

    Args:
        work: reads and writes the same memory at each call; it is called a few times.
        device: a GPU.
        pool: memory of an earlier recording, to share. Only for recordings that are never replayed
            at the same time, and leave their results in memory that was there before.

    Returns:
        What replays the work on the current stream, and the pool.

    Raises:
        torch.OutOfMemoryError: if the work, or its graph, does not fit.
        RuntimeError: if it cannot be captured, or takes too much memory to keep.
    """
    with torch.cuda.device(device), _current_stream_kept(device), _casts_not_cached():
        if device not in _CAPTURE_STREAMS:
            _CAPTURE_STREAMS[device] = torch.cuda.Stream(device)
        side = _CAPTURE_STREAMS[device]
        _warm_up(work, side)
        if pool is None:
            pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            # "thread_local": a loader's pinning thread may go on with what it does.
            with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
                work()
        except BaseException:
            _clean_up(graph, pool, side)
            raise
    return graph.replay, pool


def keep_random_numbers(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Leave the default generators as they were, so that no draw is missing afterwards."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [], device_type="cuda")


def _warm_up(work: Callable[[], object], side: torch.cuda.Stream) -> None:
    """Run `work` on the stream that will capture it; refuse what waits or takes too much."""
    device = side.device
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(_WARM_UP_RUNS - 1):
            work()
        taken = peak_bytes(lambda: _without_waiting(work), device)
    torch.cuda.current_stream(device).wait_stream(side)
    free = free_bytes(device)
    if taken > _MAX_SHARE_OF_FREE_MEMORY * free:
        raise RuntimeError(
            f"it would keep {taken / 2**30:.1f} of {free / 2**30:.1f} GiB of free memory"
        )


def _without_waiting(work: Callable[[], object]) -> None:
    """Run `work`; raise afterwards if it made the host wait for the device, as .item() does."""
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # Not "error": the mode is that of all threads, and a loader's may well have to wait.
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    for warning in caught:
        if "synchronizing CUDA operation" in str(warning.message):
            raise RuntimeError(
                f"it waits for the device ({warning.filename}, line {warning.lineno})"
            )


@contextlib.contextmanager
def _casts_not_cached() -> Iterator[None]:
    """Casts of weights are part of the graph: a cache of them would be stale after an update."""
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(cached)


def _current_stream_kept(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    # `torch.cuda.graph` does not leave its stream when the end of the capture fails.
    return torch.cuda.stream(torch.cuda.current_stream(device))


def _clean_up(graph: torch.cuda.CUDAGraph, pool: Any, side: torch.cuda.Stream) -> None:
    """After a failure; nothing is to be done if the capture itself came to its end."""
    with contextlib.suppress(RuntimeError):
        graph.pool()
        return
    device = side.device
    # torch has no public way to end what `capture_begin` began.
    with contextlib.suppress(RuntimeError, AttributeError):
        torch._C._cuda_endAllocateToPool(device.index, pool)
        torch._C._cuda_releasePool(device.index, pool)
    graph.reset()
    _FAILED_GRAPHS.append(graph)
    # A capture that succeeds sets the default generator right, too.
    with (
        contextlib.suppress(RuntimeError),
        torch.cuda.graph(torch.cuda.CUDAGraph(), stream=side, capture_error_mode="thread_local"),
    ):
        torch.zeros(1, device=device)
