"""MART: a misclassified record counts for more."""

import dataclasses
from typing import ClassVar, Literal

from torch import Tensor

from defend.objectives.base import Objective
from defend.objectives.losses import kl, labels_of
from defend.objectives.trades import check_beta

# The authors' code keeps the logarithm of 1 − p finite this way, so no record has a boost above
# 9.2. Its further guards (1e-12 under logarithms, 1e-7 on 1 − p_y) are not needed: the divergence
# is computed from log-probabilities here.
_ONE = 1.0001


@dataclasses.dataclass(frozen=True)
class MART(Objective):
    r"""Misclassification-aware adversarial training (Wang et al., ICLR 2020).

        min_θ E[ BCE(f(x'), y) + β · KL(f(x) ‖ f(x')) · (1 − p_y(x)) ]
        BCE(f(x'), y) = −log p_y(x') − log(1 − max_{k≠y} p_k(x'))

    with p = softmax(f) and x' the adversarial input, made by increasing cross-entropy. The
    training step sees the adversarial batch and gives the first term of BCE; the rest is the
    penalty, for which the clean batch goes through the model once more. The gradient flows through
    both batches, the weight 1 − p_y(x) included.

    With class probabilities as targets, the first term takes them as they are, and y in the
    penalty is the most probable class.

    Args:
        beta: λ of the paper, ≥ 0; 5 and 6 are usual.

    Raises:
        InputError: if β is negative or not finite.
    """

    beta: float = 5.0
    name: ClassVar[str] = "mart"
    inner_loss: ClassVar[Literal["ce", "kl"]] = "ce"
    start_radius: ClassVar[float | None] = None
    trains_on: ClassVar[Literal["adversarial", "clean"]] = "adversarial"
    pairs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_beta(self.beta, usual=5.0)

    def _penalty(self, clean_logits: Tensor, adv_logits: Tensor, y: Tensor) -> Tensor:
        label = labels_of(y)
        doubt = 1 - probability_of(clean_logits, label)
        return boost(adv_logits, label) + self.beta * doubt * kl(clean_logits, adv_logits)


def boost(logits: Tensor, label: Tensor) -> Tensor:
    """−log(1.0001 − max_{k≠y} p_k) of each record: large where a wrong class is likely.

    Args:
        logits: `[N, classes]`.
        label: class indices `[N]`.

    Returns:
        `[N]`, from −1e-4 to 9.22.
    """
    others = logits.softmax(1).scatter(1, label.unsqueeze(1), 0.0)
    return -(_ONE - others.max(1).values).log()


def probability_of(logits: Tensor, label: Tensor) -> Tensor:
    """p_y of each record, `[N]`."""
    return logits.softmax(1).gather(1, label.unsqueeze(1)).squeeze(1)
