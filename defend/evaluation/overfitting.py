"""Catastrophic overfitting: the model learns to fool the one-step attack that it is trained on."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from defend.attacks.ascent import Model
from defend.attacks.attack import Attack, TrainingAttack, as_attack
from defend.attacks.context import logits_of, no_trace
from defend.errors import InputError
from defend.evaluation.trend import Reading, RobustnessTrend
from defend.objectives.losses import cross_entropy, in_full_precision, labels_of


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

    attack: Attack | None = None
    _: dataclasses.KW_ONLY
    records: int = 64
    every_n_steps: int = 50
    drop: float = 0.5
    switch: bool = False

    def __post_init__(self) -> None:
        attack = self.attack
        can_probe = isinstance(attack, Attack) and attack.probe() is not None
        if attack is not None and not can_probe:
            raise InputError(f"Expected `attack` to be a PGD or None, got {attack!r}.")
        if attack is not None and attack.targeted:
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

    def watch(self, training_attack: TrainingAttack | Callable[..., Tensor]) -> "OverfittingWatch":
        """Watch a training against `training_attack`.

        Raises:
            InputError: if no stronger attack is known for it, and the alarm has none of its own.
        """
        return OverfittingWatch(self, as_attack(training_attack).watched())


class OverfittingWatch:
    """The alarm over one training.

    Args:
        alarm: its settings.
        watched: what is trained against, as an attack.

    Attributes:
        alarm: its settings.
        attack: the stronger attack, fit to go on training with.
    """

    def __init__(self, alarm: OverfittingAlarm, watched: Attack) -> None:
        self.alarm = alarm
        self.attack = _stronger(watched) if alarm.attack is None else alarm.attack
        self._trend = RobustnessTrend(alarm.drop)
        self._watched = watched
        # After a collapse most records are fooled by the first steps.
        self._probe = self.attack.until_fooled()
        self._labels: dict[int, int] = {}
        self._last_step: int | None = None

    def is_due(self, step: int) -> bool:
        """Whether to look at this step; True only once for each step of several batches."""
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
        single = self._watched(model, x, y, generator=generator)
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
        """What it knows, as plain data; its size does not grow with the number of looks."""
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


def _stronger(watched: Attack) -> Attack:
    """The attack's own probe, PGD-10 where it is a PGD of few steps."""
    probe = watched.probe()
    if probe is None:
        raise InputError(
            f"Expected OverfittingAlarm(attack=PGD(...)) with a training attack of type "
            f"{type(watched.source).__name__}, got attack=None: its ball is not known."
        )
    return probe


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
