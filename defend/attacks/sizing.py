"""How many rows an attack runs through a model at once, remembered from batch to batch."""

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from defend.batching.memory import free_bytes, kept_bytes, peak_bytes, rows_that_fit

_ENOUGH = 12  # rows in a batch, to measure what a row takes
_MOST = 2**30

# On a CPU, more than so much is handed back to the system after every step, and comes again page
# by page: measured, it cost a small CNN a third of its time. Fewer rows than so many are slower.
_KEPT_ON_CPU = 40e6
_FEWEST_ON_CPU = 32

# Rows known to fit, by what is run: for as long as the model lives.
_KNOWN: WeakKeyDictionary[nn.Module, dict[Hashable, int]] = WeakKeyDictionary()


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
        self._known = _KNOWN.setdefault(model, {}) if self._remembers else {}
        self._key, self._device, self._share = key, device, share

    def rows(
        self, asked: int | str | None, batch: int, step: Callable[[int], object]
    ) -> int | None:
        """Most rows at once for a batch; None means all of them.

        On a GPU as many as fit into its memory, on a CPU as many as keep it warm.

        Args:
            asked: what the user said: a number, None for all rows, or "auto".
            batch: rows there are.
            step: rows → one step of the attack on so many of them.
        """
        most = int(asked) if isinstance(asked, int) else batch
        if asked == "auto":
            most = min(most, self._measured(batch, step))
        return min(most, self._known.get(self._key, most))

    def _measured(self, batch: int, step: Callable[[int], object]) -> int:
        """What is good for a batch if nobody says; measured the first time."""
        if self._device.type == "cuda":
            key, fewest, measure = self._key, _ENOUGH - 1, self._fitting
        else:
            # Apart from what is known to fit: it is a matter of speed alone.
            key, fewest, measure = ("warm", self._key), _FEWEST_ON_CPU, self._warm
        if key not in self._known:
            if batch <= fewest or not self._remembers:
                return batch
            self._known[key] = measure(step)
        return self._known[key]

    def _warm(self, step: Callable[[int], object]) -> int:
        few, more = (kept_bytes(partial(step, rows)) for rows in (_ENOUGH // 2, _ENOUGH))
        per_row = max((more - few) / (_ENOUGH - _ENOUGH // 2), 1.0)
        return max(_FEWEST_ON_CPU, int(_KEPT_ON_CPU / per_row))

    def _fitting(self, step: Callable[[int], object]) -> int:
        try:
            return rows_that_fit(
                lambda rows: peak_bytes(lambda: step(rows), self._device),
                free_bytes(self._device),
                most=_MOST,
                share=self._share,
            )
        except torch.OutOfMemoryError:
            return _ENOUGH // 2  # halved again where that is too many

    def remember(self, tried: int | None, fitted: int) -> None:
        """After a batch: the next one begins with what fitted."""
        if tried is not None and fitted < tried:
            self._known[self._key] = fitted
