"""The alarm for catastrophic overfitting, on a Trainer."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from defend.attacks.attack import as_attack
from defend.errors import InputError
from defend.evaluation.overfitting import OverfittingAlarm, OverfittingWatch

if TYPE_CHECKING:
    import lightning.pytorch as pl


def chosen_watch(alarm: OverfittingAlarm | str | None, attack: Any) -> OverfittingWatch | None:
    """The watch over a training against `attack`, or None for no watch.

    Args:
        alarm: its settings; "auto" watches a PGD of one step; None watches nothing.
        attack: what is trained against.

    Raises:
        InputError: for another `alarm`, or one that cannot watch or switch this attack.
    """
    training_attack = as_attack(attack)
    if alarm == "auto":
        return OverfittingAlarm().watch(training_attack) if training_attack.is_one_step else None
    if alarm is None:
        return None
    if not isinstance(alarm, OverfittingAlarm):
        raise InputError(
            f"Expected `alarm` to be 'auto', None or an OverfittingAlarm, got {alarm!r}."
        )
    if alarm.switch and training_attack.uses_training_gradient:
        raise InputError(
            "Expected an alarm with switch=False with Free, got switch=True: its batches are "
            "replayed, and PGD would train on each several times. Stop, and go on with PGD."
        )
    return alarm.watch(training_attack)


def look(
    watch: OverfittingWatch,
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    x: Tensor,
    y: Tensor,
    generator: torch.Generator,
) -> bool:
    """One look at a batch. Each process looks at its own records.

    The figures are the means over processes, and go to loggers at once: `self.log` keeps a value
    for the next step that is logged, which may be in another epoch, where it is forgotten.

    Returns:
        Whether the alarm went off in any process, so that all of them go on alike.
    """
    with trainer.precision_plugin.forward_context():
        reading = watch.look(pl_module, x, y, generator)
    seen = torch.tensor([reading.pgd_accuracy, float(reading.alarm)], device=pl_module.device)
    accuracy, alarms = (
        trainer.strategy.reduce(seen, reduce_op="sum") / trainer.world_size
    ).tolist()
    figures = {"attack/pgd_accuracy": accuracy, "attack/overfitting": float(alarms > 0)}
    for logger in trainer.loggers:
        logger.log_metrics(figures, step=trainer.global_step)
    for name, value in figures.items():
        pl_module.log(name, value, logger=False, batch_size=1)
    return alarms > 0


def warn(watch: OverfittingWatch) -> None:
    """Say that the alarm went off, and what to do."""
    done = "training goes on with PGD" if watch.alarm.switch else "training goes on as it was"
    warnings.warn(
        "Catastrophic overfitting: the model withstands the cheap attack that it is trained on and "
        f"falls to PGD; {done}. Take more steps, a smaller eps, n_fgsm, or "
        "alarm=OverfittingAlarm(switch=True).",
        stacklevel=2,
    )
