"""Input gradients that led nowhere, counted on the device."""

import warnings

from torch import Tensor


class Tally:
    """Counts input gradients: all, those that were zero, those not finite.

    Attributes:
        gradients: all, since they were taken last.
    """

    def __init__(self) -> None:
        self.gradients = 0
        self._zero: Tensor | int = 0
        self._nonfinite: Tensor | int = 0

    def add(self, gradients: int, zero: Tensor | int, nonfinite: Tensor | int) -> None:
        """Count those of one attack. Nothing waits for the device."""
        self.gradients += gradients
        self._zero, self._nonfinite = self._zero + zero, self._nonfinite + nonfinite

    def take(self) -> tuple[int, int, int]:
        """The counts since the last call. Waits for the device."""
        counts = self.gradients, int(self._zero), int(self._nonfinite)
        self.gradients, self._zero, self._nonfinite = 0, 0, 0
        return counts


def rates(counts: tuple[int, int, int]) -> dict[str, float]:
    """Shares of useless gradients, under the names they log by.

    Args:
        counts: of `Tally.take`, summed over processes where there are several.

    Returns:
        Nothing where none were counted, as by attacks other than PGD.
    """
    total, zero, nonfinite = counts
    if total == 0:
        return {}
    if nonfinite:
        warnings.warn(
            f"{nonfinite} of {total} input gradients were not finite; the attack is weaker than it "
            "looks. Look for overflow in the model, fp16 most of all.",
            stacklevel=3,
        )
    return {
        "attack/zero_grad_rate": zero / total,
        "attack/nonfinite_grad_rate": nonfinite / total,
    }
