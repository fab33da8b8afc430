"""How many rows fit into memory: measured on two small steps, and halved where that was wrong."""

import math
import warnings
from collections.abc import Callable

import torch

from defend.batching.chunks import even_bounds

SHARE = 0.8  # of the free memory; the rest is for fragments and what other steps need
_FEW_ROWS, _MORE_ROWS = 4, 12  # that are measured


def rows_that_fit(
    measure: Callable[[int], int], free: int, *, most: int, share: float = SHARE
) -> int:
    """The largest number of rows whose step stays within a share of the free memory.

    Memory grows linearly in the rows: bytes(n) = fixed + n · per_row. Two measurements give both,
    after one that does not count.

    Args:
        measure: rows → peak bytes of a step on that many rows, above what was there before.
        free: bytes that may be used.
        most: never more than this, ≥ 1.
        share: of the free bytes, in (0, 1].

    Returns:
        Rows, from 1 to `most`. A step that does not fit after all is halved when it fails.
    """
    few, more = min(_FEW_ROWS, most), min(_MORE_ROWS, most)
    if few == more:
        return most
    measure(few)  # the first step also allocates what stays: workspaces of kernels
    low, high = measure(few), measure(more)
    per_row = max((high - low) / (more - few), 1.0)
    fixed = max(low - few * per_row, 0.0)
    return max(1, min(most, int((share * free - fixed) / per_row)))


def run_in_chunks(run: Callable[[int, int], None], rows: int, chunk_size: int | None) -> int:
    """run(start, stop) over `rows` rows in equal chunks; one that does not fit is halved.

    A chunk that runs out of memory is run again, in two halves at least, and so are all after it.
    `run` must leave nothing behind when it fails.

    Args:
        run: works on the rows start…stop.
        rows: rows in all, ≥ 1.
        chunk_size: most rows at once to begin with; None means all.

    Returns:
        The most rows at once in the end.

    Raises:
        torch.OutOfMemoryError: if a single row does not fit.
    """
    size = rows if chunk_size is None else chunk_size
    start = 0
    while start < rows:
        left = rows - start
        stop = start + even_bounds(left, math.ceil(left / size))[0][1]
        message = _run_or_message(run, start, stop)
        if message is None:
            start = stop
            continue
        size = math.ceil((stop - start) / 2)
        warnings.warn(
            f"{stop - start} rows did not fit ({message}); going on with {size} at a time.",
            stacklevel=2,
        )
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return size


def _run_or_message(run: Callable[[int, int], None], start: int, stop: int) -> str | None:
    """None, or why the rows did not fit. Once this returns, nothing holds what did not fit."""
    try:
        run(start, stop)
    except RuntimeError as error:
        if stop - start == 1 or not _is_out_of_memory(error):
            raise
        return str(error).splitlines()[0] if str(error) else "out of memory"
    return None


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Libraries under torch, and its allocator for the CPU, have errors of no type of their own."""
    known = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "can't allocate memory")
    return isinstance(error, torch.OutOfMemoryError) or any(k in str(error) for k in known)


def free_bytes(device: torch.device) -> int:
    """Bytes that this process may still allocate on a GPU, its allocator's own cache included."""
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    share = getattr(torch.cuda, "get_per_process_memory_fraction", lambda _: 1.0)(device)
    allowed = max(0, min(free, int(share * total) - reserved))
    return allowed + reserved - torch.cuda.memory_allocated(device)


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Most bytes that `run` allocates on a GPU above what is there now."""
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def kept_bytes(run: Callable[[], object]) -> int:
    """Bytes that autograd keeps from the forwards of `run` for the backwards, weights included."""
    kept: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.layout == torch.strided:
            storage = t.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return t.detach()  # t itself may own the graph that it is packed for

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return sum(kept.values())
