"""DP-SGD for an unmodified LightningModule: a thin shell over `defend.training`."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from defend.callbacks._base import DefendCallback
from defend.callbacks._guarded_hooks import GuardedHooks
from defend.callbacks._runtime import TrainerRuntime
from defend.callbacks._setup import (
    explain_missing_gradients,
    is_last_of_epoch,
    refuse_steering,
    trainer_facts,
)
from defend.callbacks._strategy import PatchedStrategy
from defend.errors import InputError, PrivacyError
from defend.privacy.accounting.known_weights import tensors_in
from defend.privacy.checks.dry_run import DryRun
from defend.privacy.checks.preconditions import Setup, check
from defend.privacy.mechanism.clipping import Clipping, FlatClipping
from defend.privacy.mechanism.schedules import Schedule
from defend.training.config import Privacy, settings_from
from defend.training.dry_run_step import step_under_test
from defend.training.private import PrivateFit, PrivateTraining
from defend.training.private_data import PrivateData
from defend.training.processes import Processes
from defend.training.reporting import PrivacyReport

if TYPE_CHECKING:
    import lightning.pytorch as pl

EPSILON = "privacy/epsilon"
LEDGERS = "privacy_ledgers"
RELEASES = ("tag", "withhold")


class DifferentialPrivacy(PrivacyReport, DefendCallback):
    r"""Train with DP-SGD (Abadi et al. 2016, arXiv 1607.00133).

    Each step, on a Poisson-sampled batch S (every record joins with probability q):

        ∇ = ( Σ_{i ∈ S} gᵢ · min(1, C / ‖gᵢ‖₂) + N(0, (σC)² I) ) / (q · N)

    gᵢ being the gradient of record i's loss. The user's loader keeps its data set, workers and
    collate function, but its batches are drawn by Poisson sampling; its `batch_size` becomes the
    *expected* batch size q · N (over all processes), and an epoch has as many steps as before.
    The optimizer, its schedulers and the module stay the user's own.

    Give `target_epsilon` to have σ found for the steps that the Trainer plans, or
    `noise_multiplier` to set σ; with both, training stops before the step that would exceed the
    target.

    The global RNGs of torch, numpy and Python, and generators that data set, module and callbacks
    keep, are started from OS entropy before each batch and each forward, since dropout masks and
    augmentations must not be known either, and put back after the fit; so a private run does not
    repeat, whoever calls `seed_everything`.

    *Guarantee.* After training, the weights are (`epsilon`, δ)-DP for adding or removing one
    record; `defend.privacy` says what is and is not covered. What would break it in silence is
    refused before the first step: set-ups by a table (`defend.privacy.checks.preconditions`), and
    what the module's forward and loss do by a self-test on a copy of it and a few records. The loss
    has to be the plain mean over rows of what each row alone gives, unless `engine` is "record".

    Every step is written to a ledger on disk before it is taken, so that ε survives a crash, and a
    rollback to an older checkpoint does not refund it. A resume finds its ledger by the checkpoint.

    Logs `privacy/epsilon` at each step: what was spent, or a tight upper bound on it.

    This callback moves to the front of the Trainer's list. Hooks that run after a backward find no
    gradient (`p.grad` is None); from `on_before_optimizer_step` on they find the noised one.

    Args:
        delta: δ in (0, 1), well below 1 / number of records.
        max_grad_norm: C > 0, the L2 norm that each record's gradient is clipped to.
        target_epsilon: ε > 0 that is not exceeded, or None.
        noise_multiplier: σ ≥ 0, the noise's standard deviation in units of C, or None.
        accountant: "prv" (tight) or "rdp".
        chunk_size: most rows in one forward and backward; larger batches are split, with the same
            result. "auto": what fits into the GPU's memory, measured; 256 rows on the CPU. None:
            not split. A chunk that runs out of memory is halved; the views of a record stay
            together. One record at a time is a chunk of its own, whatever this is.
        clipping: `FlatClipping()`, `PerLayerClipping()`, or `AdaptiveClipping(...)`, for which
            `max_grad_norm` is where C starts.
        views: rows of each record, K ≥ 1 (augmentation multiplicity, De et al. 2022, arXiv
            2204.13650). The data set is asked for each sampled record K times, so that it may
            augment it anew each time; batch hooks and attacks see K rows. The mean of their
            gradients is gᵢ, and is clipped once: K costs time, not ε.
        noise_schedule: step → factor on σ, such as `Decay(0.999)`; accounted step by step.
        clip_schedule: step → factor on C.
        ledger: a path; None: `privacy_ledgers/` under the Trainer's `default_root_dir`, under a
            name that checkpoints know; False: none, so ε holds only what checkpoints know. Where
            the model's weights are known from a training on the same data, the ledger of that
            training goes on, and ε is that of both (`docs/one_account.md`).
        data_id: a name for the training data, to tell whether two runs are on the same; None: they
            are told by their content where that is found (`defend.privacy.data_digest`). You
            promise that equal names are equal data, and other names data that share no record.
        selftest: False leaves the self-test out; you then answer for the step yourself.
        engine: "hooks" takes the gradients of all records of a chunk from one backward; "record"
            runs the step on each record alone, in a batch of its own, which is right for any layer,
            relies least on the self-test, and costs a forward and backward a record. What the
            records of a batch do to each other in the loss falls away there. "auto" is "hooks",
            and "record" for a module whose rows cannot be told apart; a loss that couples records
            is refused then, not taken apart. A log line says so.
        secure_noise: noise and sampling from ChaCha20 with Gaussians guarded against floating-point
            attacks; slower, and needs the extra `secure`.
        release: "tag" names un-noised training metrics (a logged loss) as such in the run;
            "withhold" keeps what `self.log` is given during training from loggers, callbacks and
            the progress bar.
        insecure_seed: fix noise and sampling, to debug or test. The run is then *not private*,
            and is tagged so, also after a resume without the seed.

    Raises:
        InputError: for settings out of range.
        PrivacyError: at the start of `fit`, for a set-up that would not be private.
        BudgetError: if the Trainer insists on a step beyond the target (`min_epochs`, say).
    """

    def __init__(
        self,
        *,
        delta: float,
        max_grad_norm: float,
        target_epsilon: float | None = None,
        noise_multiplier: float | None = None,
        accountant: str = "prv",
        clipping: Clipping = FlatClipping(),
        views: int = 1,
        noise_schedule: Schedule | None = None,
        clip_schedule: Schedule | None = None,
        ledger: str | Path | bool | None = None,
        data_id: str | None = None,
        selftest: bool = True,
        engine: str = "auto",
        secure_noise: bool = False,
        release: str = "tag",
        insecure_seed: int | None = None,
        chunk_size: int | str | None = "auto",
    ) -> None:
        super().__init__()
        if release not in RELEASES:
            raise InputError(f"Expected `release` to be one of {RELEASES}, got {release!r}.")
        self.release = release
        self._training = PrivateTraining(settings_from(Privacy, locals()))
        self._unnoised: set[str] = set()
        self._forget_last_fit()

    def _forget_last_fit(self) -> None:
        """State that lives for one fit only."""
        self._trainer: pl.Trainer | None = None
        self._data: PrivateData | None = None
        self._fit: PrivateFit | None = None
        self._resumed_at: int | None = None
        self._adopts_state = True
        self._begun = False  # whether a batch was begun that has not run
        self._hooks: GuardedHooks | None = None

    # --- what a user reads --------------------------------------------------------------------

    def _up_to_date(self) -> PrivateTraining:
        self.fetch_state()
        return self._training

    def settings(self) -> dict[str, Any]:
        self.fetch_state()
        return self._training.facts()

    def results(self) -> dict[str, Any]:
        withheld = self.release == "withhold"
        return {
            "epsilon": self.epsilon,
            "private_steps": self.steps,
            "max_grad_norm_at_end": self.max_grad_norm,
            "unnoised_metrics": "withheld" if withheld else sorted(self._unnoised),
        }

    # --- before the first step ----------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._training.account.default_folder = Path(trainer.default_root_dir, LEDGERS)
        if stage != "fit":
            return
        check(trainer_facts(trainer, pl_module))
        self.fetch_state(in_copy=True)
        self.clean_up(trainer, pl_module)  # after a failed fit there may be something
        self._forget_last_fit()
        patched = PatchedStrategy.of(trainer)
        if patched.privacy not in (None, self):
            raise InputError("Expected one DifferentialPrivacy callback, got two.")
        patched.privacy = self
        self._trainer = trainer
        # First in line: no other callback's hook sees a gradient before it is clipped and noised.
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        others = [c for c in callbacks if c is not self]
        trainer.callbacks = [self, *others]  # type: ignore[attr-defined]

    def replace_loader(self, loader: Any) -> Any:
        """The user's training loader, with Poisson-sampled batches."""
        trainer = self._trainer
        assert trainer is not None
        processes = Processes(trainer.global_rank, trainer.world_size, trainer.strategy.broadcast)
        self._data = PrivateData(
            loader, self._training.settings, processes, loaders=1 if self._data is None else 2
        )
        return self._data.loader

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # `validate` and `test` load callback states too; what was spent is not theirs to change.
        self._adopts_state = trainer.state.fn == "fit"
        if not self._adopts_state:
            return
        if self.state_key not in checkpoint.get("callbacks", {}):
            raise PrivacyError(
                "Expected a checkpoint of a private run, got one without a privacy record: its "
                "steps may have used the data without noise. To start from public weights, load "
                "them into the module (load_from_checkpoint) and call fit without ckpt_path."
            )
        self._resumed_at = int(checkpoint["global_step"])

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._data is None:
            trainer.fit_loop.setup_data()  # unless the optimizer's scheduler asked for it already
        if trainer.ckpt_path is not None:
            near = Path(trainer.ckpt_path).parent
            self._training.account.folders = (near, near / LEDGERS)
        planned = trainer.estimated_stepping_batches
        check(
            Setup(
                module=pl_module,
                optimizers=tuple(trainer.optimizers),
                resumed=self._resumed_at is not None or self.steps > 0,
                world_size=trainer.world_size,
            ),
            engine=self._training.settings.engine,
        )
        if self._data is None:
            raise PrivacyError(
                "Expected training data at the start of fit, got none. Give the Trainer a training "
                "loader, and do not set limit_train_batches=0."
            )
        self._data.ends_epoch = partial(is_last_of_epoch, trainer)
        self._refuse_unknown_steps(trainer)
        patched = PatchedStrategy.of(trainer)
        adversary = patched.adversary
        dry_run = self._tried_out(patched, self._data, pl_module)
        if self._data.isolated:
            patched.isolate_records()
        self._fit = self._training.open(
            trainer.optimizers[0],
            self._data,
            dry_run,
            planned=planned,
            done=trainer.global_step if self._resumed_at is None else self._resumed_at,
            ddp=trainer.strategy.model,
            keep_release=adversary is not None and adversary.steps.settings.moves_weights,
        )
        self._stop_if_spent(trainer)

    def _refuse_unknown_steps(self, trainer: pl.Trainer) -> None:
        if trainer.ckpt_path is not None and self._resumed_at is None:
            raise PrivacyError(
                "Expected a checkpoint with callback states, got one without: what its steps spent "
                "is not known. Save full checkpoints, or load public weights and fit without one."
            )
        if self._resumed_at is None and trainer.global_step > self.steps:
            raise PrivacyError(
                f"Expected every step of this Trainer to be private, got {trainer.global_step} "
                f"steps of which {self.steps} were. Start with a new Trainer, from weights that "
                "may be public."
            )

    def _tried_out(
        self, patched: PatchedStrategy, data: PrivateData, module: pl.LightningModule
    ) -> DryRun:
        """The self-test, on copies of the module."""
        step = patched.step()
        runtime = step.runtime
        assert isinstance(runtime, TrainerRuntime)
        self._hooks = GuardedHooks(runtime.hooks, asked=self._training.settings.selftest)
        tried = step_under_test(
            step,
            data.original.collate_fn,
            views=data.views,
            half=runtime.half,
            share=runtime.shared(),
            on_look=runtime.note_look,
        )
        return self._training.try_out(module, data, tried, hooks_to_come=True)

    # --- one step: `defend.training.step` asks for these --------------------------------------

    @property
    def data(self) -> PrivateData:
        """The data of the fit that is open."""
        assert self._data is not None
        return self._data

    @property
    def fit(self) -> PrivateFit:
        """The fit that is open."""
        assert self._fit is not None
        return self._fit

    def note_batch(self, batch: Any) -> None:
        """A batch that was begun is trained on, as it came or as hooks left it."""
        self._begun = False
        if self._hooks is not None:
            self._hooks.check(batch, self.fit)

    def around_backward(self, loss: torch.Tensor) -> AbstractContextManager[None]:
        """Around the backward of a chunk, hooks included."""
        if self._hooks is None or self._trainer is None:
            return nullcontext()
        return self._hooks.around_backward(self._trainer.lightning_module, loss)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # First in line: no other callback has seen the batch.
        self._refuse_a_skipped_batch()
        self._begun = True
        if self._hooks is not None:
            self._hooks.begin(batch, batch_idx)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._fit is not None:  # what is kept of held-out data is no concern
            self._fit.watch.pause()

    def note_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A checkpoint is about to be saved: its weights are to be known to later runs."""
        if self._fit is not None:
            weights = dict(tensors_in(checkpoint.get("state_dict", {})))
            known_elsewhere = ("state_dict", "optimizer_states")
            rest = {key: v for key, v in checkpoint.items() if key not in known_elsewhere}
            self._fit.account.note_weights({**dict(tensors_in(rest, "of")), **weights})

    def note_validation_end(self) -> None:
        """All hooks of a validation ran."""
        if self._fit is not None:
            self._fit.watch.go_on()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._hooks is not None:
            self._hooks.check_end(self.fit)
        super().on_fit_end(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._refuse_a_skipped_batch()

    def _refuse_a_skipped_batch(self) -> None:
        """The module's `on_train_batch_start` may return -1, after a look at the batch."""
        if self._begun:
            raise PrivacyError(
                "Expected every sampled batch to be trained on, got one that was skipped "
                "(`on_train_batch_start` returned -1?). To skip a batch because of a record would "
                "reveal that record. Train on every batch; set limit_train_batches for fewer."
            )

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.fit.fold()  # before other callbacks look

    def on_before_optimizer_step(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self.fit.release()
        self.send_state()

    def keeps_metric(self, name: str) -> bool:
        """Whether a metric that is logged in training goes on to loggers and callbacks."""
        if name == EPSILON:
            return True
        if name not in self._unnoised:
            self._unnoised.add(name)
            if self._trainer is not None and self.release == "tag":
                refuse_steering(self._trainer, name)
        return self.release == "tag"

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        epsilon = self.fit.account.budget.epsilon_now()
        pl_module.log(EPSILON, epsilon, on_step=True, prog_bar=True, batch_size=1)
        self._stop_if_spent(trainer)

    def _stop_if_spent(self, trainer: pl.Trainer) -> None:
        if self.fit.account.budget.exhausted:
            trainer.should_stop = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for logger in trainer.loggers:
            last = max(trainer.global_step - 1, 0)
            logger.log_metrics({EPSILON: self.epsilon}, step=last)

    # --- afterwards ---------------------------------------------------------------------------

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        explain_missing_gradients(exception)
        super().on_exception(trainer, pl_module, exception)

    def state_dict(self) -> dict[str, Any]:
        self.fetch_state()
        return self._training.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.fetch_state()
        if self._adopts_state:
            self._training.load_state_dict(state_dict)
        self._adopts_state = True

    def state_to_send(self) -> dict[str, Any]:
        budget = self._training.budget
        return {
            **self._training.state_dict(),
            "noise_multiplier": budget.noise_multiplier,
            "sample_rate": budget.sample_rate,
            "ledger_folder": str(self._training.account.default_folder),
            "unnoised": sorted(self._unnoised),
            "engine": self._training.engine,
        }

    def receive_state(self, state: dict[str, Any]) -> None:
        training = self._training
        training.load_state_dict(state)
        training.budget.noise_multiplier = state["noise_multiplier"]
        training.budget.sample_rate = state["sample_rate"]
        training.account.default_folder = Path(state["ledger_folder"])
        self._unnoised |= set(state["unnoised"])
        training.engine = state["engine"]

    def clean_up(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._fit is not None:
            self._fit.close()
        if self._data is not None:
            self._data.forget()
        self._trainer = self._data = self._fit = self._hooks = None
