"""What every attack has in common: how training and evaluation use it."""

import dataclasses
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from defend.attacks.ascent import Model
from defend.attacks.context import untouched
from defend.attacks.result import AttackResult, GradientCounts
from defend.errors import InputError
from defend.threat.balls import Ball


class Perturber(ABC):
    """An attack over one training, with whatever it carries from batch to batch.

    For each batch: `perturb`, the training step with its backward, then `after_backward`.
    """

    @abstractmethod
    def perturb(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        *,
        generator: torch.Generator | None = None,
        chunk_size: int | str | None = "auto",
        eps: float | None = None,
    ) -> AttackResult:
        """Attack a batch.

        Args:
            model: a module or callable; model(x) gives logits `[N, classes]`.
            x: clean inputs `[N, ...]`, floating point, in model units; not written to.
            y: targets, one a record.
            generator: source of all random numbers; None draws from fresh OS entropy.
            chunk_size: most rows to attack at once; None means all, "auto" what fits, as far as
                the attack can tell.
            eps: another radius than its own, in raw units.

        Returns:
            x_adv, and the counts of input gradients.
        """

    def after_backward(self) -> GradientCounts:
        """Use the gradient that the training's backward left in x_adv, and count it.

        Attacks with gradients of their own do nothing here.
        """
        return GradientCounts()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training has to know; empty for attacks that keep nothing."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # noqa: B027 - may do nothing
        """Go on from a state."""


class TrainingAttack(ABC):
    """What a model can be trained against: an `Attack`, or `Free`, which is none to be called.

    Attributes:
        ball: the norm ball it stays in; None where it is not known.
        targeted: whether y is the class that the attacker wants.
        replays: how often each batch is trained on in a row.
        uses_training_gradient: whether the training step's own backward is its gradient.
    """

    ball: Ball | None = None
    targeted: bool = False
    replays: int = 1
    uses_training_gradient: ClassVar[bool] = False

    @property
    def source(self) -> Any:
        """The object that the user gave: this one, or the callable that it wraps."""
        return self

    @property
    def radius(self) -> float | None:
        """eps in raw units; None where it cannot be changed."""
        return None if self.ball is None else self.ball.eps

    @property
    def couples_records(self) -> bool:
        """Whether x_adv of a record depends on the other records of its chunk."""
        return False

    @property
    def is_one_step(self) -> bool:
        """Whether it is a single gradient step, which is prone to catastrophic overfitting."""
        return False

    def increasing(self, inner_loss: str, start_radius: float | None) -> "TrainingAttack":
        """The attack that increases what a training objective asks for.

        Args:
            inner_loss: name of a loss of `PGD`.
            start_radius: of the random start, in widths of the box; None leaves it as it is.
        """
        return self

    @abstractmethod
    def begin(self) -> Perturber:
        """The state of one training, new."""

    @abstractmethod
    def watched(self) -> "Attack":
        """The attack whose success an `OverfittingAlarm` compares with a stronger one's."""


class Attack(TrainingAttack, Perturber):
    """Base of attacks: x_adv = attack(model, x, y), in the form of x, without a trace.

    An attack keeps nothing from batch to batch, so it is its own `Perturber`. One of your own may
    also be any function with the signature of `__call__`; see `CallableAttack`.

    Attributes:
        steps: gradient steps; None where they are not known.
    """

    steps: int | None = None

    @property
    def radius(self) -> float | None:
        """eps in raw units; None where it cannot be changed."""
        return None if type(self).with_eps is Attack.with_eps else super().radius

    def perturb(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        *,
        generator: torch.Generator | None = None,
        chunk_size: int | str | None = "auto",
        eps: float | None = None,
    ) -> AttackResult:
        """Attack a batch, by `_perturb`.

        *Guarantee.* Modes, buffers, gradients, `requires_grad`, x and y are as before, also after
        an exception, whatever `_perturb` does to them.

        Raises:
            InputError: if what comes back is not of x's shape and dtype.
        """
        if len(x) == 0:
            return AttackResult(x.detach().clone())
        with untouched(model, x.device):
            # Copies: some attacks write into their inputs, and autograd refuses tensors that were
            # made in inference mode.
            found = self._perturb(
                model,
                x.detach().clone(),
                y.detach().clone(),
                generator=generator,
                chunk_size=chunk_size,
                eps=eps,
            )
        x_adv, got = found.x_adv, type(found.x_adv).__name__
        if isinstance(x_adv, Tensor):
            got = f"{tuple(x_adv.shape)} and {x_adv.dtype}"
        if got != f"{tuple(x.shape)} and {x.dtype}":
            raise InputError(
                f"Expected the attack to return inputs of shape {tuple(x.shape)} and {x.dtype}, "
                f"got {got}. Return x_adv in the form of x."
            )
        return AttackResult(x_adv.detach(), found.counts)

    @abstractmethod
    def _perturb(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        *,
        generator: torch.Generator | None,
        chunk_size: int | str | None,
        eps: float | None,
    ) -> AttackResult:
        """The attack itself, in eval mode, on copies of at least one record.

        Attacks of ours leave no trace by themselves, and override `perturb`.
        """

    def __call__(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        *,
        generator: torch.Generator | None = None,
        chunk_size: int | str | None = "auto",
    ) -> Tensor:
        """x_adv of `perturb`."""
        return self.perturb(model, x, y, generator=generator, chunk_size=chunk_size).x_adv

    def with_eps(self, eps: float) -> "Attack":
        """The same attack at another radius, in raw units.

        Raises:
            InputError: for an attack whose radius cannot be changed.
        """
        raise InputError(
            f"Expected an attack with `eps` and `with_eps`, got {self.source!r}. Take PGD where "
            "the radius is to change."
        )

    def for_evaluation(self) -> "Attack":
        """The attack at its strongest, for measuring robustness."""
        return self

    def probe(self) -> "Attack | None":
        """A stronger attack in the same ball, to find overfitting with; None if none is known."""
        return None

    def until_fooled(self) -> "Attack":
        """`for_evaluation`, sparing the steps on records that already fool the model."""
        return self.for_evaluation()

    def begin(self) -> Perturber:
        return self

    def watched(self) -> "Attack":
        return self


@dataclasses.dataclass(frozen=True, repr=False)
class CallableAttack(Attack):
    """A user's own function or object as an `Attack`.

    Args:
        function: called as function(model, x, y, generator=..., chunk_size=...), with a number of
            rows or None as `chunk_size`; returns x_adv. Used where it has them: `eps` and
            `with_eps(eps)`, `for_evaluation()`, `targeted`, `couples_records`.
    """

    function: Any

    def __post_init__(self) -> None:
        object.__setattr__(self, "targeted", getattr(self.function, "targeted", False) is True)

    def __repr__(self) -> str:
        return repr(self.function)

    @property
    def source(self) -> Any:
        return self.function

    @property
    def radius(self) -> float | None:
        eps = getattr(self.function, "eps", None)
        if not isinstance(eps, int | float) or not hasattr(self.function, "with_eps"):
            return None
        return float(eps)

    @property
    def couples_records(self) -> bool:
        return bool(getattr(self.function, "couples_records", False))

    def with_eps(self, eps: float) -> Attack:
        if not hasattr(self.function, "with_eps"):
            return super().with_eps(eps)
        return CallableAttack(self.function.with_eps(eps))

    def for_evaluation(self) -> Attack:
        if not hasattr(self.function, "for_evaluation"):
            return self
        return CallableAttack(self.function.for_evaluation())

    def _perturb(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        *,
        generator: torch.Generator | None,
        chunk_size: int | str | None,
        eps: float | None,
    ) -> AttackResult:
        function = self.function if eps is None else self.function.with_eps(eps)
        rows = chunk_size if isinstance(chunk_size, int) else None
        return AttackResult(function(model, x, y, generator=generator, chunk_size=rows))


def as_attack(value: Any) -> TrainingAttack:
    """An attack of ours as it is; a user's own callable as a `CallableAttack`."""
    return value if isinstance(value, TrainingAttack) else CallableAttack(value)
