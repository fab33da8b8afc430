"""Adversarial training of an unmodified LightningModule."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

import torch

from defend.attacks.attack import TrainingAttack
from defend.attacks.result import GradientCounts, rates
from defend.batching.replay import Replayed
from defend.callbacks import _alarm
from defend.callbacks._base import BuildableAttack, DefendCallback, brief, describe_attack
from defend.callbacks._setup import refuse_warmup_without_an_end
from defend.callbacks._strategy import PatchedStrategy
from defend.callbacks.privacy import DifferentialPrivacy
from defend.errors import InputError, PrivacyError
from defend.evaluation.overfitting import OverfittingAlarm
from defend.objectives import Madry, Objective
from defend.training.adversarial import AdversarialSteps
from defend.training.config import Adversarial, settings_from
from defend.training.stopwatch import Stopwatch

if TYPE_CHECKING:
    import lightning.pytorch as pl


class AdversarialTraining(DefendCallback):
    r"""Train on the worst inputs that an attacker can find: min_θ E[max_δ loss(x + δ, y; θ)].

    The inner maximum is `attack`, run on each training batch just before the step; the outer
    minimum is the user's own `training_step`, which sees the adversarial batch in place of the
    clean one (Madry et al. 2018, arXiv 1706.06083). Other objectives add a term to its loss: a
    second forward of the module, on the other batch, aligned row by row. No line of the module
    changes. Works with automatic optimization, gradient accumulation, mixed precision and DDP; with
    manual optimization where only the inputs change (`Madry`, and not `Free`).

    The attack calls the module's `forward`, which must return logits (or an object with
    `logits`), in eval mode and under the trainer's precision. Its random starts come from a
    generator of its own, seeded from `seed_everything` and kept in the checkpoint, so that a
    resumed run continues as the uninterrupted one would (of `Free` and the alarm, a checkpoint
    keeps what the first process knew). Under `DifferentialPrivacy` they are secret and new at each
    run: were they known, leaving one record out would change the starts of all records after it,
    and with them the clipped sum by more than C.

    Logs, after each epoch, `attack/zero_grad_rate` and `attack/nonfinite_grad_rate` (gradients
    that were of no use), `attack/seconds_share` (of the epoch, spent in attacks) and, while it
    warms up, `attack/eps_share`; with the alarm, `attack/pgd_accuracy` and
    `attack/overfitting`.

    Args:
        attack: what to train against: `PGD(Linf(8 / 255), steps=10)`; cheap ones are `fgsm_rs`,
            `n_fgsm` and `Free`; `TorchAttack` takes one from torchattacks. With `Free`,
            `limit_train_batches` and the like count replays, and batch hooks must not write to
            the batch.
        objective: `Madry()`, `TRADES(beta)`, `MART(beta)`, or `AWP(...)` of these. It says what the
            attack increases, unless the attack has another loss than "ce". With TRADES the
            training step sees the clean batch, with the others the adversarial one; its loss must
            be the mean over the rows. With AWP, hooks between the step and the end of its backward
            (`on_before_zero_grad`, `on_before_backward`) find the weights moved, but for private
            runs, whose forwards and backwards are over by then.
        clean_fraction: part of the records of each batch that stay clean, in [0, 1). With the
            `views` of `DifferentialPrivacy`, part of each record's views.
        warmup_epochs: eps grows linearly from 0 over so many epochs (Pang et al. 2020, arXiv
            2010.00467), step by
            step; epoch by epoch, from eps / warmup_epochs on, where the loader has no length.
        alarm: looks out for catastrophic overfitting, to which one-step attacks are prone: a few
            records are attacked with PGD now and then (`OverfittingAlarm`, which can go on with
            PGD). "auto": where the attack is a PGD of one step and the run is not private. None:
            never.
        input_key: where the inputs are in a batch: a position in a list or tuple, a name in a
            dict, either in a namedtuple or dataclass.
        target_key: likewise for the targets.
        seed: of random starts and of which records stay clean, ≥ 0; None takes that of
            `seed_everything`. Not beside `DifferentialPrivacy`.
        chunk_size: most rows attacked at once. "auto": what fits, or the private chunk under
            `DifferentialPrivacy`. Does not change the result.

    Raises:
        InputError: for settings that do not go together; at the start of `fit`, for a warm-up of
            one epoch or less that has no end in sight; at the first step, if the batch has no
            such fields or its inputs lie outside the attack's `InputSpace`.
        PrivacyError: at the start of `fit`, for what would break the guarantee of
            `DifferentialPrivacy` beside it.
    """

    def __init__(
        self,
        attack: TrainingAttack | BuildableAttack,  # in this order, LightningCLI reads what it wrote
        *,
        objective: Objective = Madry(),
        clean_fraction: float = 0.0,
        warmup_epochs: float = 0,
        alarm: OverfittingAlarm | str | None = "auto",
        input_key: int | str = 0,
        target_key: int | str = 1,
        seed: int | None = None,
        chunk_size: int | str | None = "auto",
    ) -> None:
        super().__init__()
        self._settings: Adversarial = settings_from(Adversarial, locals())
        self._alarm = alarm
        self._stage: str | None = None
        self._begin_training()
        self._forget_last_fit()

    def _begin_training(self) -> None:
        """As new: nothing of a training before, of another model perhaps, goes into the next."""
        self.steps = AdversarialSteps(self._settings)
        self._watch = _alarm.chosen_watch(self._alarm, self.steps.attack)
        self._warned = self._switched = False
        self._seed = self._settings.seed

    def _forget_last_fit(self) -> None:
        self._trainer: pl.Trainer | None = None
        self._stopwatch: Stopwatch | None = None
        self._epoch_start = 0.0

    @property
    def attack(self) -> Any:
        """The attack that is trained against now."""
        self.fetch_state()
        return self.steps.attack.source

    # --- start and end of a fit -------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._stage = stage
        if stage != "fit":
            return
        self.fetch_state(in_copy=True)
        if trainer.global_step == 0:  # a checkpoint comes after this
            self._begin_training()
        callbacks = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
        if any(isinstance(c, DifferentialPrivacy) for c in callbacks):
            self._refuse_beside_privacy()
        patched = PatchedStrategy.of(trainer)
        if patched.adversary not in (None, self):
            raise InputError("Expected one AdversarialTraining callback, got two.")
        patched.adversary = self
        self._trainer = trainer
        if self._seed is None:
            # Read, not drawn: the global RNG stays where it is.
            self._seed = torch.initial_seed() % 2**62

    def _refuse_beside_privacy(self) -> None:
        """What one record moves must stay within its one clip, and is not shown without noise."""
        self._settings.refuse_beside_privacy()
        if isinstance(self._alarm, OverfittingAlarm):
            raise PrivacyError(
                "Expected no alarm beside DifferentialPrivacy, got one: it looks at training "
                "records without noise. Look at validation records, with RobustnessEvaluation."
            )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not pl_module.automatic_optimization and self._settings.joins_the_step:
            raise InputError(
                f"Expected automatic optimization with {self._settings.method}, got a module that "
                "steps by itself: what it does with its loss is not known. Use Madry() with PGD."
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        refuse_warmup_without_an_end(trainer, self._settings.warmup_epochs)
        self._epoch_start = time.perf_counter()  # of an epoch that is taken up in its middle

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._stage = None

    def clean_up(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stage = None
        self.steps.restore_weights()
        self._forget_last_fit()

    # --- one step: `defend.training.step` asks for these ------------------------------------------

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.steps.restore_weights()  # before the module's own hook looks at them

    def replace_loader(self, loader: Any) -> Any:
        """`Free` trains each batch several times in a row."""
        replays = self.steps.attack.replays
        return loader if replays == 1 else Replayed(loader, replays)

    def timed(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """Counts the seconds that attacks take."""
        if self._stopwatch is None:
            self._stopwatch = Stopwatch(device)
        return self._stopwatch

    def generator(self, device: torch.device, *purpose: int) -> torch.Generator:
        """For this batch, rank and purpose: equal on resume, different everywhere else."""
        trainer = self._trainer
        assert trainer is not None
        batches = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        key = hash((self._seed, trainer.global_rank, batches, *purpose)) % 2**62
        return torch.Generator(device=device).manual_seed(key)

    # --- what is logged ---------------------------------------------------------------------------

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._epoch_start, self._stopwatch = time.perf_counter(), None

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Summed over ranks: one that counted nothing must still log what the others log.
        mine = torch.tensor(self.steps.take_counts().to_ints(), device=pl_module.device)
        figures = rates(GradientCounts(*trainer.strategy.reduce(mine, reduce_op="sum").tolist()))
        attacked = 0.0 if self._stopwatch is None else self._stopwatch.read()
        figures["attack/seconds_share"] = attacked / (time.perf_counter() - self._epoch_start)
        if self._settings.warmup_epochs:
            figures["attack/eps_share"] = self.steps.eps_share(trainer.current_epoch + 1)
        for name, value in figures.items():
            pl_module.log(name, value, sync_dist=True, batch_size=1)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        watch = self._watch
        private = PatchedStrategy.of(trainer).privacy is not None
        if watch is None or private or self._switched or not watch.is_due(trainer.global_step):
            return
        x, y = self.steps.inputs_of(batch)
        with self.timed(x.device):
            generator = self.generator(x.device, 1)  # not the numbers of the attack
            alarm = _alarm.look(watch, trainer, pl_module, x, y, generator)
        if not alarm:
            return
        if trainer.is_global_zero and not self._warned:
            _alarm.warn(watch)
            self._warned = True
        self._switch(True)

    def _switch(self, to_alarm: bool) -> None:
        """Go on with the alarm's attack, where that is asked for, or with the training's."""
        watch = self._watch
        if watch is None or not watch.alarm.switch or self._switched == to_alarm:
            return
        self.steps.switch(watch.attack if to_alarm else self._settings.training_attack())
        self._switched = to_alarm

    def settings(self) -> dict[str, Any]:
        settings = self._settings
        facts = {
            "adversarial_training": True,
            **describe_attack(settings.training_attack().source),
            "objective": brief(settings.objective),
            "clean_fraction": settings.clean_fraction or None,
            "warmup_epochs": settings.warmup_epochs or None,
        }
        return {name: value for name, value in facts.items() if value is not None}

    # --- checkpoints, and copies in other processes -----------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        self.fetch_state()
        return {
            "seed": self._seed,
            "switched": self._switched,
            "alarm": None if self._watch is None else self._watch.state_dict(),
            **self.steps.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._stage not in (None, "fit"):
            return  # validation of a checkpoint is no training
        self.receive_state(state_dict)
        self.steps.load_state_dict(state_dict)
        alarm = state_dict.get("alarm")  # older checkpoints have no more than a seed
        if self._watch is not None and alarm is not None:
            self._watch.load_state_dict(alarm)

    def state_to_send(self) -> dict[str, Any]:
        return {"seed": self._seed, "switched": self._switched}

    def receive_state(self, state: dict[str, Any]) -> None:
        if state["seed"] is not None:
            self._seed = state["seed"]
        self._switch(bool(state.get("switched")))
