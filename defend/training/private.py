"""One private fit, whatever drives the loop: what Lightning, Fabric and plain PyTorch share."""

import math
import uuid
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from defend.batching.chunks import count_rows, even_bounds, slice_rows
from defend.batching.memory import rows_that_fit
from defend.errors import PrivacyError
from defend.privacy.accounting import History
from defend.privacy.budget import Budget
from defend.privacy.fingerprint import data_digest
from defend.privacy.ledger import Anchor, Ledger
from defend.privacy.preconditions import Setup, check
from defend.privacy.randomness import Randomness, make_global_rng_secret
from defend.privacy.sampling import Drawn, PoissonBatchSampler, poisson_loader
from defend.privacy.schedules import factor
from defend.privacy.selftest import Attack, Loss, SelfTest, selftest, spread
from defend.privacy.step import PrivateStep
from defend.privacy.still import seeded
from defend.training.processes import Processes
from defend.training.settings import PrivacySettings

ADJACENCY = "add or remove one record"
SAMPLING = "Poisson"

# Per-record gradients take rows × parameters of memory. This many rows fit small machines.
_CHUNK_ON_CPU = 256


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
        self.budget: Budget = settings.budget()
        self.default_ledger = default_ledger
        self.ledger_name: str | None = None
        self.anchor: Anchor | None = None
        self.max_grad_norm = settings.max_grad_norm
        self.selftest: SelfTest | None = None
        self._forget()

    def _forget(self) -> None:
        """State that lives for one fit only."""
        self.processes = Processes()
        self.sampler: PoissonBatchSampler | None = None
        self.chunk_size: int | None = None
        self._loader: DataLoader | None = None
        self._randomness: Randomness | None = None
        self._step: PrivateStep | None = None
        self._ledger: Ledger | None = None
        self._ddp: DistributedDataParallel | None = None
        self._restore_global_rng: Callable[[], None] | None = None

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
            self._restore_global_rng = make_global_rng_secret()

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
        self.chunk_size = _CHUNK_ON_CPU if isinstance(asked, str) else asked
        self.sampler = PoissonBatchSampler(
            records,
            loader.batch_size * processes.world_size / records,
            len(loader),
            randomness,
            first_step=lambda: self.budget.next_step,
            chunk_size=self.chunk_size,
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
    ) -> None:
        """Fix σ, open the ledger, and install the hooks.

        Args:
            module: the model itself, not wrapped.
            optimizer: its optimizer.
            planned: steps of the whole training, those done included; inf for no end.
            done: steps of that plan taken before, by a run that is resumed.
            ddp: the DistributedDataParallel around the model, if there is one.
        """
        sampler = self._known(self.sampler)
        self._open_ledger()
        try:
            self.budget.open(sample_rate=sampler.sample_rate, planned=planned, done=done)
            self._step = PrivateStep(
                module,
                optimizer,
                noise_multiplier=self.budget.next_noise,
                max_grad_norm=self.max_grad_norm,
                expected_batch_size=sampler.sample_rate * sampler.size,
                randomness=self._known(self._randomness),
                charge=self._charge,
                clipping=self.settings.clipping,
                rank=self.processes.rank,
                world_size=self.processes.world_size,
            )
        except BaseException:
            self.close()
            raise
        self._begin_ledger()
        if isinstance(ddp, DistributedDataParallel):
            # Sums are added up after clipping, by `PrivateStep`; averaged gradients are no use, and
            # ranks may run different numbers of chunks, so no forward may wait for another rank.
            self._ddp = ddp
            ddp.require_backward_grad_sync = False
            ddp.require_forward_param_sync = False

    def try_out(
        self,
        module: nn.Module,
        loss: Loss,
        *,
        transfer: Callable[[Any], Any] = lambda batch: batch,
        attack: Attack | None = None,
        half: bool = False,
    ) -> None:
        """The self-test on the first, middle and last records of the data; before `open`.

        Raises:
            PrivacyError: with everything that was found.
        """
        if not self.settings.selftest:
            return
        loader = self._known(self._loader)

        def collate(records: list[Any]) -> Any:
            return transfer(loader.collate_fn(records))

        positions = spread(len(loader.dataset))
        if len(positions) < 3:
            return  # too few records to mix
        with seeded(0, ()):
            records = [loader.dataset[i] for i in positions]
        self.selftest = selftest(
            module,
            records,
            loss=loss,
            collate=collate,
            attack=attack,
            max_grad_norm=self.max_grad_norm,
            half=half,
        )
        self.selftest.require()

    def fit_chunks(self, measure: Callable[[int], int], free: int) -> None:
        """Find the chunk size that fits, where it is left to us.

        Args:
            measure: rows → peak bytes of a step on that many rows.
            free: bytes that may be used.
        """
        sampler = self._known(self.sampler)
        if self.settings.chunk_size == "auto":
            most = math.ceil(2 * sampler.sample_rate * sampler.size / sampler.world_size)
            rows = rows_that_fit(measure, free, most=max(most, 1))
            sampler.chunk_size = self.chunk_size = self.processes.broadcast(rows)

    # --- the ledger -------------------------------------------------------------------------------

    def ledger_path(self) -> Path | None:
        """Where the ledger is or will be; None if there is to be none."""
        asked = self.settings.ledger
        if asked is False:
            return None
        if asked is not None:
            return Path(str(asked))
        if self.default_ledger is None or self.ledger_name is None:
            return None
        return self.default_ledger / self.ledger_name

    def _open_ledger(self) -> None:
        """Take up all that the ledger knows, on every rank."""
        if self.settings.ledger is None and self.ledger_name is None:
            self.ledger_name = self.processes.broadcast(f"{uuid.uuid4().hex}.jsonl")
        path = self.ledger_path()
        if path is None:
            return

        def read() -> tuple[dict[str, History], bool]:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._ledger = Ledger.open(path, anchor=self.anchor)
            return self._ledger.fits, self._ledger.insecure

        fits, insecure = self.processes.from_first(read)
        self.budget.unite(fits, insecure=insecure)

    def _begin_ledger(self) -> None:
        if self._ledger is None:
            return
        sampler, loader = self._known(self.sampler), self._known(self._loader)
        self._ledger.begin(
            self.budget.fit,
            insecure=self.settings.insecure_seed is not None,
            noise_multiplier=self.budget.next_noise,
            sample_rate=sampler.sample_rate,
            max_grad_norm=self.max_grad_norm,
            delta=self.settings.delta,
            accountant=self.settings.accountant,
            records=sampler.size,
            data_digest=data_digest(loader.dataset),
            sampling=SAMPLING,
            adjacency=ADJACENCY,
        )
        self.anchor = self._ledger.anchor

    def _charge(self, noise_multiplier: float, max_grad_norm: float) -> int:
        """On disk first, then in memory; only then may the step be noised and taken."""
        self.budget.check()
        if self._ledger is not None:
            self._ledger.charge(
                self.budget.fit,
                noise_multiplier=noise_multiplier,
                sample_rate=self._known(self.sampler).sample_rate,
                max_grad_norm=max_grad_norm,
            )
            self.anchor = self._ledger.anchor
        return self.budget.charge()

    # --- one step ---------------------------------------------------------------------------------

    def run(self, batch: Any, compute: Callable[[Any], None]) -> None:
        """Forward and backward on one logical batch, chunk by chunk, clipped and summed.

        Args:
            batch: what the private loader gave.
            compute: runs forward and backward on a chunk of it.

        Raises:
            PrivacyError: if the batch does not hold one row for each sampled record.
        """
        step, sampler = self._known(self._step), self._known(self.sampler)
        if not sampler.drawn:
            raise PrivacyError(
                "Expected a batch of the private loader, got one that its sampler did not draw: "
                "the loader was replaced during the fit, or a batch was used twice. Leave both "
                "to the training loop."
            )
        drawn = sampler.drawn.popleft()
        rows = count_rows(batch)
        if rows != drawn.rows:
            raise PrivacyError(
                f"Expected {drawn.rows} rows, one for each sampled record, got {rows}. The "
                "collate function or a batch hook drops, adds or merges records; let it keep one "
                "row a record."
            )
        step.noise_multiplier = self.budget.next_noise
        if self.settings.clip_schedule is not None:
            at = factor(self.settings.clip_schedule, self.budget.next_step)
            self.max_grad_norm = self.settings.max_grad_norm * at
        step.max_grad_norm = self.max_grad_norm
        step.begin()
        chunks = drawn.chunks
        if self.chunk_size is not None:  # it may have shrunk since the batch was drawn
            chunks = max(chunks, math.ceil(drawn.rows / self.chunk_size))
        for start, stop in even_bounds(drawn.rows, chunks):
            self._run_rows(batch, start, stop, drawn, compute)

    def _run_rows(
        self, batch: Any, start: int, stop: int, drawn: Drawn, compute: Callable[[Any], None]
    ) -> None:
        """Rows start…stop; in halves where they do not fit, with nothing counted twice."""
        step = self._known(self._step)
        rows = stop - start
        chunk = batch if rows == drawn.rows else slice_rows(batch, start, stop, drawn.rows)
        step.expect(rows, min(max(drawn.records - start, 0), rows))
        try:
            compute(chunk)
            self.fold()
            return
        except torch.OutOfMemoryError as error:
            if rows == 1 or self.processes.world_size > 1:
                raise
            step.discard()
            message = str(error).splitlines()[0] if str(error) else "out of memory"
        # Outside the handler: the traceback would keep the tensors that did not fit.
        self.chunk_size = max(1, math.ceil(rows / 2))
        self._known(self.sampler).chunk_size = self.chunk_size
        warnings.warn(
            f"{rows} rows did not fit ({message}); going on with {self.chunk_size} at a time.",
            stacklevel=2,
        )
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        middle = start + self.chunk_size
        self._run_rows(batch, start, middle, drawn, compute)
        self._run_rows(batch, middle, stop, drawn, compute)

    def fold(self) -> None:
        """After a chunk's backward: clip, sum, and forget its raw gradients. Safe to call twice."""
        if self._step is not None and self._step.pending:
            self._step.fold()

    def release(self) -> None:
        """Charge the batch, add the noise, and leave the released gradient in every `p.grad`."""
        step = self._known(self._step)
        step.release()
        self.max_grad_norm = step.max_grad_norm

    def attack_generator(self, device: torch.device) -> torch.Generator:
        """Secret numbers for the random starts of this rank's records in the current step."""
        randomness = self._known(self._randomness)
        return randomness.generator(
            "attack", self.budget.next_step, device, rank=self.processes.rank
        )

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
        if self._ledger is not None:
            self._ledger.close()
        self._step = self._ddp = self._restore_global_rng = self._ledger = None
        self._randomness = self._loader = None

    def facts(self) -> dict[str, Any]:
        """What is known of the run, for parameters and the card."""
        settings, sampler = self.settings, self.sampler
        return {
            "private": self.budget.private,
            "target_epsilon": settings.target_epsilon,
            "delta": settings.delta,
            "noise_multiplier": self.budget.noise_multiplier,
            "max_grad_norm": settings.max_grad_norm,
            "clipping": type(settings.clipping).__name__,
            "sample_rate": self.budget.sample_rate,
            "records": sampler.size if sampler else None,
            "accountant": settings.accountant,
            "adjacency": ADJACENCY,
            "sampling": SAMPLING,
            "secure_noise": settings.secure_noise,
            "selftest": _verdict(settings.selftest, self.selftest),
            "ledger": str(path.name) if (path := self.ledger_path()) else "none",
        }

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run has to know, as plain data; holds no secret."""
        anchor = self.anchor
        return {
            **self.budget.state_dict(),
            "max_grad_norm": self.max_grad_norm,
            "ledger": self.ledger_name,
            "anchor": None if anchor is None else asdict(anchor),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Unite with what a checkpoint spent; what is known here is not forgotten."""
        self.budget.merge(dict(state))
        self.max_grad_norm = state["max_grad_norm"]
        if state["ledger"] is not None:
            self.ledger_name = state["ledger"]
        if state["anchor"] is not None:
            self.anchor = Anchor(**state["anchor"])

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
