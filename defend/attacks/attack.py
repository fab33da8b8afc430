"""What an attack is, and what it gives."""

import dataclasses
from typing import Protocol

import torch
from torch import Tensor

from defend.attacks.ascent import Model


class Attack(Protocol):
    """Anything that perturbs a batch: x_adv of the same shape, dtype, device and layout as x."""

    def __call__(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        *,
        generator: torch.Generator | None = None,
        chunk_size: int | None = None,
    ) -> Tensor: ...


@dataclasses.dataclass(frozen=True)
class AttackResult:
    """What an attack made of a batch.

    Attributes:
        x_adv: like x, detached.
        gradients: input gradients computed, one for each record and step.
        zero_gradients: how many of them were zero in every value, so that the attack could not
            move (masked gradients, a saturated loss); a 0-dimensional tensor on x's device.
        nonfinite_gradients: how many held NaN or infinity; likewise.
    """

    x_adv: Tensor
    gradients: int
    zero_gradients: Tensor
    nonfinite_gradients: Tensor
