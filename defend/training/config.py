"""What a user asks for: `Privacy` and `Adversarial`, checked once, for every kind of loop."""

import dataclasses
import inspect
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from defend.attacks.attack import TrainingAttack, as_attack
from defend.batching.chunks import check_chunk_size
from defend.errors import InputError, PrivacyError
from defend.objectives import AWP, Madry, Objective
from defend.privacy.accounting.budget import Budget
from defend.privacy.mechanism.clipping import Clipping, FlatClipping, check_clipping
from defend.privacy.mechanism.randomness import Randomness
from defend.privacy.mechanism.schedules import Schedule

ENGINES = ("auto", "hooks", "record")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Execution:
    """What changes speed and memory, and neither ε nor what is trained.

    Args:
        chunk_size: most rows in one forward and backward. "auto": what fits into the GPU's memory,
            measured. None: all rows at once.
    """

    chunk_size: int | str | None = "auto"

    def __post_init__(self) -> None:
        check_chunk_size(self.chunk_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Privacy(Execution):
    """Settings of DP-SGD. `DifferentialPrivacy` says what each of them means.

    With `data_id` you promise that equal names are equal data, and that data under other names
    share no record.

    Raises:
        InputError: for settings out of range.
    """

    delta: float
    max_grad_norm: float
    engine: str = "auto"
    target_epsilon: float | None = None
    noise_multiplier: float | None = None
    accountant: str = "prv"
    clipping: Clipping = FlatClipping()
    views: int = 1
    noise_schedule: Schedule | None = None
    clip_schedule: Schedule | None = None
    ledger: str | Path | bool | None = None
    data_id: str | None = None
    selftest: bool = True
    secure_noise: bool = False
    insecure_seed: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.budget()
        if not 0 < self.max_grad_norm < math.inf:
            raise InputError(
                f"Expected `max_grad_norm` to be > 0 and finite, got {self.max_grad_norm}."
            )
        if self.engine not in ENGINES:
            raise InputError(f"Expected `engine` to be one of {ENGINES}, got {self.engine!r}.")
        check_clipping(self.clipping)
        if not isinstance(self.views, int) or isinstance(self.views, bool) or self.views < 1:
            raise InputError(
                f"Expected `views` to be an integer ≥ 1, got {self.views!r}. It is the number of "
                "rows of each record whose gradients are averaged before the clip."
            )
        self._check_schedules()
        if self.ledger is True:
            raise InputError(
                "Expected `ledger` to be None (in the default place), a path, or False (none), "
                "got True."
            )
        if self.data_id is not None and not (isinstance(self.data_id, str) and self.data_id):
            raise InputError(
                f"Expected `data_id` to be a name of the data set, got {self.data_id!r}. Leave it "
                "out to have the data told by their content."
            )
        # Refuses a bad seed, and a secure generator that is not installed.
        Randomness(self.insecure_seed, secure=self.secure_noise)

    def _check_schedules(self) -> None:
        for name in ("noise_schedule", "clip_schedule"):
            schedule = getattr(self, name)
            if schedule is not None and not callable(schedule):
                raise InputError(
                    f"Expected `{name}` to be a function of the step, such as Decay(0.99), got "
                    f"{schedule!r}."
                )
        if self.clip_schedule is not None and self.clipping.learns:
            raise InputError(
                "Expected `clip_schedule` or AdaptiveClipping, got both: each of them sets C. "
                "Drop one."
            )

    def budget(self) -> Budget:
        """A new, empty account for these settings."""
        return Budget(
            delta=self.delta,
            target_epsilon=self.target_epsilon,
            noise_multiplier=self.noise_multiplier,
            accountant=self.accountant,
            insecure=self.insecure_seed is not None,
            noise_schedule=self.noise_schedule,
        )


@dataclasses.dataclass(frozen=True)
class Adversarial(Execution):
    """Settings of adversarial training. `AdversarialTraining` says what each of them means.

    Raises:
        InputError: for settings out of range, or that do not go together.
    """

    attack: Any
    _: dataclasses.KW_ONLY
    objective: Objective = dataclasses.field(default_factory=Madry)
    clean_fraction: float = 0.0
    warmup_epochs: float = 0
    input_key: int | str = 0
    target_key: int | str = 1
    seed: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_attack()
        if not isinstance(self.objective, Objective):
            raise InputError(
                f"Expected `objective` to be Madry(), TRADES(), MART() or AWP(...), got "
                f"{self.objective!r}."
            )
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
        if self.seed is not None and (not isinstance(self.seed, int) or self.seed < 0):
            raise InputError(f"Expected `seed` to be an integer ≥ 0 or None, got {self.seed!r}.")
        if self.given_attack.uses_training_gradient and (
            self.clean_fraction or self.objective != Madry()
        ):
            raise InputError(
                "Expected objective=Madry() and no clean fraction with Free, got others: it takes "
                "the gradient of the training step itself, on the adversarial batch."
            )
        self.training_attack()  # for its refusals

    def _check_attack(self) -> None:
        attack = self.attack
        if not callable(attack) and not isinstance(attack, TrainingAttack):
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
        if isinstance(attack, TrainingAttack) and attack.targeted:
            raise InputError(
                "Expected an untargeted attack to train on, got targeted=True: the batch's targets "
                "are what the model is to learn, not what an attacker wants."
            )

    def _check_warmup(self) -> None:
        warmup = self.warmup_epochs
        if not 0 <= warmup < float("inf"):
            raise InputError(f"Expected the warm-up to be ≥ 0 and finite, got {warmup}.")
        if warmup and self.given_attack.radius is None:
            raise InputError(
                "Expected an attack with `eps` and `with_eps` to warm up, got "
                f"{self.attack!r}. Leave out the warm-up."
            )

    @property
    def given_attack(self) -> TrainingAttack:
        """The attack as it was given; a function of the user's own in the form of ours."""
        return as_attack(self.attack)

    def training_attack(self) -> TrainingAttack:
        """The attack, increasing what the objective says; a loss other than "ce" is left alone."""
        return self.given_attack.increasing(self.objective.inner_loss, self.objective.start_radius)

    @property
    def method(self) -> str:
        """What training is called in messages: the objective, or the attack that replaces it."""
        attack = self.given_attack
        return type(attack).__name__ if attack.uses_training_gradient else self.objective.name

    @property
    def moves_weights(self) -> bool:
        """Whether the gradient is taken at other weights than those that step."""
        return isinstance(self.objective, AWP)

    @property
    def joins_the_step(self) -> bool:
        """Whether it takes part in the training step, beyond the batch that the step sees."""
        pairs = self.objective.pairs or self.moves_weights
        return pairs or self.given_attack.uses_training_gradient

    def refuse_beside_privacy(self) -> None:
        """What one record moves must stay within its one clip.

        Raises:
            PrivacyError: for an attack that would let it move more.
        """
        attack = self.given_attack
        if self.seed is not None:
            raise PrivacyError(
                f"Expected no `seed` of adversarial training beside DP-SGD, got {self.seed}: "
                "random starts are secret there, and new at each run. Leave it out."
            )
        if attack.begin() is not attack:
            raise PrivacyError(
                "Expected an attack on each batch anew beside DP-SGD, got "
                f"{type(self.attack).__name__}: its perturbation is carried on from batch to "
                "batch, and takes up the gradients of records without noise. Take PGD, or fgsm_rs "
                "at the cost of Free."
            )
        if attack.couples_records and self.chunk_size != 1:
            raise PrivacyError(
                "Expected an attack on each record alone beside DP-SGD, got "
                f"{type(self.attack).__name__}, in which records of a chunk move each other. Take "
                "PGD, or chunk_size=1."
            )


def _takes_generator(attack: Any) -> bool:
    """Whether it can be called with `generator`; True where it does not tell."""
    if isinstance(attack, TrainingAttack):
        return True
    try:
        parameters = inspect.signature(attack).parameters.values()
    except (TypeError, ValueError):
        return True
    return any(p.name == "generator" or p.kind is p.VAR_KEYWORD for p in parameters)


def settings_from(kind: type[Any], arguments: Mapping[str, Any]) -> Any:
    """The dataclass `kind`, each field from the argument of the same name.

    For callbacks, whose flat arguments a command line builds from YAML.
    """
    return kind(**{f.name: arguments[f.name] for f in dataclasses.fields(kind)})


def check_adversarial(adversarial: object) -> None:
    """Refuse anything but settings, such as an attack by itself."""
    if not isinstance(adversarial, Adversarial):
        raise InputError(
            "Expected `adversarial` to be Adversarial(PGD(...), objective=...), got "
            f"{adversarial!r}. Wrap it."
        )


def check_state(state: Mapping[str, Any] | None, names: set[str]) -> None:
    """Refuse a state of a loop that its `state_dict` did not give."""
    if state is not None and set(state) != names:
        raise InputError(
            f"Expected a `state` that `state_dict` gave, got one of {sorted(state)}. Pass it as it "
            "was saved."
        )
