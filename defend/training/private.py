"""One private fit, whatever drives the loop: what Lightning, Fabric and plain PyTorch share."""

import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from defend.batching.memory import rows_that_fit
from defend.errors import PrivacyError
from defend.privacy.accounting.budget import Budget
from defend.privacy.accounting.fingerprint import data_digest
from defend.privacy.checks.preconditions import Setup, check
from defend.privacy.checks.selftest import RECORDS, SelfTest
from defend.privacy.mechanism.clipping import AdaptiveClipping
from defend.privacy.mechanism.randomness import Randomness, make_global_rng_secret
from defend.privacy.mechanism.sampling import PoissonBatchSampler, poisson_loader
from defend.privacy.mechanism.schedules import factor
from defend.privacy.mechanism.step import PrivateStep
from defend.training.account import Account
from defend.training.chunks import LogicalBatch
from defend.training.lineage import claim
from defend.training.processes import Processes
from defend.training.settings import PrivacySettings
from defend.training.tryout import Trial, TryOut, is_due

ADJACENCY = "add or remove one record"
SAMPLING = "Poisson"

# Per-record gradients take rows × parameters of memory. This many rows fit small machines.
_CHUNK_ON_CPU = 256
_MOST_RECORDS = 64  # in the self-test's largest batch


class PrivateTraining:
    """The account, the sampler, the ledger and the step of a model's private training.

    In the order of a fit: `start`, `replace_loader`, `open`; for each batch `run` and `release`,
    with the optimizer's step after it; `close`. What outlives a fit (the account, C where it is
    learned, where the ledger stood) stays, so the next fit goes on from it.

    Args:
        settings: what the user asked for.
        default_ledger: folder of the ledger where `settings.ledger` is None.
    """

    def __init__(self, settings: PrivacySettings, default_ledger: Path | None = None) -> None:
        self.settings = settings
        self.account = Account(settings, default_ledger)
        self.max_grad_norm = settings.max_grad_norm
        self.selftest: SelfTest | None = None
        self._forget()

    def _forget(self) -> None:
        """State that lives for one fit only."""
        self.processes = Processes()
        self.sampler: PoissonBatchSampler | None = None
        self._loader: DataLoader | None = None
        self._randomness: Randomness | None = None
        self._step: PrivateStep | None = None
        self._ddp: DistributedDataParallel | None = None
        self._restore_global_rng: Callable[[], None] | None = None
        self._tryout: TryOut | None = None
        self._epochs = self._steps_run = 0

    @property
    def budget(self) -> Budget:
        """What may be spent and what was."""
        return self.account.budget

    @property
    def chunk_size(self) -> int | None:
        """Most rows in one chunk; None where batches are not split."""
        return None if self.sampler is None else self.sampler.chunk_size

    # --- before the first step --------------------------------------------------------------------

    def start(self, processes: Processes) -> None:
        """Draw the secrets of a fit; rank 0's root is everybody's."""
        self.close()
        self._forget()
        settings = self.settings
        self.processes = processes
        if settings.insecure_seed is not None:
            self._randomness = Randomness(settings.insecure_seed)
        else:
            root = processes.broadcast(Randomness().root)
            self._randomness = Randomness(root=root, secure=settings.secure_noise)

    def replace_loader(self, loader: Any) -> DataLoader:
        """The user's training loader, with Poisson-sampled batches."""
        randomness, processes = self._known(self._randomness), self.processes
        check(
            Setup(
                loader=loader,
                loaders=1 if self.sampler is None else 2,
                world_size=processes.world_size,
            )
        )
        records = len(loader.dataset)
        if self.settings.delta >= 1 / records and processes.rank == 0:
            warnings.warn(
                f"delta={self.settings.delta} is not below 1 / {records} records: a mechanism that "
                "publishes one record in full would satisfy it. Choose a smaller delta.",
                stacklevel=2,
            )
        self._loader = loader
        asked = self.settings.chunk_size
        self.sampler = PoissonBatchSampler(
            records,
            loader.batch_size * processes.world_size / records,
            len(loader),
            randomness,
            first_step=self._next_step,
            chunk_size=_CHUNK_ON_CPU if isinstance(asked, str) else asked,
            views=self.settings.views,
            fixed=torch.cuda.is_available() and torch.backends.cudnn.benchmark,
            rank=processes.rank,
            world_size=processes.world_size,
        )
        return poisson_loader(loader, self.sampler)

    def open(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        *,
        planned: float,
        done: int,
        ddp: Any = None,
        keep_release: bool = False,
    ) -> None:
        """Fix σ, open the ledger, and install the hooks.

        Args:
            module: the model itself, not wrapped.
            optimizer: its optimizer.
            planned: steps of the whole training, those done included; inf for no end.
            done: steps of that plan taken before, by a run that is resumed.
            ddp: the DistributedDataParallel around the model, if there is one.
            keep_release: whether `released` is asked for.
        """
        sampler = self._known(self.sampler)
        expected = sampler.sample_rate * sampler.size
        try:
            # Not earlier: a split of the data that is drawn from `seed_everything` has to be the
            # same on all ranks, and the same again in the next run.
            if self.settings.insecure_seed is None:
                self._restore_global_rng = make_global_rng_secret()
            digest = self._data_digest()
            self.account.open(
                self.processes, sample_rate=sampler.sample_rate, planned=planned, done=done
            )
            claim(module, digest, self.budget)
            self._check_count_noise(expected)
            self._step = PrivateStep(
                module,
                optimizer,
                noise_multiplier=self.budget.next_noise,
                max_grad_norm=self.max_grad_norm,
                expected_batch_size=expected,
                randomness=self._known(self._randomness),
                charge=self.account.charge,
                clipping=self.settings.clipping,
                views=self.settings.views,
                keep_release=keep_release,
                loss_reduction="sum",
                rank=self.processes.rank,
                world_size=self.processes.world_size,
            )
            self.account.begin(
                self.processes,
                max_grad_norm=self.max_grad_norm,
                records=sampler.size,
                clipping=repr(self.settings.clipping),
                data_digest=digest,
                sampling=SAMPLING,
                adjacency=ADJACENCY,
            )
        except BaseException:
            self.close()
            raise
        if isinstance(ddp, DistributedDataParallel):
            # Sums are added up after clipping, by `PrivateStep`; averaged gradients are no use, and
            # ranks may run different numbers of chunks, so no forward may wait for another rank.
            self._ddp = ddp
            ddp.require_backward_grad_sync = False
            ddp.require_forward_param_sync = False

    def _data_digest(self) -> str:
        """The digest of the data, which must be the same on all ranks."""
        digest = data_digest(self._known(self._loader).dataset)
        if not self.processes.agree(digest):
            raise PrivacyError(
                "Expected the same data set in the same order on every process, got different "
                "ones: a record could join one batch twice. Split and shuffle with a fixed seed "
                "(a generator of its own, or seed_everything)."
            )
        return digest

    def _check_count_noise(self, expected: float) -> None:
        """Now, not in the middle of a training, where a step is charged already."""
        clipping = self.settings.clipping
        if isinstance(clipping, AdaptiveClipping):
            for sigma in self.budget.planned_noise:
                clipping.gradient_multiplier(sigma, expected)

    def _next_step(self) -> int:
        return self.budget.next_step

    def try_out(self, module: nn.Module, trial: Trial) -> None:
        """Chunk size and self-test, on records of the data; before `open`.

        Raises:
            PrivacyError: with everything that was found.
        """
        tryout = TryOut(
            module,
            self._known(self._loader),
            trial,
            max_grad_norm=self.max_grad_norm,
            views=self.settings.views,
        )
        sampler = self._known(self.sampler)
        views = self.settings.views
        ordinary = math.ceil(sampler.sample_rate * sampler.size / sampler.world_size) * views
        if next(module.parameters()).device.type == "cuda" and self.settings.chunk_size == "auto":
            rows = rows_that_fit(tryout.peak_bytes, tryout.free_bytes(), most=2 * ordinary)
            sampler.chunk_size = self.processes.broadcast(rows)
        if views > 1 and trial.attack is None and tryout.views_are_alike():
            warnings.warn(
                f"views={views} asks the data set for each record {views} times, and it gave the "
                "same each time. Augment in the data set or in a batch hook, or leave `views` out.",
                stacklevel=2,
            )
        if self.settings.selftest:
            self._tryout = tryout
            if views > 1 and self.chunk_size is not None:  # no more rows at once than in training
                tryout.records = min(max(self.chunk_size // views + 1, 3), RECORDS)
            most = min(ordinary, self.chunk_size or ordinary, _MOST_RECORDS * views)
            self.selftest = tryout.selftest(most)
            if self.selftest is not None:
                self.selftest.require()

    def _look_again(self) -> None:
        """The self-test in short, now and then: a step may change its ways."""
        sampler, tryout = self._known(self.sampler), self._tryout
        first = sampler.epochs > self._epochs
        self._epochs = sampler.epochs
        due = is_due(self._steps_run, sampler.epochs - 1, first_of_epoch=first)
        self._steps_run += 1
        if tryout is None or not due:
            return
        with self._known(self._step).paused():
            found = tryout.selftest()
        if found is not None and found.findings:
            self.selftest = found
            found.require()

    # --- one step ---------------------------------------------------------------------------------

    def run(self, batch: Any, compute: Callable[[Any, int], None]) -> None:
        """Forward and backward on one logical batch, chunk by chunk, clipped and summed.

        Args:
            batch: what the private loader gave.
            compute: runs forward on a chunk of it, and backward from the *sum* of its rows'
                losses: (chunk, rows) → None.

        Raises:
            PrivacyError: if the batch does not hold one row for each sampled record.
        """
        step, sampler = self._known(self._step), self._known(self.sampler)
        logical = LogicalBatch(batch, step, sampler, self.processes)
        self._look_again()
        step.noise_multiplier = self.budget.next_noise
        if self.settings.clip_schedule is not None:
            at = factor(self.settings.clip_schedule, self.budget.next_step)
            self.max_grad_norm = self.settings.max_grad_norm * at
        step.max_grad_norm = self.max_grad_norm
        step.begin()
        logical.run(compute)

    def fold(self) -> None:
        """After a chunk's backward: clip, sum, and forget its raw gradients. Safe to call twice."""
        if self._step is not None and self._step.pending:
            self._step.fold()

    def release(self) -> None:
        """Charge the batch, add the noise, and leave the released gradient in every `p.grad`."""
        step = self._known(self._step)
        step.release()
        self.max_grad_norm = step.max_grad_norm

    @property
    def released(self) -> Mapping[str, Tensor]:
        """The last released gradient, by parameter name; empty before the first, or unasked."""
        return self._known(self._step).released

    def attack_generator(self, device: torch.device, *, anew: int | None = None) -> torch.Generator:
        """Secret numbers for the random starts of this rank's records in the current step.

        Args:
            device: where they are drawn.
            anew: others, of this number, for trying the attack out.
        """
        randomness, rank = self._known(self._randomness), self.processes.rank
        if anew is not None:
            return randomness.generator("probe", anew, device, rank=rank)
        return randomness.generator("attack", self.budget.next_step, device, rank=rank)

    # --- afterwards -------------------------------------------------------------------------------

    def close(self) -> None:
        """Remove every hook and every private gradient; safe to call twice."""
        if self._step is not None:
            self._step.close()
        if self._ddp is not None:
            self._ddp.require_backward_grad_sync = True
            self._ddp.require_forward_param_sync = True
        if self._restore_global_rng is not None:
            self._restore_global_rng()
        self.account.close()
        if self.sampler is not None:
            self.sampler.forget()
        self._step = self._ddp = self._restore_global_rng = None
        self._randomness = self._loader = self._tryout = None

    def facts(self) -> dict[str, Any]:
        """What is known of the run, for parameters and the card."""
        settings, sampler, ledger = self.settings, self.sampler, self.account.path
        return {
            "private": self.budget.private,
            "target_epsilon": settings.target_epsilon,
            "delta": settings.delta,
            "noise_multiplier": self.budget.noise_multiplier,
            "max_grad_norm": settings.max_grad_norm,
            "clipping": repr(settings.clipping),
            "views": settings.views,
            "sample_rate": self.budget.sample_rate,
            "records": sampler.size if sampler else None,
            "accountant": settings.accountant,
            "adjacency": ADJACENCY,
            "sampling": SAMPLING,
            "secure_noise": settings.secure_noise,
            "selftest": _verdict(settings.selftest, self.selftest),
            "ledger": "none" if ledger is None else ledger.name,
        }

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run has to know, as plain data; holds no secret."""
        return {**self.account.state_dict(), "max_grad_norm": self.max_grad_norm}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Unite with what a checkpoint spent; what is known here is not forgotten."""
        self.account.load_state_dict(state)
        if isinstance(self.settings.clipping, AdaptiveClipping):  # else C is what was asked for
            self.max_grad_norm = state["max_grad_norm"]

    def __getstate__(self) -> dict[str, Any]:
        """A copy, and a pickle, hold the account and no secret of a fit under way."""
        copy = object.__new__(type(self))
        copy.__dict__.update(vars(self))
        copy._forget()
        return vars(copy)

    @staticmethod
    def _known(value: Any) -> Any:
        if value is None:
            raise PrivacyError(
                "Expected a private fit that is under way, got one that was closed or never "
                "opened. Use it between its start and its end."
            )
        return value


def _verdict(asked: bool, found: SelfTest | None) -> str:
    if not asked:
        return "off"
    return "not run" if found is None else "passed" if found.passed else "failed"
