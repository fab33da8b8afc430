"""DP-SGD over the fits of one model: what outlives a fit, and one fit from its start to its end."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from defend.errors import PrivacyError
from defend.privacy.accounting.budget import Budget
from defend.privacy.checks.dry_run import DryRun
from defend.privacy.checks.selftest import SelfTest
from defend.privacy.checks.state_watch import Key
from defend.privacy.checks.step_under_test import StepUnderTest
from defend.privacy.gradients.one_record import OneRecord
from defend.privacy.gradients.per_record import PerRecordGradients
from defend.privacy.mechanism.clipping import checked_noise
from defend.privacy.mechanism.schedules import factor
from defend.privacy.mechanism.shard import Shard
from defend.privacy.mechanism.step import PrivateStep, StepSettings
from defend.training.account import Account, FitAccount
from defend.training.chunks import Chunk, chunks_of, drawn_as
from defend.training.config import Privacy
from defend.training.looks import Looks
from defend.training.private_data import PrivateData
from defend.training.processes import collectives
from defend.training.try_out import TryOut

ADJACENCY = "add or remove one record"
SAMPLING = "Poisson"


class PrivateTraining:
    """What a model's private training keeps from fit to fit.

        data = PrivateData(loader, settings, processes)     # a fit: its secrets and its batches,
        dry_run = training.try_out(module, data, step)      # the self-test before it,
        fit = training.open(optimizer, data, dry_run, ...)
        for batch in data.loader:                           # its steps (`defend.training.step`),
            ...
        fit.close()                                         # and its end, whatever happens

    Args:
        settings: what the user asked for.
        default_ledger: folder of the ledger where `settings.ledger` is None.

    Attributes:
        account: what may be spent, what was, and the ledger.
        max_grad_norm: C; where it is learned or scheduled, that of the last step.
        selftest: what the self-test of the last fit found.
        records: size of the last fit's data set; None before the first.
        engine: that of the last fit, "hooks" or "record"; before the first what was asked for.
    """

    def __init__(self, settings: Privacy, default_ledger: Path | None = None) -> None:
        self.settings = settings
        self.account = Account(settings, default_ledger)
        self.max_grad_norm = settings.max_grad_norm
        self.selftest: SelfTest | None = None
        self.records: int | None = None
        self.engine = settings.engine

    @property
    def budget(self) -> Budget:
        """What may be spent and what was."""
        return self.account.budget

    def try_out(
        self,
        module: nn.Module,
        data: PrivateData,
        step: StepUnderTest,
        *,
        hooks_to_come: bool = False,
    ) -> DryRun:
        """Chunk size and self-test, on records of the data; before `open`.

        Args:
            module: the model.
            data: of this fit.
            step: what training does with a batch.
            hooks_to_come: whether the step may not work yet. If it does not, it is tried out just
                before the first one that is taken.

        Returns:
            What tries the step out again, now and then, in the fit.

        Raises:
            PrivacyError: with everything that was found.
        """
        dry_run = DryRun(module, data.original.dataset, step, max_grad_norm=self.max_grad_norm)
        tried = TryOut(self.settings, dry_run, data, hooks_to_come=hooks_to_come)
        try:
            tried.decide()
        finally:
            self.engine, self.selftest = tried.engine, tried.selftest
        return dry_run

    def open(
        self,
        optimizer: Optimizer,
        data: PrivateData,
        dry_run: DryRun,
        *,
        planned: float,
        done: int,
        ddp: Any = None,
        keep_release: bool = False,
    ) -> "PrivateFit":
        """Fix σ, open the ledger, and install the hooks, until the fit is closed.

        Args:
            optimizer: of the model.
            data: of this fit.
            dry_run: what `try_out` gave for the model and these data.
            planned: steps of the whole training, those done included; inf for no end.
            done: steps of that plan taken before, by a run that is resumed.
            ddp: the DistributedDataParallel around the model, if there is one.
            keep_release: whether the last release is asked for.
        """
        settings, processes, module = self.settings, data.processes, dry_run.module
        with ExitStack() as stack:
            stack.callback(data.forget)
            # Not earlier: a split of the data that is drawn from `seed_everything` has to be the
            # same on all ranks, and the same again in the next run.
            if settings.insecure_seed is None:
                data.sampler.before_batch = stack.enter_context(dry_run.secret_numbers())
            known, rate = data.identity(), data.sampler.sample_rate
            opening = self.account.open(
                processes, module, known, sample_rate=rate, planned=planned, done=done
            )
            account = stack.enter_context(opening)
            # Now, not after steps that are charged.
            budget, learns = account.budget, settings.clipping.learns
            for sigma in budget.planned_noise if learns else {budget.next_noise}:
                checked_noise(settings.clipping, sigma, data.expected_batch_size)
            step = PrivateStep(
                module,
                optimizer,
                StepSettings(
                    noise_multiplier=account.budget.next_noise,
                    max_grad_norm=self.max_grad_norm,
                    expected_batch_size=data.expected_batch_size,
                    clipping=settings.clipping,
                    views=settings.views,
                    loss_reduction="sum",
                    keep_release=keep_release,
                    shard=Shard(processes.rank, processes.world_size),
                    engine=OneRecord if data.isolated else PerRecordGradients,
                ),
                randomness=data.randomness,
                charge=account.charge,
            )
            stack.callback(step.close)
            self._begin(account, data)
            if isinstance(ddp, DistributedDataParallel):
                _let_ranks_run_alone(ddp, stack)
            return PrivateFit(self, data, account, step, dry_run, stack.pop_all())

    def _begin(self, account: FitAccount, data: PrivateData) -> None:
        self.records = data.sampler.size
        account.begin(
            data.processes,
            max_grad_norm=self.max_grad_norm,
            records=data.sampler.size,
            clipping=repr(self.settings.clipping),
            sampling=SAMPLING,
            adjacency=ADJACENCY,
        )

    def facts(self) -> dict[str, Any]:
        """What is known of the run, for parameters and the card."""
        settings, ledger = self.settings, self.account.path
        return {
            "private": self.budget.private,
            "target_epsilon": settings.target_epsilon,
            "delta": settings.delta,
            "noise_multiplier": self.budget.noise_multiplier,
            "max_grad_norm": settings.max_grad_norm,
            "clipping": repr(settings.clipping),
            "views": settings.views,
            "engine": self.engine,
            "sample_rate": self.budget.sample_rate,
            "records": self.records,
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
        if self.settings.clipping.learns:  # else C is what was asked for
            self.max_grad_norm = state["max_grad_norm"]


class PrivateFit:
    """One private fit, open until `close`; `PrivateTraining.open` makes it."""

    def __init__(
        self,
        training: PrivateTraining,
        data: PrivateData,
        account: FitAccount,
        step: PrivateStep,
        dry_run: DryRun,
        stack: ExitStack,
    ) -> None:
        self.data, self.account, self.step = data, account, step
        self._training, self._dry_run, self._stack = training, dry_run, stack
        self.watch = dry_run.watch()
        self._isolation = dry_run.isolation() if data.isolated else None
        self._tried: set[str] = set()  # what the step writes to, and was tried out doing so
        self._unread: set[Key] = set()  # what was written to between steps, and is not used
        self._looks = Looks(data.coin, alone=data.processes.world_size == 1)
        data.sampler.next_step = account.budget.next_step

    def renew_randomness(self, *, search: bool = False) -> None:
        """Whatever seeds were set since, user code draws secret numbers from here on.

        Args:
            search: whether hooks may have made a generator.
        """
        self.data.sampler.before_batch(search=search)

    def chunks(self, batch: Any) -> Iterator[Chunk]:
        """Begin a logical batch, and give its chunks; each is to be run within `with chunk:`.

        Raises:
            PrivacyError: if the batch does not hold its rows for each sampled record.
        """
        training, step, budget = self._training, self.step, self.account.budget
        drawn = drawn_as(batch, self.data)
        due = self._looks.are_due(self.data.sampler.epochs)
        if self._dry_run.pending:
            self._dry_run.pending = False
            self.look(whole=True)
        elif due and training.settings.selftest:
            self.look()
        step.noise_multiplier = budget.next_noise
        schedule = training.settings.clip_schedule
        if schedule is not None:
            at = factor(schedule, budget.next_step)
            training.max_grad_norm = training.settings.max_grad_norm * at
        step.max_grad_norm = training.max_grad_norm
        step.begin()
        if self._isolation is not None:
            self._isolation.begin()
        before = collectives()
        for number, chunk in enumerate(chunks_of(batch, drawn, step, self.data)):
            if self._isolation is not None:
                self._isolation.next_record()
            # An attack, or the chunk before, may have seeded.
            self.renew_randomness(search=number == 0)
            yield chunk
            if self._isolation is not None and collectives() != before:
                raise PrivacyError(
                    "Expected a step on one record that talks to no other process, got an "
                    "operation of several processes within it (all_reduce, all_gather): the "
                    "records of other processes go into this one's gradient. Leave it out."
                )
        self._note_state()

    def _note_state(self) -> None:
        """The step is over: remember what is kept, all of it at the ends of epochs."""
        if not self._training.settings.selftest:
            return
        deep = self._is_deep(self._looks.steps)
        new = set(self.watch.note(deep=deep)) - self._tried
        if new:  # it writes to a buffer: counts, or what?
            self._tried |= new
            self.look(whole=True)
            self.watch.note(deep=deep)  # a look loads records, and a data set may remember that

    def _is_deep(self, steps: int) -> bool:
        """Whether all that is kept is looked at around a step: the first, the last of an epoch."""
        return steps == 1 or steps % self.data.sampler.steps == 0 or self.data.ends_epoch()

    def end_pass(self) -> None:
        """A loop of one's own asks for no more batches, sooner than expected perhaps."""
        if self._training.settings.selftest:
            self.watch.deepen()

    def take_state(self, *, inside: bool) -> list[str]:
        """A step begins: names of what changed since the last one.

        Args:
            inside: whether what changes within the step is to be noted, too.
        """
        return self.watch.take(inside=inside and self._is_deep(self._looks.steps + 1))

    def doubt(self) -> None:
        """Something was found that no look shows: mark the account since the last one."""
        self.account.doubt(self._looks.good)

    def first_read(self) -> str | None:
        """The name of the first value that changed between two steps and that the step reads.

        Each is tried once from look to look.
        """
        new = {key: kept for key, kept in self.watch.written.items() if key not in self._unread}
        with self.step.paused():
            found = self._dry_run.first_read(new) if new else None
        self._unread |= set(new)
        return found

    def look(self, *, whole: bool = False) -> None:
        """The self-test on a copy of the module as it is now, in short or `whole`.

        Raises:
            PrivacyError: for what it finds; the account is no longer `private` then.
        """
        self._unread.clear()
        with self._looks.timed():
            with self.step.paused(), self._as_in_workers():
                found = self._dry_run.selftest(whole=whole)
            if whole:
                self._training.selftest = found
            if found is None or found.passed:
                return
            self._training.selftest = found
            if found.hides_rows and self._looks.steps <= 1:
                raise found.error()  # nothing was spent yet, and nothing is unsound
            self.doubt()
            raise PrivacyError(
                f"{found.error()}\nThe last look that found nothing was after step "
                f"{self._looks.good} of this fit. What its steps spent since then is not known: "
                "the account is marked as not private."
            )

    def _as_in_workers(self) -> AbstractContextManager[None]:
        """Inside, the collate function is where its copies in workers are, which stay for a fit."""
        loader = self.data.original
        if not loader.num_workers or not loader.persistent_workers:
            return nullcontext()
        return self._dry_run.caught_up(self._looks.steps // loader.num_workers)

    def fold(self) -> None:
        """After a chunk's backward: clip, sum, and forget its raw gradients. Safe to call twice."""
        if self.step.pending:
            self.step.fold()

    def release(self) -> None:
        """Charge the batch, add the noise, and leave the released gradient in every `p.grad`."""
        self.step.release()
        self.data.sampler.next_step = self.account.budget.next_step
        self.data.released = self.step.released
        self._training.max_grad_norm = self.step.max_grad_norm

    def close(self) -> None:
        """Remove every hook, every secret and every private gradient; safe to call twice."""
        self._stack.close()


def _let_ranks_run_alone(ddp: DistributedDataParallel, stack: ExitStack) -> None:
    """Sums are added up after clipping, by `PrivateStep`; averaged gradients are no use, and ranks
    may run different numbers of chunks, so no forward may wait for another rank."""
    for name in ("require_backward_grad_sync", "require_forward_param_sync"):
        setattr(ddp, name, False)
        stack.callback(setattr, ddp, name, True)


def _verdict(asked: bool, found: SelfTest | None) -> str:
    if not asked:
        return "off"
    return "not run" if found is None else "passed" if found.passed else "failed"
