"""TRADES: accuracy on clean inputs, traded against stability around them."""

import dataclasses
from typing import ClassVar, Literal

from torch import Tensor

from defend.errors import InputError
from defend.objectives.base import Objective
from defend.objectives.losses import kl


@dataclasses.dataclass(frozen=True)
class TRADES(Objective):
    """min_θ E[ CE(f(x), y) + β · max_δ KL(f(x) ‖ f(x + δ)) ] (Zhang et al. 2019, arXiv 1901.08573).

    The training step sees the clean batch; the adversarial one, made by increasing the same
    divergence, goes through the model once more. The gradient flows through both arguments of the
    divergence. The divergence has no slope at δ = 0, so the attack starts near it, 0.001 of the
    box away, instead of anywhere in the ball.

    The penalty does not look at the targets: class probabilities are as good as indices.

    Args:
        beta: β = 1 / λ of the paper, ≥ 0; 1 to 10 are usual, and 6 is the paper's for CIFAR-10.

    Raises:
        InputError: if β is negative or not finite.
    """

    beta: float = 6.0
    name: ClassVar[str] = "trades"
    inner_loss: ClassVar[Literal["ce", "kl"]] = "kl"
    start_radius: ClassVar[float | None] = 0.001
    trains_on: ClassVar[Literal["adversarial", "clean"]] = "clean"
    pairs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_beta(self.beta, usual=6.0)

    def _penalty(self, clean_logits: Tensor, adv_logits: Tensor, y: Tensor) -> Tensor:
        return self.beta * kl(clean_logits, adv_logits)


def check_beta(beta: float, *, usual: float) -> None:
    """Refuse a weight of the penalty that is negative or not finite."""
    if not 0 <= beta < float("inf"):
        raise InputError(
            f"Expected `beta` to be a finite number ≥ 0, got {beta}. Give the weight of the "
            f"divergence, for example {usual}."
        )
