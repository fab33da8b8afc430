"""What an attack returns: adversarial inputs, and counts of the gradients it took."""

import dataclasses
import warnings

from torch import Tensor


@dataclasses.dataclass(frozen=True)
class GradientCounts:
    """How many input gradients were computed, and how many of them were useless.

    Counts add up with `+`. They may be tensors on a device, and adding them does not wait for it.

    Attributes:
        gradients: all of them, one for each record and step.
        zero: those that were zero in every value, so that the attack could not move (masked
            gradients, a saturated loss).
        nonfinite: those that held NaN or infinity.
    """

    gradients: int = 0
    zero: Tensor | int = 0
    nonfinite: Tensor | int = 0

    def __add__(self, other: "GradientCounts") -> "GradientCounts":
        return GradientCounts(
            self.gradients + other.gradients,
            self.zero + other.zero,
            self.nonfinite + other.nonfinite,
        )

    def to_ints(self) -> tuple[int, int, int]:
        """(gradients, zero, nonfinite) as Python numbers; waits for the device."""
        return self.gradients, int(self.zero), int(self.nonfinite)


@dataclasses.dataclass(frozen=True)
class AttackResult:
    """What an attack made of a batch.

    Attributes:
        x_adv: of the shape, dtype, device and layout of x.
        counts: of its input gradients; all 0 where the attack does not count them.
    """

    x_adv: Tensor
    counts: GradientCounts = GradientCounts()

    @property
    def gradients(self) -> int:
        """Input gradients computed."""
        return self.counts.gradients

    @property
    def zero_gradients(self) -> Tensor | int:
        """Those of them that were zero; a 0-dimensional tensor where they were counted."""
        return self.counts.zero

    @property
    def nonfinite_gradients(self) -> Tensor | int:
        """Those of them that were not finite; likewise."""
        return self.counts.nonfinite


def rates(counts: GradientCounts) -> dict[str, float]:
    """Shares of useless gradients, under the names they are logged by.

    Warns where gradients were not finite.

    Args:
        counts: of one process, or summed over processes.

    Returns:
        An empty dict where no gradients were counted, as by attacks other than PGD and Free.
    """
    total, zero, nonfinite = counts.to_ints()
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
