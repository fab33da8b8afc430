"""Dry runs of a user's own step on records of the data: before step 0, and again now and then."""

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from defend.batching import memory
from defend.privacy.checks.constant_randomness import seeded
from defend.privacy.checks.dry_run_records import Survey, positions_to_try, survey
from defend.privacy.checks.isolation import Isolation
from defend.privacy.checks.kept_reads import first_read
from defend.privacy.checks.kept_state import remember
from defend.privacy.checks.module_copy import copy_of_module, tensors_of
from defend.privacy.checks.records_on_copy import RecordsOnCopy
from defend.privacy.checks.selftest import RECORDS, SelfTest, Source, selftest
from defend.privacy.checks.state_watch import Key, Numbers, StateWatch
from defend.privacy.checks.step_on_copy import StepOnCopy
from defend.privacy.checks.step_under_test import StepUnderTest
from defend.privacy.gradients.per_record import PerRecordGradients
from defend.privacy.mechanism.gaussian import clip_factors
from defend.privacy.mechanism.generators import Generator, generators_in, objects_in
from defend.privacy.mechanism.user_randomness import UserRandomness

_MOST_TO_CATCH_UP = 1_000
_RECORDS_ALONE = 4  # that are tried where each takes a forward and backward of its own


class DryRun:
    """Runs the self-test, and measures the memory of a step, on a copy of the module.

    Args:
        module: the model itself.
        dataset: map-style, with a length.
        step: what training does with a batch; its `collate` takes the items of all records in one
            list, those of a record's views next to each other.
        max_grad_norm: C.

    Attributes:
        records: how many are tried; all but one of them are in the batch at once.
        pending: whether the whole self-test is still to come.
    """

    def __init__(
        self, module: nn.Module, dataset: Any, step: StepUnderTest, *, max_grad_norm: float
    ) -> None:
        def collate(records: list[list[Any]]) -> Any:
            return step.collate([item for record in records for item in record])

        self.module, self.dataset = module, dataset
        self.step = replace(step, collate=collate, user_code=(*step.user_code, dataset))
        self.max_grad_norm = max_grad_norm
        self.records = RECORDS
        self.pending = False
        self._turn = 0

    def isolate(self, *, may_couple: bool) -> None:
        """From here on each record has a batch of its own.

        Args:
            may_couple: whether the loss may couple the records of a batch, and is taken apart.
        """
        self.step = replace(self.step, isolated=True, may_couple=may_couple)
        self.records = min(self.records, _RECORDS_ALONE)
        self._turn = 0

    def isolation(self) -> Isolation:
        """What puts back between two records what the step kept of the first."""
        code = [part for part in self.step.user_code if part is not self.dataset]
        return Isolation(self.module, code, (*self.step.share, self.dataset))

    def selftest(self, rows: int | None = None, *, whole: bool = False) -> SelfTest | None:
        """The self-test: whole the first time, in short and on other records after that.

        Args:
            rows: rows of an ordinary chunk.
            whole: whether it is to be whole once more.

        Returns:
            None for a data set of fewer than three records: too few to mix.
        """
        turn, self._turn = self._turn, self._turn + 1
        records = self._load(turn, self._generators())
        generators = self._generators()  # loading may have made one
        if len(records) < 3:
            return None
        return selftest(
            self.module,
            records,
            self.step,
            max_grad_norm=self.max_grad_norm,
            rows=rows,
            turn=0 if whole else turn,
            source=Source(self._survey.values, lambda: self._load(turn, generators)),
        )

    @contextmanager
    def caught_up(self, batches: int) -> Iterator[None]:
        """Inside, the collate function was called as often as its copy in a worker.

        This process does not see what that counts. Afterwards all is as it was.

        Args:
            batches: that a worker has put together so far; more than 1,000 count as these.
        """
        records, generators = self._load(0, self._generators()), self._generators()
        undo = remember(objects_in(self.step.user_code, self.step.share, users_only=True))
        try:
            # What fails will do so in the worker, too.
            with seeded(0, (), generators), suppress(Exception):
                for _ in range(min(batches, _MOST_TO_CATCH_UP)):
                    self.step.collate(records)
            yield
        finally:
            undo()

    def peak_bytes(self, rows: int) -> int:
        """Most bytes that a private step on `rows` rows allocates; on a GPU only."""
        count = -(-rows // self.step.views)
        records = self._load(0, self._generators())
        batch = self._batch_of(list(itertools.islice(itertools.cycle(records), count)))
        device = next(self.module.parameters()).device
        with torch.random.fork_rng([device], device_type="cuda"):
            return memory.peak_bytes(lambda: self._step_on(batch, count), device)

    @contextmanager
    def secret_numbers(self) -> Iterator[Callable[..., None]]:
        """Inside, what the user's code draws is secret; gives what renews it."""
        code = (self.module, *self.step.user_code)
        users = UserRandomness(code, self.step.share)
        with users.secret():
            yield users.renew

    def watch(self) -> StateWatch:
        """What notices that something is kept from one step to the next, outside of the step."""
        return StateWatch(self.module, self.step.user_code, self.step.share)

    def first_read(self, kept: Mapping[Key, list[Numbers]]) -> str | None:
        """The name of the first value that gradients depend on, or None.

        Args:
            kept: tensors and arrays of the user's, under what holds them.
        """
        return first_read(self._gradients, kept, half=self.step.half)

    def views_are_alike(self) -> bool:
        """Whether the views of a record are the same rows: K times the work for nothing."""
        batch, views = self._batch_of(self._load(0, self._generators(), one=True)), self.step.views
        rows = tensors_of(batch)
        return not any(bool((t != t[:1]).any()) for t in rows if t.ndim and len(t) == views)

    def free_bytes(self) -> int:
        """Bytes that are left; on a GPU only."""
        return memory.free_bytes(next(self.module.parameters()).device)

    @functools.cached_property
    def _survey(self) -> Survey:
        with seeded(0, (), self._generators()):
            return survey(self.dataset)

    def _generators(self) -> list[Generator]:
        """Those that the code keeps which makes the batches."""
        return generators_in(self.step.user_code, self.step.share)

    def _load(self, turn: int, generators: list[Generator], one: bool = False) -> list[list[Any]]:
        """Records, each as the items that the data set gives for it, one a view."""
        odd = [] if one else self._survey.odd
        with seeded(turn, (), generators):
            positions = positions_to_try(self.dataset, 1 if one else self.records, turn, odd)
            return [[self.dataset[i] for _ in range(self.step.views)] for i in positions]

    def _batch_of(self, records: list[list[Any]]) -> Any:
        """A batch as the step gets it."""
        copy = copy_of_module(self.module, self.step.share)
        try:
            return self.step.prepare(copy, self.step.collate(records))
        finally:
            self.step.restart(copy)

    def _gradients(self) -> dict[str, Tensor] | None:
        """Of some records, attacked if training is, with everything as it is now.

        None where the step fails.
        """
        kind = RecordsOnCopy if self.step.isolated else StepOnCopy
        copy = kind(copy_of_module(self.module, self.step.share), self.step)
        try:
            records = self._load(0, self._generators())
            with copy.seeded(0):
                batch = copy.attacked(records)
            with copy.seeded(0):
                found = copy.gradients(batch, len(records))
        except Exception:
            return None
        finally:
            copy.remove()
        return dict(zip(copy.parameters, found, strict=True))

    def _step_on(self, batch: Any, records: int) -> None:
        """Forward, backward and clip on a copy of the module; nothing is kept."""
        copy, rows = copy_of_module(self.module, self.step.share), records * self.step.views
        engine = PerRecordGradients(copy, views=self.step.views, loss_reduction="sum")
        try:
            engine.expect(rows)
            with torch.enable_grad():
                self.step.backward(self.step.loss(copy, batch) * rows)
            engine.weighted_sum(clip_factors(engine.norms(rows, grouped=False), 1.0))
        finally:
            self.step.restart(copy)
            engine.remove()


def is_due(step: int, epoch: int, *, first_of_epoch: bool) -> bool:
    """Whether to look again: a step may behave one way on its first batch and another later.

    At steps 4, 16, 64, …, and at the start of the second, fifth, 17th, … epoch: warm-ups and late
    starts of any length are found before they went on for long, at a cost that fades.

    Args:
        step: steps of this fit so far.
        epoch: epochs of this fit that are over.
        first_of_epoch: whether the next step is the first of its epoch.
    """
    return (step >= 4 and _is_power_of_four(step)) or (first_of_epoch and _is_power_of_four(epoch))


def _is_power_of_four(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0 and n.bit_length() % 2 == 1
