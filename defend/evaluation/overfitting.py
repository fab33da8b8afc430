"""Catastrophic overfitting: the model learns to fool the one-step attack that it is trained on."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from defend.attacks.ascent import Model
from defend.attacks.attack import Attack
from defend.attacks.context import logits_of, no_trace
from defend.attacks.pgd import PGD
from defend.errors import InputError
from defend.objectives.losses import cross_entropy, in_full_precision, labels_of

# Looks are taken together until they hold so many records: the accuracy of fewer is mostly noise.
_ENOUGH = 128
# Standard deviations. The best of a thousand looks is three of them too good by luck alone.
_Z = 3.0


@dataclasses.dataclass(frozen=True)
class Reading:
    """One look at a few training records.

    Attributes:
        pgd_accuracy: share that is right under PGD.
        single_step_accuracy: share that is right under the attack that is trained against.
        single_step_loss: mean cross-entropy under that attack, in nats.
        alarm: whether catastrophic overfitting is seen.
        records: records looked at.
        chance: share of the most frequent class among all records looked at so far: what a
            constant answer gets right, whatever the attack.
    """

    pgd_accuracy: float
    single_step_accuracy: float
    single_step_loss: float
    alarm: bool
    records: int
    chance: float


@dataclasses.dataclass(frozen=True)
class OverfittingAlarm:
    """Watches a training against a cheap attack for catastrophic overfitting.

    Trained against one gradient step, a model may bend its loss so that this one step fails, while
    its true robustness falls to nothing within a few hundred steps (Wong, Rice & Kolter 2020,
    arXiv 2001.03994; Andriushchenko & Flammarion 2020, arXiv 2007.02617). The training loss
    does not show it: it falls. So a few training records are attacked with PGD now and then; see
    `RobustnessTrend` for when the alarm goes off.

    Args:
        attack: the stronger attack; None means PGD-10 in the ball of the training's attack. The
            ball of `n_fgsm` is wider than its ε by design; PGD then takes the ε. Pass an attack
            where you train in a wider ball than you defend in some other way.
        records: of the batch at hand to look at, ≥ 1.
        every_n_steps: a look each so many steps, ≥ 1. At the defaults, and batches of 128, looks
            cost at most 5% of FGSM training, and less where PGD fools the model soon.
        drop: goes off where PGD accuracy is below `drop` · its best; in (0, 1).
        switch: whether training goes on with PGD after the alarm.

    Raises:
        InputError: for settings out of range, or a targeted attack.
    """

    attack: PGD | None = None
    _: dataclasses.KW_ONLY
    records: int = 64
    every_n_steps: int = 50
    drop: float = 0.5
    switch: bool = False

    def __post_init__(self) -> None:
        if self.attack is not None and not isinstance(self.attack, PGD):
            raise InputError(f"Expected `attack` to be a PGD or None, got {self.attack!r}.")
        if self.attack is not None and self.attack.targeted:
            raise InputError(
                "Expected an untargeted `attack`, got targeted=True: accuracy is of the true "
                "classes. Use targeted=False."
            )
        for name in ("records", "every_n_steps"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"Expected `{name}` to be an integer ≥ 1, got {value!r}.")
        if not 0 < self.drop < 1:
            raise InputError(f"Expected `drop` to be between 0 and 1, got {self.drop}.")

    def watch(self, training_attack: Attack) -> "OverfittingWatch":
        """Watch a training against `training_attack`.

        Raises:
            InputError: if it is no PGD, and the alarm has no attack of its own.
        """
        return OverfittingWatch(self, training_attack)


class OverfittingWatch:
    """The alarm over one training.

    Args:
        alarm: its settings.
        training_attack: what is trained against.

    Attributes:
        alarm: its settings.
        attack: the stronger attack, fit to go on training with.
    """

    def __init__(self, alarm: OverfittingAlarm, training_attack: Attack) -> None:
        self.alarm = alarm
        self.attack = _stronger(training_attack) if alarm.attack is None else alarm.attack
        self._trend = RobustnessTrend(alarm.drop)
        self._training_attack = training_attack
        # A record once fooled needs no more steps, and after a collapse most of them are.
        self._probe = dataclasses.replace(self.attack.for_evaluation(), stop_when_fooled=True)
        self._labels: dict[int, int] = {}
        self._last_step: int | None = None

    def is_due(self, step: int) -> bool:
        """Whether to look at this step. True once a step, however many batches make one."""
        if step % self.alarm.every_n_steps or step == self._last_step:
            return False
        self._last_step = step
        return True

    def look(
        self, model: Model, x: Tensor, y: Tensor, generator: torch.Generator | None = None
    ) -> Reading:
        """Look at the first records of a batch: in eval mode, and without a trace (`no_trace`).

        Args:
            model: gives logits `[N, classes]`.
            x: clean inputs `[N, ...]`, in model units.
            y: class indices `[N]`, or class probabilities `[N, classes]`.
            generator: source of the random starts; None draws from fresh OS entropy.

        Returns:
            What was seen.

        Raises:
            InputError: if the batch is empty, or the model is no classifier.
        """
        if len(x) == 0:
            raise InputError("Expected at least one record to look at, got none.")
        x, y = x[: self.alarm.records], y[: self.alarm.records]
        single = self._training_attack(model, x, y, generator=generator)
        strong = self._probe(model, x, y, generator=generator)
        single_right, single_loss = _judge(model, single, y)
        reading = Reading(
            pgd_accuracy=_judge(model, strong, y)[0],
            single_step_accuracy=single_right,
            single_step_loss=single_loss,
            alarm=False,
            records=len(x),
            chance=self._chance(y),
        )
        return dataclasses.replace(reading, alarm=self._trend.add(reading))

    def _chance(self, y: Tensor) -> float:
        """Share of the most frequent class so far, the records of y included."""
        for label in labels_of(y).tolist():
            self._labels[label] = self._labels.get(label, 0) + 1
        return max(self._labels.values()) / sum(self._labels.values())

    def state_dict(self) -> dict[str, Any]:
        """What it knows, as plain data: as much after many looks as after a few."""
        return {
            "trend": self._trend.state_dict(),
            "labels": [list(pair) for pair in self._labels.items()],
            "last_step": self._last_step,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state."""
        self._trend.load_state_dict(state_dict["trend"])
        self._labels = dict(state_dict["labels"])
        self._last_step = state_dict["last_step"]


class RobustnessTrend:
    r"""Whether catastrophic overfitting shows, reading by reading.

    Looks are taken together until they hold 128 records; p is their PGD accuracy, L their mean
    single-step loss, and [p⁻, p⁺] the Wilson interval of p at z = 3. With "best" the looks of
    highest p⁻ so far, it does if

        p⁺_now < drop · p⁻_best,    p⁻_best > chance    and    L_now < L_best

    - The first, and not p_now < drop · p_best, because the best of many noisy readings is best by
      luck. Were robustness constant, noise would set it off about once in 10⁷ looks at drop = 0.5,
      and once in 10³ at 0.9. A fall to 0% is seen from a best of 23% on.
    - The second, because at first a model answers one class to everything, which no attack
      changes. It is right on that class's share of the records, and loses this "robustness" as it
      learns.
    - The third, because a training that diverges loses robustness too, but its loss rises. Where
      robustness falls while the training's own loss falls, the model fools the attack.

    Only the best and the last readings are kept, so that a look costs the same after a million.

    Args:
        drop: in (0, 1).
    """

    def __init__(self, drop: float) -> None:
        self._drop = drop
        self._recent: list[Reading] = []
        self._best: _Looks | None = None

    def add(self, reading: Reading) -> bool:
        """Take up the next reading.

        Returns:
            Whether overfitting shows in it; False where there are too few records so far, or a
            loss is not finite.
        """
        self._recent.append(reading)
        while sum(r.records for r in self._recent[1:]) >= _ENOUGH:
            del self._recent[0]
        now = _together(self._recent)
        if now is None:
            return False
        if self._best is None or now.lower > self._best.lower:
            self._best = now
        best = self._best
        lost = now.upper < self._drop * best.lower
        return lost and best.lower > reading.chance and now.loss < best.loss

    def state_dict(self) -> dict[str, Any]:
        """What it keeps, as plain data."""
        return {
            "recent": [dataclasses.asdict(reading) for reading in self._recent],
            "best": None if self._best is None else dataclasses.asdict(self._best),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state."""
        best = state_dict["best"]
        self._recent = [Reading(**reading) for reading in state_dict["recent"]]
        self._best = None if best is None else _Looks(**best)


@dataclasses.dataclass(frozen=True)
class _Looks:
    """Some readings in a row, taken together."""

    lower: float
    upper: float
    loss: float


def _together(readings: Sequence[Reading]) -> _Looks | None:
    """The readings as one; None if they hold too few records."""
    records = sum(r.records for r in readings)
    if records < _ENOUGH:
        return None
    right = sum(r.records * r.pgd_accuracy for r in readings)
    loss = sum(r.records * r.single_step_loss for r in readings)
    return _Looks(*wilson(right / records, records, _Z), loss / records)


def wilson(share: float, n: int, z: float) -> tuple[float, float]:
    """The probabilities p that a share seen in n trials is within z deviations of (Wilson 1927).

    The two solutions of |share − p| = z · √(p(1 − p)/n). Unlike share ± z · √(share(1 − share)/n),
    not a point where the share is 0 or 1.

    Args:
        share: in [0, 1].
        n: trials, ≥ 1.
        z: > 0.

    Returns:
        (lower, upper), both in [0, 1].
    """
    extra = z * z / n
    centre = share + extra / 2
    half = math.sqrt(extra * (share * (1 - share) + extra / 4))
    return max(0.0, (centre - half) / (1 + extra)), min(1.0, (centre + half) / (1 + extra))


def _stronger(training: Attack) -> PGD:
    """PGD-10 where the training's attack is one of few steps."""
    if not isinstance(training, PGD):
        raise InputError(
            f"Expected OverfittingAlarm(attack=PGD(...)) with a training attack of type "
            f"{type(training).__name__}, got attack=None: its ball is not known."
        )
    eps, start, step = training.ball.eps, training.start_radius, training.step_size
    if training.steps == 1 and start and step and math.isclose(start + step, eps):
        eps = step  # N-FGSM: noise outside ε, one step of ε, and a ball that holds both
    return dataclasses.replace(
        training,
        ball=training.ball.with_eps(eps),
        steps=10,
        step_size=None,
        random_start=True,
        start_radius=None,
        restarts=1,
        iterate=None,
        stop_when_fooled=False,
    )


def _judge(model: Model, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Accuracy and mean cross-entropy."""
    with no_trace(model, x.device), torch.no_grad():
        logits = in_full_precision(logits_of(model(x)))
    if logits.ndim != 2 or labels_of(y).ndim != 1:
        raise InputError(
            "Expected logits of shape [N, classes] and class indices of shape [N], got "
            f"{tuple(logits.shape)} and {tuple(y.shape)}. Only classifiers overfit in this way; "
            "switch the alarm off."
        )
    # argmax of NaN is class 0: a model that has diverged would be right about it.
    right = (logits.argmax(1) == labels_of(y)) & logits.isfinite().all(1)
    return right.double().mean().item(), cross_entropy(logits, y).double().mean().item()
