"""A test of the user's own step before the first real one: is a record's gradient its own?

Structure can be refused by looking at it (`preconditions`); what a forward or a loss *does* cannot.
So the step is tried, on a copy of the module and a few records:

1. **Alone or together.** The gradient of a record in a batch, as the per-record hooks report it,
   is the gradient that autograd finds for the record in a batch of its own. Batch statistics,
   weighted or summed losses, mixed, dropped or doubled rows and weights that the hooks miss fail.
2. **Leave one out.** Without one record the clipped sum moves by at most C, attack included.
3. **Replace one.** With another record in its place, nothing about the other records changes, under
   real random numbers (the same ones): not their gradients, nor their adversarial versions.
4. **No trace.** The attack leaves gradients, modes, buffers and random state as they were; the
   step moves no weights, and no buffer takes up what the records hold.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from defend.errors import InputError, PrivacyError
from defend.privacy.checks.comparisons import Comparisons
from defend.privacy.checks.module_copy import copy_of_module
from defend.privacy.checks.step_on_copy import StepOnCopy
from defend.privacy.checks.step_under_test import StepUnderTest

RECORDS = 7  # six in the batch, one to take another's place


@dataclass(frozen=True)
class SelfTest:
    """What the self-test found.

    Attributes:
        findings: one sentence for each break, with its cure; empty when there is none.
        largest_move: how far leaving one record out moved the clipped sum, in units of C. Computed
            from the data without noise: look at it, but do not publish it.
        seconds: how long it took.
    """

    findings: tuple[str, ...]
    largest_move: float
    seconds: float

    @property
    def passed(self) -> bool:
        return not self.findings

    def error(self) -> PrivacyError:
        """What lists the findings."""
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
        turn: 0 for the whole test; 1, 2, … for another look later on: the first part, under other
            random numbers each time, and with an attack the third, since an attack goes other ways
            once the model has learned something.


    Returns:
        The findings; `require()` raises if there are any.

    Raises:
        InputError: for fewer than 3 records.
        PrivacyError: if the module cannot be copied.
    """
    start = time.perf_counter()
    if len(records) < 3:
        raise InputError(f"Expected at least 3 records for the self-test, got {len(records)}.")
    step.on_look(turn)
    copy = StepOnCopy(copy_of_module(module, step.share), step)
    comparisons = Comparisons(copy, list(records), max_grad_norm)
    findings: tuple[str, ...] = ()
    largest = 0.0
    try:
        with copy.seeded(0):
            if turn == 0:
                largest = comparisons.all_parts(rows)
            else:
                comparisons.later_parts(turn)
    except PrivacyError as error:  # ours, or what reading the gradients found by itself
        findings = (str(error),)
    finally:
        copy.remove()
    return SelfTest(findings, largest, time.perf_counter() - start)
