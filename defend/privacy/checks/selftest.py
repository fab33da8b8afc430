"""A test of the user's own step before the first real one: is a record's gradient its own?

Structure can be refused by looking at it (`preconditions`); what a forward or a loss *does* cannot.
So the step is tried, on a copy of the module and a few records:

1. **Alone or together.** The gradient of a record in a batch, as the per-record hooks report it,
   is the gradient that autograd finds for the record in a batch of its own. Batch statistics,
   weighted or summed losses, mixed, dropped or doubled rows and weights that the hooks miss fail.
2. **Leave one out.** Without one record the clipped sum moves by at most C, attack included.
3. **Replace one.** With another record in its place, nothing about the other records changes, under
   real random numbers (the same ones): not their gradients, nor their adversarial versions. Nor do
   their gradients with a record there that is changed field by field: to each value that occurs in
   the data, rare ones first, to an outlier and to zeros. In float64 where the step takes it, so
   that no slack for rounding hides a coupling.
4. **No trace.** The attack leaves gradients, modes, buffers and random state as they were; the step
   moves no weights, and no buffer or frozen weight takes up what the records hold. The step that
   follows does not depend on who was in the batch before it.

Where each record has a batch of its own (`engine="record"`), rows cannot meet, and the test asks
what a step keeps (`record_comparisons`); where defend chose that by itself, also whether the loss
is the plain mean that it takes it for (`coupling`).
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from defend.errors import IndistinctRowsError, InputError, PrivacyError
from defend.privacy.checks.changes import occurring_values
from defend.privacy.checks.comparisons import Comparisons
from defend.privacy.checks.coupling import refuse_coupled
from defend.privacy.checks.module_copy import copy_of_module
from defend.privacy.checks.rare_records import Effort, refuse_rare_couplings
from defend.privacy.checks.record_comparisons import RecordComparisons
from defend.privacy.checks.records_on_copy import RecordsOnCopy
from defend.privacy.checks.step_on_copy import StepOnCopy
from defend.privacy.checks.step_under_test import StepUnderTest, in_double

RECORDS = 7  # six in the batch, one to take another's place
_SECONDS = 0.5  # for rare records, at the start
_MOST_IN_DOUBLE = 2**22  # weights: 200 MB for the gradients of six records


@dataclass(frozen=True)
class Source:
    """Where the records of a test are from.

    Attributes:
        values: the integers that occur in each field of an item (`occurring_values`).
        reload: loads the same records anew; None where nothing that a step does changes them.
    """

    values: list[Counter[int]]
    reload: Callable[[], list[Any]] | None = None


@dataclass(frozen=True)
class SelfTest:
    """What the self-test found.

    Attributes:
        findings: one sentence for each break, with its cure; empty when there is none.
        largest_move: how far leaving one record out moved the clipped sum, in units of C. Computed
            from the data without noise: look at it, but do not publish it.
        seconds: how long it took.
        hides_rows: whether the finding is that rows cannot be told apart, and that is all.
    """

    findings: tuple[str, ...]
    largest_move: float
    seconds: float
    hides_rows: bool = False

    @property
    def passed(self) -> bool:
        return not self.findings

    def error(self) -> PrivacyError:
        """What lists the findings."""
        if self.hides_rows:
            return IndistinctRowsError(self.findings[0])
        return PrivacyError(
            "The self-test on your own step and data found that this run would not be "
            "private.\n" + "\n".join(f"- {finding}" for finding in self.findings)
        )

    def require(self) -> None:
        """Raise a `PrivacyError` that lists the findings, if there are any."""
        if self.findings:
            raise self.error()


def selftest(
    module: nn.Module,
    records: Sequence[Any],
    step: StepUnderTest,
    *,
    max_grad_norm: float = 1.0,
    rows: int | None = None,
    turn: int = 0,
    source: Source | None = None,
) -> SelfTest:
    """Try the step on a copy of `module` and report whatever breaks the guarantee.

    Args:
        module: the model, in the modes that it trains in. Neither it nor its state is changed.
        records: at least 3 items of the data set, best 7, different in content and label.
            `step.collate` makes `step.views` rows of each.
        step: what training does with a batch.
        max_grad_norm: C.
        rows: rows of an ordinary batch, views included; the records are repeated up to it in one
            more comparison with a record alone, since a step may do with many rows what it cannot
            do with six.
        turn: 0 for the whole test; 1, 2, … for another look later on: a record alone and together,
            under other random numbers each time, one replaced, and one change to a record.
        source: where the records are from; None where nothing else is known of it.

    Returns:
        The findings; `require()` raises if there are any.

    Raises:
        InputError: for fewer than 3 records.
        PrivacyError: if the module cannot be copied.
    """
    start = time.perf_counter()
    if len(records) < 3:
        raise InputError(f"Expected at least 3 records for the self-test, got {len(records)}.")
    step.on_look()
    on_copy, compare = StepOnCopy, Comparisons
    if step.isolated:
        on_copy, compare = RecordsOnCopy, RecordComparisons
    copy = on_copy(copy_of_module(module, step.share), step)
    source = source or Source(occurring_values(records))
    comparisons = compare(copy, list(records), max_grad_norm, source.reload)
    findings: tuple[str, ...] = ()
    largest, hides_rows = 0.0, False
    try:
        with copy.seeded(0):
            if turn == 0:
                largest = comparisons.all_parts(rows)
            else:
                comparisons.later_parts(turn)
            if turn == 0 and not step.may_couple:
                count = (rows or 0) // step.views
                refuse_coupled(copy, list(records), source.values, count)
            if not step.isolated:
                _try_rare_ones(module, comparisons, source.values, turn)
    except PrivacyError as error:  # ours, or what reading the gradients found by itself
        hides_rows = isinstance(error, IndistinctRowsError)
        findings = (error.args[0],)
    finally:
        copy.remove()
    return SelfTest(findings, largest, time.perf_counter() - start, hides_rows)


def _try_rare_ones(
    module: nn.Module, comparisons: Comparisons, values: list[Counter[int]], turn: int
) -> None:
    """In float64 where the step takes it, else as it trains; on a GPU only where it does.

    An index that is out of range stops a GPU for good, so nothing is tried there.
    """
    step, records = comparisons.step, comparisons.records
    effort = Effort(fewest=1, turn=turn) if turn else Effort(fewest=4, seconds=_SECONDS)
    small = sum(p.numel() for p in module.parameters()) <= _MOST_IN_DOUBLE
    if turn == 0 and small and not step.half:
        copy = StepOnCopy(copy_of_module(module, step.share).to("cpu").double(), in_double(step))
        copy.draws, copy.keeps = comparisons.copy.draws, comparisons.copy.keeps
        try:
            if refuse_rare_couplings(copy, records, values, effort):
                return
        finally:
            copy.remove()
    if all(device.type == "cpu" for device in comparisons.copy.devices):
        refuse_rare_couplings(comparisons.copy, records, values, effort)
