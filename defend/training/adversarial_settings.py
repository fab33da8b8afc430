"""What a user asks of adversarial training, checked once, for every kind of training loop."""

import dataclasses
import inspect
from typing import Any

import torch

from defend.attacks.attack import Attack
from defend.attacks.free import Free
from defend.attacks.pgd import PGD
from defend.batching.chunks import check_chunk_size
from defend.errors import InputError, PrivacyError
from defend.objectives import AWP, Madry, Objective
from defend.threat.inputs import InputSpace


@dataclasses.dataclass(frozen=True)
class AdversarialSettings:
    """Settings of adversarial training; `AdversarialTraining` and `make_adversarial` explain them.

    `warmup_epochs` is counted as the loop counts: in epochs by a Trainer and by `make_private`, in
    batches by `make_adversarial`, which calls it `warmup_steps`.

    Raises:
        InputError: for settings out of range, or that do not go together.
    """

    attack: Attack | Free
    objective: Objective = dataclasses.field(default_factory=Madry)
    clean_fraction: float = 0.0
    warmup_epochs: float = 0
    input_key: int | str = 0
    target_key: int | str = 1
    chunk_size: int | str | None = "auto"

    def __post_init__(self) -> None:
        self._check_attack()
        if not isinstance(self.objective, Objective):
            raise InputError(
                f"Expected `objective` to be Madry(), TRADES(), MART() or AWP(...), got "
                f"{self.objective!r}."
            )
        check_chunk_size(self.chunk_size)
        if not 0 <= self.clean_fraction < 1:
            raise InputError(
                f"Expected `clean_fraction` to be in [0, 1), got {self.clean_fraction}."
            )
        if self.clean_fraction and self.objective.pairs:
            raise InputError(
                f"Expected `clean_fraction=0` with {self.objective.name}, got "
                f"{self.clean_fraction}: its loss has a clean part of its own."
            )
        self._check_warmup()
        if isinstance(self.attack, Free) and (self.clean_fraction or self.objective != Madry()):
            raise InputError(
                "Expected objective=Madry() and no clean fraction with Free, got others: it takes "
                "the gradient of the training step itself, on the adversarial batch."
            )
        self.training_attack()  # for its refusals

    def _check_attack(self) -> None:
        attack = self.attack
        if not callable(attack) and not isinstance(attack, Free):
            raise InputError(
                f"Expected `attack` to be an attack such as PGD(Linf(8 / 255)), got {attack!r}."
            )
        if isinstance(attack, type) or not _takes_generator(attack):
            name = getattr(attack, "__qualname__", repr(attack))
            raise InputError(
                "Expected `attack` to be called as attack(model, x, y, generator=..., "
                f"chunk_size=...), got {name}, which is not. If it makes attacks, call it: "
                "fgsm_rs(8 / 255). If it is your own, let it take those."
            )
        if isinstance(attack, PGD) and attack.targeted:
            raise InputError(
                "Expected an untargeted attack to train on, got targeted=True: the batch's targets "
                "are what the model is to learn, not what an attacker wants."
            )

    def _check_warmup(self) -> None:
        warmup = self.warmup_epochs
        if not 0 <= warmup < float("inf"):
            raise InputError(f"Expected the warm-up to be ≥ 0 and finite, got {warmup}.")
        if warmup and radius_of(self.attack) is None:
            raise InputError(
                "Expected an attack with `eps` and `with_eps` to warm up, got "
                f"{self.attack!r}. Leave out the warm-up."
            )

    @property
    def moves_weights(self) -> bool:
        """Whether the gradient is taken at other weights than those that step."""
        return isinstance(self.objective, AWP)

    @property
    def changes_loss(self) -> bool:
        """Whether more happens than that inputs are replaced."""
        return self.objective.pairs or self.moves_weights

    def refuse_beside_privacy(self) -> None:
        """What one record moves must stay within its one clip.

        Raises:
            PrivacyError: for an attack that would let it move more.
        """
        if isinstance(self.attack, Free):
            raise PrivacyError(
                "Expected an attack on each batch anew beside DP-SGD, got Free: its perturbation "
                "is carried on from batch to batch, and takes up the gradients of records without "
                "noise. Take PGD, or fgsm_rs at the cost of Free."
            )
        if getattr(self.attack, "couples_records", False) and self.chunk_size != 1:
            raise PrivacyError(
                "Expected an attack on each record alone beside DP-SGD, got "
                f"{type(self.attack).__name__}, in which records of a chunk move each other. Take "
                "PGD, or chunk_size=1."
            )

    def training_attack(self) -> Attack | Free:
        """The attack, increasing what the objective says; a loss other than "ce" is left alone."""
        attack, objective = self.attack, self.objective
        if not isinstance(attack, PGD) or attack.loss != "ce" or objective.inner_loss == "ce":
            return attack
        start = attack.start_radius
        if start is None and objective.start_radius is not None:
            start = objective.start_radius * _narrowest(attack.inputs)
            start = min(start, attack.ball.eps) or None
        return dataclasses.replace(attack, loss=objective.inner_loss, start_radius=start)


def _takes_generator(attack: Any) -> bool:
    """Whether it can be called with `generator`; True where it does not tell."""
    if isinstance(attack, Free):  # which is never called
        return True
    try:
        parameters = inspect.signature(attack).parameters.values()
    except (TypeError, ValueError):
        return True
    return any(p.name == "generator" or p.kind is p.VAR_KEYWORD for p in parameters)


def radius_of(attack: Any) -> float | None:
    """The radius of an attack, in raw units; None for one whose radius cannot be changed."""
    if isinstance(attack, PGD | Free):
        return attack.ball.eps
    eps = getattr(attack, "eps", None)
    return float(eps) if isinstance(eps, int | float) and hasattr(attack, "with_eps") else None


def _narrowest(inputs: InputSpace) -> float:
    """Width of the box in the channel where it is smallest, of those that may change."""
    low, high = (torch.tensor(v, dtype=torch.float64) for v in (inputs.low, inputs.high))
    widths = (high - low).reshape(-1)
    free = [i for i in range(len(widths)) if len(widths) == 1 or i not in inputs.immutable]
    return float(widths[free].min()) if free else float("inf")
