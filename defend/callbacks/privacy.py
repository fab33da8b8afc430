"""DP-SGD for an unmodified LightningModule."""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.nn.parallel import DistributedDataParallel

from defend.batching.chunks import check_chunk_size, count_rows, even_bounds, slice_rows
from defend.callbacks._base import DefendCallback
from defend.callbacks._seams import Seams
from defend.errors import InputError, PrivacyError
from defend.privacy.accounting import History
from defend.privacy.budget import Budget
from defend.privacy.preconditions import Setup, check
from defend.privacy.randomness import Randomness, make_global_rng_secret
from defend.privacy.sampling import PoissonBatchSampler, poisson_loader
from defend.privacy.step import PrivateStep

ADJACENCY = "add or remove one record"

# Per-record gradients take rows × parameters of memory. This many rows fit small machines.
_AUTO_CHUNK = 256


class DifferentialPrivacy(DefendCallback):
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
    record; `defend.privacy` says what is and is not covered. It rests on a loss that is the plain
    mean over rows of what each row alone gives: no `weight=` in cross-entropy (its normalizer
    depends on the other labels), no sum, no mixup, no statistics of the batch. Much of what would
    break the guarantee in silence is refused before or at the first step; such a loss is not yet
    detected.

    Logs `privacy/epsilon`: exact at each twentieth of the plan and at the end, and in between the
    next exact value, so never less than what was spent.

    This callback moves to the front of the Trainer's list. Hooks that run after a backward find no
    gradient (`p.grad` is None); from `on_before_optimizer_step` on they find the noised one.

    Args:
        delta: δ in (0, 1), well below 1 / number of records.
        max_grad_norm: C > 0, the L2 norm that each record's gradient is clipped to.
        target_epsilon: ε > 0 that is not exceeded, or None.
        noise_multiplier: σ ≥ 0, the noise's standard deviation in units of C, or None.
        accountant: "prv" (tight) or "rdp".
        chunk_size: most rows in one forward and backward; larger batches are split, with the same
            result. "auto": 256 rows. None: never split.
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
        insecure_seed: int | None = None,
    ) -> None:
        super().__init__()
        self._budget = Budget(
            delta=delta,
            target_epsilon=target_epsilon,
            noise_multiplier=noise_multiplier,
            accountant=accountant,
            insecure=insecure_seed is not None,
        )
        if not 0 < max_grad_norm < math.inf:
            raise InputError(f"Expected `max_grad_norm` to be > 0 and finite, got {max_grad_norm}.")
        check_chunk_size(chunk_size)
        self.delta = delta
        self.max_grad_norm = max_grad_norm
        self.target_epsilon = target_epsilon
        self.accountant = accountant
        self.chunk_size: int | None = (
            _AUTO_CHUNK if chunk_size == "auto" else chunk_size  # type: ignore[assignment]
        )
        Randomness(insecure_seed)  # refuses a bad seed
        self.insecure_seed = insecure_seed
        self._forget_last_fit()

    def _forget_last_fit(self) -> None:
        """State that lives for one fit only."""
        self._trainer: pl.Trainer | None = None
        self._randomness: Randomness | None = None
        self._sampler: PoissonBatchSampler | None = None
        self._step: PrivateStep | None = None
        self._ddp: DistributedDataParallel | None = None
        self._resumed_at: int | None = None
        self._adopts_state = True
        self._restore_global_rng: Callable[[], None] | None = None

    # --- what a user reads --------------------------------------------------------------------

    @property
    def epsilon(self) -> float:
        """ε spent so far at `delta`; 0 before the first step."""
        self.collect()
        return self._budget.epsilon

    @property
    def noise_multiplier(self) -> float | None:
        """σ; None until it is found at the start of `fit`."""
        self.collect()
        return self._budget.noise_multiplier

    @property
    def sample_rate(self) -> float | None:
        """q, the probability that a record joins a batch; None until the data is known."""
        self.collect()
        return self._budget.sample_rate

    @property
    def steps(self) -> int:
        """Steps charged so far, those before a resume included."""
        self.collect()
        return self._budget.steps

    @property
    def history(self) -> History:
        """All that was charged: (noise_multiplier, sample_rate, steps) in order."""
        self.collect()
        return self._budget.history

    @property
    def private(self) -> bool:
        """Whether `epsilon` means anything: no step used a fixed seed or went without noise."""
        self.collect()
        return self._budget.private

    def settings(self) -> dict[str, Any]:
        sampler = self._sampler
        return {
            "private": self.private,
            "target_epsilon": self.target_epsilon,
            "delta": self.delta,
            "noise_multiplier": self.noise_multiplier,
            "max_grad_norm": self.max_grad_norm,
            "sample_rate": self.sample_rate,
            "records": sampler.size if sampler else None,
            "accountant": self.accountant,
            "adjacency": ADJACENCY,
            "sampling": "Poisson",
        }

    def results(self) -> dict[str, Any]:
        return {"epsilon": self.epsilon, "private_steps": self.steps}

    # --- before the first step ----------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        check(_trainer_facts(trainer, pl_module))
        self.collect(in_copy=True)
        self.clean_up(trainer, pl_module)  # after a failed fit there may be something
        self._forget_last_fit()
        seams = Seams.of(trainer)
        if seams.private not in (None, self):
            raise InputError("Expected one DifferentialPrivacy callback, got two.")
        seams.private = self
        self._trainer = trainer
        self._randomness = self._share_randomness(trainer)
        if self.insecure_seed is None:
            self._restore_global_rng = make_global_rng_secret()
        # First in line: no other callback's hook sees a gradient before it is clipped and noised.
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        others = [c for c in callbacks if c is not self]
        trainer.callbacks = [self, *others]  # type: ignore[attr-defined]

    def _share_randomness(self, trainer: pl.Trainer) -> Randomness:
        if self.insecure_seed is not None:
            return Randomness(self.insecure_seed)
        return Randomness(root=trainer.strategy.broadcast(Randomness().root))

    def replace_loader(self, loader: Any) -> Any:
        """The user's training loader, with Poisson-sampled batches."""
        trainer, randomness = self._trainer, self._randomness
        assert trainer is not None
        assert randomness is not None
        check(
            Setup(
                loader=loader,
                loaders=1 if self._sampler is None else 2,
                world_size=trainer.world_size,
            )
        )
        records = len(loader.dataset)
        if self.delta >= 1 / records:
            rank_zero_warn(
                f"delta={self.delta} is not below 1 / {records} records: a mechanism that "
                "publishes one record in full would satisfy it. Choose a smaller delta."
            )
        self._sampler = PoissonBatchSampler(
            records,
            loader.batch_size * trainer.world_size / records,
            len(loader),
            randomness,
            first_step=lambda: self._budget.steps,
            chunk_size=self.chunk_size,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
        )
        return poisson_loader(loader, self._sampler)

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
        if self._sampler is None:
            trainer.fit_loop.setup_data()  # unless the optimizer's scheduler asked for it already
        planned = trainer.estimated_stepping_batches
        check(Setup(module=pl_module, optimizers=tuple(trainer.optimizers)))
        sampler, randomness = self._sampler, self._randomness
        if sampler is None or randomness is None:
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
        done = trainer.global_step if self._resumed_at is None else self._resumed_at
        self._budget.open(sample_rate=sampler.sample_rate, planned=planned, done=done)
        assert self._budget.noise_multiplier is not None
        self._step = PrivateStep(
            pl_module,
            trainer.optimizers[0],
            noise_multiplier=self._budget.noise_multiplier,
            max_grad_norm=self.max_grad_norm,
            expected_batch_size=sampler.sample_rate * sampler.size,
            randomness=randomness,
            charge=self._charge,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
        )
        if isinstance(trainer.strategy.model, DistributedDataParallel):
            # Sums are added up after clipping, by `PrivateStep`; averaged gradients are no use.
            self._ddp = trainer.strategy.model
            self._ddp.require_backward_grad_sync = False
        self._stop_if_spent(trainer)

    def attack_generator(self, device: torch.device) -> torch.Generator:
        """Secret numbers for the random starts of this rank's records in the current step."""
        trainer, randomness = self._trainer, self._randomness
        assert trainer is not None
        assert randomness is not None
        rank = trainer.global_rank
        return randomness.generator("attack", self._budget.steps, device, rank=rank)

    def _charge(self) -> int:
        number = self._budget.charge()
        self.post()
        return number

    # --- one step -----------------------------------------------------------------------------

    def run(self, batch: Any, step: Callable[[Any], Any]) -> Any:
        """The user's training step on one logical batch, chunk by chunk.

        All but the last chunk go through backward here; Lightning does the last one.
        """
        trainer, private, sampler = self._trainer, self._step, self._sampler
        assert trainer is not None
        assert private is not None
        assert sampler is not None
        drawn = sampler.drawn.popleft()
        rows = count_rows(batch)
        if rows != drawn.rows:
            raise PrivacyError(
                f"Expected {drawn.rows} rows, one for each sampled record, got {rows}. The "
                "collate function or a batch hook drops, adds or merges records; let it keep one "
                "row a record."
            )
        private.begin()
        output = None
        for start, stop in even_bounds(drawn.rows, drawn.chunks):
            records = min(max(drawn.records - start, 0), stop - start)
            private.expect(stop - start, records)
            chunk = batch if drawn.chunks == 1 else slice_rows(batch, start, stop, drawn.rows)
            output = step(chunk)
            if stop < drawn.rows:
                trainer.strategy.backward(_loss_of(output), trainer.optimizers[0])
        return output

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._step is not None:
            self._step.fold()

    def on_before_optimizer_step(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        if self._step is not None:
            self._step.release()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        pl_module.log(
            "privacy/epsilon",
            self._budget.epsilon_ahead(),
            on_step=True,
            prog_bar=True,
            batch_size=1,
        )
        self._stop_if_spent(trainer)

    def _stop_if_spent(self, trainer: pl.Trainer) -> None:
        if self._budget.exhausted:
            trainer.should_stop = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for logger in trainer.loggers:
            last = max(trainer.global_step - 1, 0)
            logger.log_metrics({"privacy/epsilon": self.epsilon}, step=last)

    # --- afterwards ---------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        self.collect()
        return self._budget.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.collect()
        if self._adopts_state:
            self._budget.merge(state_dict)
        self._adopts_state = True

    def carried(self) -> dict[str, Any]:
        found = {"noise_multiplier": self._budget.noise_multiplier}
        return {**self._budget.state_dict(), **found, "sample_rate": self._budget.sample_rate}

    def receive(self, carried: dict[str, Any]) -> None:
        self._budget.merge(carried)
        self._budget.noise_multiplier = carried["noise_multiplier"]
        self._budget.sample_rate = carried["sample_rate"]

    def clean_up(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._step is not None:
            self._step.close()
        if self._ddp is not None:
            self._ddp.require_backward_grad_sync = True
        if self._restore_global_rng is not None:
            self._restore_global_rng()
        self._step = self._ddp = self._trainer = self._restore_global_rng = None
        self._randomness = None


def _loss_of(output: Any) -> torch.Tensor:
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, torch.Tensor):
        raise PrivacyError(
            f"Expected `training_step` to return a loss for every batch, got {loss!r}. Skipping "
            "a batch because of one record would reveal that record."
        )
    return loss


def _trainer_facts(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Setup:
    return Setup(
        accumulate_grad_batches=trainer.accumulate_grad_batches,
        gradient_clip_val=trainer.gradient_clip_val,
        precision=trainer.precision,
        strategy=type(trainer.strategy).__name__,
        automatic_optimization=pl_module.automatic_optimization,
        overrides_backward=type(pl_module).backward is not pl.LightningModule.backward,
        takes_dataloader_iter="dataloader_iter"
        in inspect.signature(pl_module.training_step).parameters,
        reloads_data=trainer.reload_dataloaders_every_n_epochs > 0,  # type: ignore[attr-defined]
        overfits_batches=trainer.overfit_batches > 0,  # type: ignore[attr-defined]
        callbacks=tuple(type(c) for c in trainer.callbacks),  # type: ignore[attr-defined]
    )
