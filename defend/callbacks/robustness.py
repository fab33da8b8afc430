"""Robust accuracy on the validation data, while training."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from defend.attacks.attack import as_attack
from defend.batching.chunks import check_chunk_size
from defend.batching.fields import get_field
from defend.callbacks._base import BuildableAttack, DefendCallback, brief
from defend.errors import InputError
from defend.evaluation.answers import check_attacks
from defend.evaluation.curve import curve_of_batches
from defend.evaluation.robustness import RobustnessMeter, RobustnessReport

if TYPE_CHECKING:
    import lightning.pytorch as pl

# Radii of the robustness curve, in units of the attack's own eps.
_CURVE = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)


@dataclasses.dataclass
class _Evaluation:
    """The latest evaluation, with the step and a digest of the weights that it was at."""

    report: RobustnessReport | None = None
    step: int = -1
    weights: str | None = None


class RobustnessEvaluation(DefendCallback):
    """Accuracy clean, under each attack and in the worst case, on the validation data.

    Rides on the Trainer's validation loop: each validation batch is attacked right after the
    module's `validation_step` has seen it, so loaders, devices, precision, processes and the
    progress bar are the Trainer's own. The attacks' random starts are seeded alike each time, so
    that epochs can be compared.

    Logs `robust/clean_accuracy`, `robust/<name>_accuracy` and `robust/worst_case_accuracy` before
    checkpoints are written, so `ModelCheckpoint(monitor="robust/worst_case_accuracy", mode="max")`
    works; with `every_n_epochs` above 1 give the checkpoint the same `every_n_epochs`. Also runs
    in `trainer.validate`. For PGD, which returns the best iterate of each record here, it logs
    `robust/<name>_zero_grad_rate` too: the share of input gradients that were zero or not finite,
    far from 0 where gradients are masked.

    Several validation loaders are counted together. Over several processes Lightning repeats a few
    records to make the shares equal, and they are counted as it hands them out.

    Args:
        attacks: attacks by name, for example {"pgd20": PGD(Linf(8 / 255), steps=20)}.
        every_n_epochs: evaluate after every so many epochs, and after the last that the Trainer
            plans. Whatever monitors `robust/…` must look as often (EarlyStopping: strict=False).
            Where training ends between two evaluations, or other weights are put in place at its
            end (averaged ones, say), a warning says so and the card names the step that was
            measured.
        max_records: evaluate so many validation records at most, rounded up to equal shares of
            all processes; None means all.
        curve_records: records for the robustness curve (accuracy by eps, of each ball's PGD with
            the most steps) of the final weights; 0 means no curve.
        input_key: where the inputs are in a batch.
        target_key: where the class indices are.
        chunk_size: most rows attacked at once. "auto": what fits for PGD, whole batches for other
            attacks.

    Raises:
        InputError: for settings out of range and targeted attacks; at the start of `fit`, if there
            is no validation.
    """

    def __init__(
        self,
        attacks: Mapping[str, BuildableAttack],
        *,
        every_n_epochs: int = 1,
        max_records: int | None = None,
        curve_records: int = 256,
        input_key: int | str = 0,
        target_key: int | str = 1,
        chunk_size: int | str | None = "auto",
    ) -> None:
        super().__init__()
        check_attacks(attacks)
        check_chunk_size(chunk_size)
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
        self.chunk_size = chunk_size
        self._latest = _Evaluation()
        self._curves: dict[str, dict[float, float]] = {}
        self._meter: RobustnessMeter | None = None
        self._kept: list[tuple[Tensor, Tensor]] = []

    @property
    def report(self) -> RobustnessReport | None:
        """The latest report, or None before the first evaluation."""
        self.fetch_state()
        return self._latest.report

    @property
    def curves(self) -> dict[str, dict[float, float]]:
        """Accuracy by eps for each ball, after training."""
        self.fetch_state()
        return self._curves

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.enable_validation:
            raise InputError(
                "Expected validation data and a `validation_step` to evaluate robustness with, got "
                "none. Add them, or remove RobustnessEvaluation."
            )

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._meter, self._kept = None, []
        if self._is_due(trainer):
            self._meter = RobustnessMeter(self.attacks, chunk_size=self.chunk_size)

    def _is_due(self, trainer: pl.Trainer) -> bool:
        if trainer.sanity_checking:
            return False
        if trainer.state.fn != "fit" or trainer.should_stop:
            return True
        epoch = trainer.current_epoch + 1
        last = epoch == trainer.max_epochs or trainer.global_step == trainer.max_steps
        return last or epoch % self.every_n_epochs == 0

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
        if meter.batches == 0 and trainer.is_global_zero:
            # Here, not at the end of the epoch: callbacks that validate averaged weights may have
            # put the others back by then.
            self._latest.weights = _digest(pl_module)
        with trainer.precision_plugin.forward_context():
            meter.update(pl_module, x, y)
        missing = self.curve_records - sum(len(kept) for kept, _ in self._kept)
        if missing > 0 and trainer.state.fn == "fit":
            with torch.inference_mode(False):  # they are attacked outside of it
                self._kept.append((x[:missing].clone(), y[:missing].clone()))

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        meter = self._meter
        if meter is None:
            return
        mine = meter.counts.to_tensor(pl_module.device)
        total = trainer.strategy.reduce(mine, reduce_op="sum")
        report = meter.report(meter.counts.from_tensor(total))
        self._latest.report, self._latest.step = report, trainer.global_step
        self._meter = None
        for name, value in report.metrics().items():
            # The figures are already those of all processes; sync_dist only confirms them.
            pl_module.log(name, value, prog_bar="worst_case" in name, sync_dist=True, batch_size=1)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Not on_train_end: there callbacks further down the list still put averaged weights in
        # place. And before the evidence is written, which has the curve.
        if trainer.is_global_zero:
            if self._latest.weights != _digest(pl_module):
                warnings.warn(
                    f"Training ended at step {trainer.global_step} without a robustness evaluation "
                    f"of the final weights; the last one was at step {max(self._latest.step, 0)}, "
                    "and the weights have changed since. Run trainer.validate, or set "
                    "every_n_epochs=1.",
                    stacklevel=2,
                )
            self._measure_curves(trainer, pl_module)
        super().on_fit_end(trainer, pl_module)

    def _measure_curves(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        batches, self._kept = self._kept, []
        if not batches:
            return
        home = pl_module.device  # by now the strategy has moved it to the CPU
        pl_module.to(batches[0][0].device)
        try:
            with trainer.precision_plugin.forward_context():
                for ball, attack in self._curve_attacks().items():
                    radii = [share * attack.radius for share in _CURVE]
                    self._curves[ball] = curve_of_batches(
                        pl_module, batches, attack, radii, chunk_size=self.chunk_size
                    )
        finally:
            pl_module.to(home)

    def _curve_attacks(self) -> dict[str, Any]:
        """For each norm, the attack of the most steps."""
        chosen: dict[str, Any] = {}
        attacks: list[Any] = [as_attack(attack) for attack in self.attacks.values()]
        for attack in attacks:
            if attack.ball is not None and attack.radius is not None and attack.steps:
                best = chosen.get(attack.ball.name)
                if best is None or attack.steps > best.steps:
                    chosen[attack.ball.name] = attack
        return chosen

    def settings(self) -> dict[str, Any]:
        return {f"evaluated/{name}": brief(attack) for name, attack in self.attacks.items()}

    def results(self) -> dict[str, Any]:
        facts: dict[str, Any] = {}
        if self._latest.report is not None:
            facts = {**self._latest.report.as_dict(), "measured_at_step": self._latest.step}
        return {**facts, "curves": self._curves} if self._curves else facts

    def state_to_send(self) -> dict[str, Any]:
        curves = {ball: list(curve.items()) for ball, curve in self._curves.items()}
        return {"latest": dataclasses.asdict(self._latest), "curves": curves}

    def receive_state(self, state: dict[str, Any]) -> None:
        latest = state["latest"]
        report = latest["report"] and RobustnessReport(**latest["report"])
        self._latest = _Evaluation(**{**latest, "report": report})
        self._curves = {ball: dict(map(tuple, c)) for ball, c in state["curves"].items()}

    def clean_up(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._meter = None
        self._kept = []


def _digest(module: nn.Module) -> str:
    """SHA-256 of the weights and buffers, on whatever device.

    Their content, since versions and addresses say nothing here: what is written through `.data`
    counts up no version, and moving to another device changes every address.
    """
    sha = hashlib.sha256()
    for tensor in itertools.chain(module.parameters(), module.buffers()):
        if tensor.layout is torch.strided and not tensor.is_quantized:
            plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
            sha.update(plain.flatten().view(torch.uint8).numpy().data)
    return sha.hexdigest()
