"""Do other records' gradients stand still, whatever one record holds?"""

import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from defend.errors import PrivacyError
from defend.privacy.checks.changes import Change, changes_of
from defend.privacy.checks.constant_randomness import ConstantRandomness
from defend.privacy.checks.coupling import AS_RECORDS
from defend.privacy.checks.step_on_copy import StepOnCopy


@dataclass(frozen=True)
class Effort:
    """How many changes are tried.

    Attributes:
        fewest: in any case.
        seconds: for further ones.
        turn: 0 begins with the first one; 1, 2, … with later ones.
    """

    fewest: int
    seconds: float = 0.0
    turn: int = 0


def refuse_rare_couplings(
    copy: StepOnCopy, records: list[Any], values: list[Counter[int]], effort: Effort
) -> bool:
    """The first of some records is changed, field by field; the gradients of the others stay.

    A trial that ends in an error proves nothing.

    Args:
        copy: the step on a copy of the module, best in float64: then no slack for rounding hides a
            coupling.
        records: items of a data set, or lists of these, one a view.
        values: the integers that occur in each field of an item.
        effort: how many changes are tried.

    Returns:
        Whether the step takes the records as they are.

    Raises:
        PrivacyError: for what it finds.
    """
    start, (usual, *rest) = time.perf_counter(), records
    with ConstantRandomness():
        plain = _others(copy, usual, rest)
        if plain is None:
            return False
        changes = changes_of(usual, values)
        first = effort.turn * effort.fewest % max(len(changes), 1)
        for number, change in enumerate(changes[first:] + changes[:first]):
            if number >= effort.fewest and time.perf_counter() - start > effort.seconds:
                break
            fields = len(values)
            rare = change(usual, fields)
            _judge(copy, _others(copy, rare, rest), plain, change)
            if copy.keeps:  # perhaps only what is rare
                found, expected = (_others_after(copy, first, rest) for first in (rare, usual))
                _judge(copy, found, expected, change)
            if change.of_all:
                alike = [change(record, fields) for record in rest]
                _judge(copy, _others(copy, rare, alike), _others(copy, usual, alike), change)
    return True


def _others(copy: StepOnCopy, first: Any, rest: list[Any]) -> list[Tensor] | None:
    """Gradients of all but the first record; None where the step takes no such batch."""
    taken = _first_step(copy, [first, *rest])
    return None if taken is None else [g[1:] for g in taken[1]]


def _others_after(copy: StepOnCopy, first: Any, rest: list[Any]) -> list[Tensor] | None:
    """The same in the step after the one that had the first record in it."""
    taken = _first_step(copy, [first, *rest])
    if taken is None:
        return None
    with copy.seeded(3):
        batch = copy.next_attacked(taken[0], lambda: rest)
    with copy.seeded(3):
        return copy.gradients(batch, len(rest))


def _first_step(copy: StepOnCopy, records: list[Any]) -> tuple[Any, list[Tensor]] | None:
    """The batch of some records, and the gradient of each; None where the step takes no such."""
    try:
        with copy.seeded(2):
            batch = copy.batch_of(records)
        with copy.seeded(2):
            return batch, copy.gradients(batch, len(records))
    except PrivacyError:
        raise
    except Exception:
        return None


def _judge(
    copy: StepOnCopy, found: list[Tensor] | None, expected: list[Tensor] | None, change: Change
) -> None:
    if found is None or expected is None:
        return
    worst = copy.difference(found, expected, same_shapes=True)
    if worst is not None:
        raise PrivacyError(
            "Expected the gradients of other records to stay whatever one record holds, got a "
            f"change of {worst[1]:.2%} at `{worst[0]}` for a record with {change.name}. The loss "
            "is divided by what the batch holds (labelled tokens, weights, lengths), or an "
            "outlier, a maximum or another statistic of the batch goes into each row, or is kept "
            f"for the next batch. {AS_RECORDS}"
        )
