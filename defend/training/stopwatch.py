"""Seconds spent on one kind of work, on the CPU or a GPU, without waiting for either."""

import time
from types import TracebackType

import torch


class Stopwatch:
    """Adds up the seconds of `with stopwatch:` blocks, which may not be nested.

    On a GPU they are the device's own, between two events in its queue, and are read once asked
    for; elsewhere they are the wall clock's.

    Args:
        device: where the work is done.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds = 0.0
        self._pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._start = 0.0

    def __enter__(self) -> None:
        if self._cuda:
            pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._pairs.append(pair)
            pair[0].record()
        else:
            self._start = time.perf_counter()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self._cuda:
            self._seconds += time.perf_counter() - self._start
            return
        self._pairs[-1][1].record()
        while self._pairs and self._pairs[0][1].query():  # so that they do not pile up
            self._add_first()

    def read(self) -> float:
        """Seconds so far; waits for the device."""
        while self._pairs:
            self._pairs[0][1].synchronize()
            self._add_first()
        return self._seconds

    def _add_first(self) -> None:
        start, end = self._pairs.pop(0)
        self._seconds += start.elapsed_time(end) / 1000
