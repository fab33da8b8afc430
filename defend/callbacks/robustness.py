"""Robust accuracy on the validation data, while training."""

import math
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from defend.attacks.pgd import PGD, Attack
from defend.batching.fields import get_field
from defend.callbacks._base import DefendCallback
from defend.errors import InputError
from defend.evaluation.robustness import (
    RobustnessMeter,
    RobustnessReport,
    check_attacks,
    robustness_curve,
)

# Radii of the robustness curve, in units of the attack's own eps.
_CURVE = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)


class RobustnessEvaluation(DefendCallback):
    """Accuracy clean, under each attack and in the worst case, on the validation data.

    Rides on the Trainer's validation loop: each validation batch is attacked right after the
    module's `validation_step` has seen it, so loaders, devices, precision, processes and the
    progress bar are the Trainer's own. The attacks' random starts are seeded alike each time, so
    that epochs can be compared.

    Logs `robust/clean_accuracy`, `robust/<name>_accuracy` and `robust/worst_case_accuracy` before
    checkpoints are written, so `ModelCheckpoint(monitor="robust/worst_case_accuracy", mode="max")`
    works; with `every_n_epochs` above 1 give the checkpoint the same `every_n_epochs`. Also runs
    in `trainer.validate`.

    Args:
        attacks: attacks by name, for example {"pgd20": PGD(Linf(8 / 255), steps=20)}.
        every_n_epochs: evaluate after every so many epochs, and after the last.
        max_records: evaluate so many validation records at most; None means all.
        curve_records: records for the robustness curve (accuracy by eps, of each ball's PGD with
            the most steps) after training; 0 means no curve.
        input_key: where the inputs are in a batch.
        target_key: where the class indices are.

    Raises:
        InputError: for settings out of range; at the start of `fit`, if there is no validation.

    Attributes:
        report: the latest `RobustnessReport`, or None.
        curves: accuracy by eps for each ball, after training.
    """

    def __init__(
        self,
        attacks: Mapping[str, Attack],
        *,
        every_n_epochs: int = 1,
        max_records: int | None = None,
        curve_records: int = 256,
        input_key: int | str = 0,
        target_key: int | str = 1,
    ) -> None:
        super().__init__()
        check_attacks(attacks)
        if every_n_epochs < 1:
            raise InputError(f"Expected `every_n_epochs` to be ≥ 1, got {every_n_epochs}.")
        if max_records is not None and max_records < 1:
            raise InputError(f"Expected `max_records` to be ≥ 1 or None, got {max_records}.")
        if curve_records < 0:
            raise InputError(f"Expected `curve_records` to be ≥ 0, got {curve_records}.")
        self.attacks = dict(attacks)
        self.every_n_epochs = every_n_epochs
        self.max_records = max_records
        self.curve_records = curve_records
        self.input_key = input_key
        self.target_key = target_key
        self.report: RobustnessReport | None = None
        self.curves: dict[str, dict[float, float]] = {}
        self._meter: RobustnessMeter | None = None
        self._kept: list[tuple[Tensor, Tensor]] = []

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.enable_validation:
            raise InputError(
                "Expected validation data and a `validation_step` to evaluate robustness with, got "
                "none. Add them, or remove RobustnessEvaluation."
            )

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._meter = RobustnessMeter(self.attacks) if self._is_due(trainer) else None
        self._kept = []

    def _is_due(self, trainer: pl.Trainer) -> bool:
        if trainer.sanity_checking:
            return False
        if trainer.state.fn != "fit" or trainer.should_stop:
            return True
        epoch = trainer.current_epoch + 1
        return epoch % self.every_n_epochs == 0 or epoch == trainer.max_epochs

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        meter = self._meter
        if meter is None:
            return
        x, y = get_field(batch, self.input_key), get_field(batch, self.target_key)
        if self.max_records is not None:
            room = math.ceil(self.max_records / trainer.world_size) - meter.records
            if room <= 0:
                return
            x, y = x[:room], y[:room]
        with trainer.precision_plugin.forward_context():
            meter.update(pl_module, x, y)
        missing = self.curve_records - sum(len(kept) for kept, _ in self._kept)
        if missing > 0 and trainer.state.fn == "fit":
            self._kept.append((x[:missing].clone(), y[:missing].clone()))

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._meter is None:
            return
        counts = self._meter.counts.to(pl_module.device, torch.float32)
        self.report = self._meter.report(trainer.strategy.reduce(counts, reduce_op="sum").cpu())
        self._meter = None
        for name, value in self.report.metrics().items():
            # The figures are already those of all processes; sync_dist only confirms them.
            pl_module.log(name, value, prog_bar="worst_case" in name, sync_dist=True, batch_size=1)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero or not self._kept:
            return
        x, y = (torch.cat(parts) for parts in zip(*self._kept, strict=True))
        self._kept = []
        with trainer.precision_plugin.forward_context():
            for ball, attack in self._curve_attacks().items():
                radii = [share * attack.ball.eps for share in _CURVE]
                self.curves[ball] = robustness_curve(pl_module, x, y, attack, radii)

    def _curve_attacks(self) -> dict[str, PGD]:
        chosen: dict[str, PGD] = {}
        for attack in self.attacks.values():
            if isinstance(attack, PGD):
                best = chosen.get(attack.ball.name)
                if best is None or attack.steps > best.steps:
                    chosen[attack.ball.name] = attack
        return chosen

    def settings(self) -> dict[str, Any]:
        return {f"evaluated/{name}": repr(attack) for name, attack in self.attacks.items()}

    def results(self) -> dict[str, Any]:
        facts: dict[str, Any] = {} if self.report is None else self.report.as_dict()
        return {**facts, "curves": self.curves} if self.curves else facts

    def clean_up(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._meter = None
        self._kept = []
