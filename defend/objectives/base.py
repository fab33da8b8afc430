"""What adversarial training minimizes, and on which of the two batches."""

from abc import ABC, abstractmethod
from typing import Literal, final

from torch import Tensor

from defend.errors import InputError
from defend.objectives.losses import cross_entropy, in_full_precision


class Objective(ABC):
    """The loss of a record, from the logits of its clean and of its adversarial input.

        loss_i = CE(own_i, y_i) + penalty_i

    `own` being the logits that the user's training step sees, and computes a loss of its own from:
    those of `trains_on`. What an objective adds to that is its `penalty`, and row i of it depends
    on row i of the arguments only.

    One of your own is a subclass that gives the five properties (class variables do) and
    `_penalty`, and keeps nothing from one batch to the next. The other methods are final.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """How it is called in logs and on cards."""

    @property
    @abstractmethod
    def inner_loss(self) -> Literal["ce", "kl"]:
        """What the attack increases: cross-entropy, or KL(clean ‖ adversarial)."""

    @property
    @abstractmethod
    def start_radius(self) -> float | None:
        """Size of the attack's random start, in parts of the box; None leaves it to the attack."""

    @property
    @abstractmethod
    def trains_on(self) -> Literal["adversarial", "clean"]:
        """The batch that the user's own training step sees."""

    @property
    @abstractmethod
    def pairs(self) -> bool:
        """Whether the other batch goes through the model too, row by row."""

    @abstractmethod
    def _penalty(self, clean_logits: Tensor, adv_logits: Tensor, y: Tensor) -> Tensor:
        """`penalty` of an objective with `pairs`, from checked logits in at least float32."""

    @final
    def penalty(self, clean_logits: Tensor | None, adv_logits: Tensor, y: Tensor) -> Tensor:
        """What is added, as its mean, to the mean loss of the user's own training step.

        Args:
            clean_logits: of the clean inputs `[N, classes]`, any float dtype; may be None where
                the objective has no `pairs`.
            adv_logits: of the adversarial inputs, `[N, classes]`.
            y: class indices `[N]`, or class probabilities `[N, classes]`.

        Returns:
            `[N]`, in at least float32; zero where the objective has no `pairs`.

        Raises:
            InputError: if the shapes do not match, or logits that are needed are not there.
        """
        _check(adv_logits, y)
        adv_logits = in_full_precision(adv_logits)
        if not self.pairs:
            return adv_logits.new_zeros(len(adv_logits))
        clean_logits = in_full_precision(self._needed(clean_logits))
        if clean_logits.shape != adv_logits.shape:
            raise InputError(
                "Expected clean and adversarial logits of the same shape, got "
                f"{tuple(clean_logits.shape)} and {tuple(adv_logits.shape)}. Run the model on all "
                "rows of both batches, in the same order."
            )
        return self._penalty(clean_logits, adv_logits, y)

    @final
    def losses(self, clean_logits: Tensor | None, adv_logits: Tensor, y: Tensor) -> Tensor:
        """The whole objective, cross-entropy being the loss on the batch of `trains_on`.

        Args and errors are those of `penalty`.

        Returns:
            `[N]`, in at least float32.
        """
        penalty = self.penalty(clean_logits, adv_logits, y)
        own = adv_logits if self.trains_on == "adversarial" else self._needed(clean_logits)
        own = in_full_precision(own)
        return cross_entropy(own, y) + penalty

    def _needed(self, clean_logits: Tensor | None) -> Tensor:
        if clean_logits is None:
            raise InputError(
                f"Expected the clean logits too, which {self.name} needs, got None. Run the model "
                "on the clean batch as well."
            )
        return clean_logits


def _check(logits: Tensor, y: Tensor) -> None:
    if logits.ndim != 2:
        raise InputError(
            f"Expected logits of shape [N, classes], got {tuple(logits.shape)}. Wrap the model so "
            "that its output has one row of logits for each record."
        )
    if y.shape not in (logits.shape[:1], logits.shape):
        raise InputError(
            f"Expected class indices of shape ({len(logits)},) or class probabilities of shape "
            f"{tuple(logits.shape)}, got targets of shape {tuple(y.shape)}. Give one target for "
            "each row of logits."
        )
