"""How many rows an attack runs through a model at once, remembered from batch to batch."""

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from defend.batching.memory import free_bytes, kept_bytes, peak_bytes, rows_that_fit

_MEASURED_ROWS = 12  # of a batch, to measure what a row takes
_NO_LIMIT = 2**30

# Activations of more bytes are handed back to the system after every step on a CPU, and come again
# page by page: measured, it cost a small CNN a third of its time. Fewer rows than these are slower.
_MAX_KEPT_BYTES_ON_CPU = 40e6
_MIN_ROWS_ON_CPU = 32

# Rows known to fit, by kind of batch, for as long as the model lives.
_KNOWN_ROWS: WeakKeyDictionary[nn.Module, dict[Hashable, int]] = WeakKeyDictionary()


class ChunkSize:
    """The rows that fit for one model and kind of batch.

    Args:
        model: what is run; only modules are remembered.
        key: tells kinds of batch apart: shape of a row, dtype, precision.
        device: where it runs.
        share: of the free memory that one step may take.
    """

    def __init__(self, model: Any, key: Hashable, device: torch.device, share: float) -> None:
        self._remembers = isinstance(model, nn.Module)
        self._known = _KNOWN_ROWS.setdefault(model, {}) if self._remembers else {}
        self._key, self._device, self._share = key, device, share

    def rows(
        self, asked: int | str | None, batch: int, step: Callable[[int], object]
    ) -> int | None:
        """Most rows at once for a batch; None means all of them.

        On a GPU as many as fit into its memory, on a CPU as many as keep it warm.

        Args:
            asked: what the user said: a number, None for all rows, or "auto".
            batch: rows there are.
            step: runs one step of the attack on the given number of rows.
        """
        most = int(asked) if isinstance(asked, int) else batch
        if asked == "auto":
            most = min(most, self._measured(batch, step))
        return min(most, self._known.get(self._key, most))

    def _measured(self, batch: int, step: Callable[[int], object]) -> int:
        """The rows for "auto"; measured for the first large enough batch of its kind."""
        if self._device.type == "cuda":
            key, fewest, measure = self._key, _MEASURED_ROWS - 1, self._fitting
        else:
            # Kept apart from what is known to fit, since it is only a matter of speed.
            key, fewest, measure = ("warm", self._key), _MIN_ROWS_ON_CPU, self._warm
        if key not in self._known:
            if batch <= fewest or not self._remembers:
                return batch
            self._known[key] = measure(step)
        return self._known[key]

    def _warm(self, step: Callable[[int], object]) -> int:
        """Rows whose activations stay in the process's memory on a CPU."""
        few, more = (
            kept_bytes(partial(step, rows)) for rows in (_MEASURED_ROWS // 2, _MEASURED_ROWS)
        )
        per_row = max((more - few) / (_MEASURED_ROWS - _MEASURED_ROWS // 2), 1.0)
        return max(_MIN_ROWS_ON_CPU, int(_MAX_KEPT_BYTES_ON_CPU / per_row))

    def _fitting(self, step: Callable[[int], object]) -> int:
        """Rows that fit into the memory of a GPU."""
        try:
            return rows_that_fit(
                lambda rows: peak_bytes(lambda: step(rows), self._device),
                free_bytes(self._device),
                most=_NO_LIMIT,
                share=self._share,
            )
        except torch.OutOfMemoryError:
            return _MEASURED_ROWS // 2  # halved again where that is too many

    def remember(self, tried: int | None, fitted: int) -> None:
        """After a batch: the next one begins with what fitted."""
        if tried is not None and fitted < tried:
            self._known[self._key] = fitted
