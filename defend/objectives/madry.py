"""Madry's objective: the loss on the adversarial inputs, and nothing else."""

import dataclasses
from typing import ClassVar, Literal

from torch import Tensor

from defend.objectives.base import Objective


@dataclasses.dataclass(frozen=True)
class Madry(Objective):
    """min_θ E[ max_δ CE(f(x + δ), y) ] (Madry et al. 2018, arXiv 1706.06083).

    The training step sees the adversarial batch and its loss is all there is: the clean logits are
    not needed, and the penalty is zero. Class probabilities as targets go into the cross-entropy
    as they are.
    """

    name: ClassVar[str] = "madry"
    inner_loss: ClassVar[Literal["ce", "kl"]] = "ce"
    start_radius: ClassVar[float | None] = None
    trains_on: ClassVar[Literal["adversarial", "clean"]] = "adversarial"
    pairs: ClassVar[bool] = False

    def _penalty(self, clean_logits: Tensor, adv_logits: Tensor, y: Tensor) -> Tensor:
        return adv_logits.new_zeros(len(adv_logits))
