"""DP-SGD for an unmodified LightningModule: a thin shell over `defend.training`."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from defend.callbacks._base import DefendCallback
from defend.callbacks._seams import Seams
from defend.callbacks._trainer import (
    TrainerStep,
    loss_of,
    refuse_steering,
    trainer_facts,
    without_graph,
)
from defend.errors import InputError, PrivacyError
from defend.privacy.checks.preconditions import Setup, check
from defend.privacy.mechanism.clipping import Clipping, FlatClipping
from defend.privacy.mechanism.schedules import Schedule
from defend.training.private import PrivateTraining
from defend.training.processes import Processes
from defend.training.readings import Readings
from defend.training.settings import RELEASES, PrivacySettings

EPSILON = "privacy/epsilon"
LEDGERS = "privacy_ledgers"


class DifferentialPrivacy(Readings, DefendCallback):
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

    The global RNGs of torch, numpy and Python are seeded from the OS during the fit, since dropout
    masks and augmentations must not be known either, and put back afterwards; so a private run
    does not repeat, whatever `seed_everything` says.

    *Guarantee.* After training, the weights are (`epsilon`, δ)-DP for adding or removing one
    record; `defend.privacy` says what is and is not covered. What would break it in silence is
    refused before the first step: set-ups by a table (`defend.privacy.checks.preconditions`), and
    what the module's forward and loss do by a self-test on a copy of it and seven records. The loss
    has to be the plain mean over rows of what each row alone gives.

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
            together.
        clipping: `FlatClipping()`, `PerLayerClipping()`, or `AdaptiveClipping(...)`, for which
            `max_grad_norm` is where C starts.
        views: rows of each record, K ≥ 1 (augmentation multiplicity, De et al. 2022, arXiv
            2204.13650). The data set is asked for each sampled record K times, so that it may
            augment it anew each time; batch hooks and attacks see K rows. The mean of their
            gradients is gᵢ, and is clipped once: K costs time, not ε.
        noise_schedule: step → factor on σ, such as `Decay(0.999)`; accounted step by step.
        clip_schedule: step → factor on C.
        ledger: a path; None: `privacy_ledgers/` under the Trainer's `default_root_dir`, under a
            name that checkpoints know; False: none, so ε holds only what checkpoints know.
        selftest: False leaves the self-test out; you then answer for the step yourself.
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
        chunk_size: int | str | None = "auto",
        clipping: Clipping = FlatClipping(),
        views: int = 1,
        noise_schedule: Schedule | None = None,
        clip_schedule: Schedule | None = None,
        ledger: str | Path | bool | None = None,
        selftest: bool = True,
        secure_noise: bool = False,
        release: str = "tag",
        insecure_seed: int | None = None,
    ) -> None:
        super().__init__()
        if release not in RELEASES:
            raise InputError(f"Expected `release` to be one of {RELEASES}, got {release!r}.")
        self.release = release
        self._private = PrivateTraining(
            PrivacySettings(
                delta=delta,
                max_grad_norm=max_grad_norm,
                target_epsilon=target_epsilon,
                noise_multiplier=noise_multiplier,
                accountant=accountant,
                chunk_size=chunk_size,
                clipping=clipping,
                views=views,
                noise_schedule=noise_schedule,
                clip_schedule=clip_schedule,
                ledger=ledger,
                selftest=selftest,
                secure_noise=secure_noise,
                insecure_seed=insecure_seed,
            )
        )
        self._unnoised: set[str] = set()
        self._forget_last_fit()

    def _forget_last_fit(self) -> None:
        """State that lives for one fit only."""
        self._trainer: pl.Trainer | None = None
        self._resumed_at: int | None = None
        self._adopts_state = True
        self._begun = False  # whether a batch was begun that has not run

    # --- what a user reads --------------------------------------------------------------------

    def _up_to_date(self) -> PrivateTraining:
        self.collect()
        return self._private

    def settings(self) -> dict[str, Any]:
        self.collect()
        return self._private.facts()

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
        self._private.account.default_folder = Path(trainer.default_root_dir, LEDGERS)
        if stage != "fit":
            return
        check(trainer_facts(trainer, pl_module))
        self.collect(in_copy=True)
        self.clean_up(trainer, pl_module)  # after a failed fit there may be something
        self._forget_last_fit()
        seams = Seams.of(trainer)
        if seams.private not in (None, self):
            raise InputError("Expected one DifferentialPrivacy callback, got two.")
        seams.private = self
        self._trainer = trainer
        self._private.start(
            Processes(trainer.global_rank, trainer.world_size, trainer.strategy.broadcast)
        )
        # First in line: no other callback's hook sees a gradient before it is clipped and noised.
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        others = [c for c in callbacks if c is not self]
        trainer.callbacks = [self, *others]  # type: ignore[attr-defined]

    def replace_loader(self, loader: Any) -> Any:
        """The user's training loader, with Poisson-sampled batches."""
        return self._private.replace_loader(loader)

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
        private = self._private
        if private.sampler is None:
            trainer.fit_loop.setup_data()  # unless the optimizer's scheduler asked for it already
        planned = trainer.estimated_stepping_batches
        check(
            Setup(
                module=pl_module,
                optimizers=tuple(trainer.optimizers),
                world_size=trainer.world_size,
            )
        )
        if private.sampler is None:
            raise PrivacyError(
                "Expected training data at the start of fit, got none. Give the Trainer a training "
                "loader, and do not set limit_train_batches=0."
            )
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
        adversary = Seams.of(trainer).adversary
        private.try_out(pl_module, TrainerStep(trainer, pl_module, adversary).trial())
        private.open(
            pl_module,
            trainer.optimizers[0],
            planned=planned,
            done=trainer.global_step if self._resumed_at is None else self._resumed_at,
            ddp=trainer.strategy.model,
            keep_release=adversary is not None and adversary.moves_weights,
        )
        self._stop_if_spent(trainer)

    @property
    def step_chunk_size(self) -> int | None:
        """Most rows in one chunk."""
        return self._private.chunk_size

    @property
    def views(self) -> int:
        """Rows of a record."""
        return self._private.settings.views

    @property
    def released(self) -> Mapping[str, torch.Tensor]:
        """The last released gradient, for an adversary that moves the weights."""
        return self._private.released

    def attack_generator(self, device: torch.device, *, anew: int | None = None) -> torch.Generator:
        """Secret numbers for the random starts of this rank's records in the current step."""
        return self._private.attack_generator(device, anew=anew)

    # --- one step -----------------------------------------------------------------------------

    def run(self, batch: Any, step: Callable[[Any], Any], backward: Callable[..., Any]) -> Any:
        """The user's training step and the backward of one logical batch, chunk by chunk."""
        trainer = self._trainer
        assert trainer is not None
        output: Any = None

        def compute(chunk: Any, rows: int) -> None:
            nonlocal output
            output = step(chunk)
            backward(loss_of(output) * rows, trainer.optimizers[0])
            output = without_graph(output)

        self._begun = False
        self._private.run(batch, compute)
        return output

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._refuse_a_skipped_batch()
        self._begun = True

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
        self._private.fold()  # before other callbacks look

    def on_before_optimizer_step(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self._private.release()
        self.post()

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
        epsilon = self._private.budget.epsilon_now()
        pl_module.log(EPSILON, epsilon, on_step=True, prog_bar=True, batch_size=1)
        self._stop_if_spent(trainer)

    def _stop_if_spent(self, trainer: pl.Trainer) -> None:
        if self._private.budget.exhausted:
            trainer.should_stop = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for logger in trainer.loggers:
            last = max(trainer.global_step - 1, 0)
            logger.log_metrics({EPSILON: self.epsilon}, step=last)

    # --- afterwards ---------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        self.collect()
        return self._private.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.collect()
        if self._adopts_state:
            self._private.load_state_dict(state_dict)
        self._adopts_state = True

    def carried(self) -> dict[str, Any]:
        budget = self._private.budget
        return {
            **self._private.state_dict(),
            "noise_multiplier": budget.noise_multiplier,
            "sample_rate": budget.sample_rate,
            "ledger_folder": str(self._private.account.default_folder),
            "unnoised": sorted(self._unnoised),
        }

    def receive(self, carried: dict[str, Any]) -> None:
        self._private.load_state_dict(carried)
        self._private.budget.noise_multiplier = carried["noise_multiplier"]
        self._private.budget.sample_rate = carried["sample_rate"]
        self._private.account.default_folder = Path(carried["ledger_folder"])
        self._unnoised |= set(carried["unnoised"])

    def clean_up(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._private.close()
        self._trainer = None
