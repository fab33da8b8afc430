"""How many rows an attack runs through a model at once, remembered from batch to batch."""

from collections.abc import Callable, Hashable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from defend.batching.memory import free_bytes, peak_bytes, rows_that_fit

_ENOUGH = 12  # rows in a batch, to measure what a row takes
_MOST = 2**30

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
        self._known = _KNOWN.setdefault(model, {}) if isinstance(model, nn.Module) else {}
        self._key, self._device, self._share = key, device, share

    def rows(
        self, asked: int | str | None, batch: int, step: Callable[[int], object]
    ) -> int | None:
        """Most rows at once for a batch; None means all of them.

        Args:
            asked: what the user said: a number, None for all rows, or "auto".
            batch: rows there are.
            step: rows → one step of the attack on so many of them.
        """
        if asked == "auto" and self._key not in self._known and batch >= _ENOUGH:
            if self._device.type != "cuda":
                return None
            self._known[self._key] = self._measured(step)
        most = int(asked) if isinstance(asked, int) else batch
        return min(most, self._known.get(self._key, most))

    def _measured(self, step: Callable[[int], object]) -> int:
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
