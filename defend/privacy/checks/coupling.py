"""Does the loss of a batch couple its records? Asked of autograd alone, whatever the layers are.

With G(S) = |S| · ∇loss(S), the plain mean of what each record alone gives has

    G(a, b) − G(a) = G(c, b) − G(c) = g_b

and what mixes records, or divides by what the batch holds, has not. Nor is G(S) the sum of the G of
each record then, or where a row's place in the batch goes into it.
"""

import math
import time
from collections import Counter
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor

from defend.errors import PrivacyError
from defend.privacy.checks.changes import changes_of
from defend.privacy.checks.constant_randomness import ConstantRandomness
from defend.privacy.checks.step_on_copy import StepOnCopy

# Random numbers at several places of their range, and seeds whose first numbers (numpy's and
# Python's) lie there too: what is done with a chance of 2% or 98% is met as well.
PARTS_AND_SEEDS = ((0.37, 35), (0.01, 1751), (0.99, 1470))

_FEWEST, _SECONDS = 4, 0.5  # changes to a record that are tried
_ROUNDINGS = 64  # of the largest gradient, by which differences may be off


def excess(
    copy: StepOnCopy, records: list[Any], part: float, seed: int
) -> tuple[str, float] | None:
    """Where G(S) is not the sum of the G of each record, at these random numbers; None if nowhere.

    Args:
        copy: the step on a copy of the module.
        records: S.
        part: where random tensors stand (`ConstantRandomness`).
        seed: of the other random numbers.
    """
    with ConstantRandomness(part):
        together = [g * len(records) for g in copy.gradient_together(records, seed)]
        alone = [copy.gradient_alone(record, seed) for record in records]
    return copy.difference(together, [sum(parts) for parts in zip(*alone, strict=True)])


def coupling(
    copy: StepOnCopy, one: Any, other: Any, rest: list[Any], part: float = 0.37, seed: int = 0
) -> tuple[str, float] | None:
    """Where the gradient of `rest` in a batch depends on what stands before it; None if nowhere.

    Args:
        copy: the step on a copy of the module.
        one: a record.
        other: another one.
        rest: those that follow the one, and then the other.
        part: where random tensors stand (`ConstantRandomness`).
        seed: of the other random numbers.
    """

    def of(records: list[Any]) -> list[Tensor]:
        return [g * len(records) for g in copy.gradient_together(records, seed)]

    with ConstantRandomness(part):
        pairs = [(of([first, *rest]), of([first])) for first in (one, other)]
    for together, alone in pairs:
        if not finite(alone):  # others make up for it, or it says nothing by itself
            return ("the loss", math.inf) if finite(together) else None
    found, expected = ([a - b for a, b in zip(*pair, strict=True)] for pair in pairs)
    apart = _norm([a - b for a, b in zip(found, expected, strict=True)])
    kind = torch.bfloat16 if copy.step.half else found[0].dtype
    largest = max(_norm(together) for together, _ in pairs)
    if finite(found + expected) and apart <= _ROUNDINGS * torch.finfo(kind).eps * largest:
        return None  # an outlier drowns the rest
    return copy.difference(found, expected)


def finite(gradients: list[Tensor]) -> bool:
    """Whether all numbers of a gradient are."""
    return all(bool(g.isfinite().all()) for g in gradients)


def _norm(gradients: list[Tensor]) -> float:
    return float(torch.stack([g.double().nan_to_num().norm() for g in gradients]).norm())


def refuse_coupled(
    copy: StepOnCopy, records: list[Any], values: list[Counter[int]], count: int
) -> None:
    """Refuse a loss that is no mean of what each record alone gives, to be taken record by record.

    Args:
        copy: the step on a copy of the module.
        records: at least three.
        values: the integers that occur in each field of an item.
        count: records of an ordinary batch: a loss may couple in large ones only.

    Raises:
        PrivacyError: names the mode that would train it, and what it would change.
    """
    start, (one, other, *rest) = time.perf_counter(), records
    try:
        copy.gradient_together([one, other], 0)
    except PrivacyError:
        raise
    except Exception:
        return  # a step on one record, as with batch_size=1
    for part, seed in PARTS_AND_SEEDS:
        _judge(coupling(copy, one, other, rest[:1], part, seed))
    _judge(coupling(copy, one, other, rest))
    if not copy.drew:  # else a record draws other numbers at another place
        _judge(excess(copy, records, *PARTS_AND_SEEDS[0]))
    if count - 1 > len(rest):
        _judge(coupling(copy, one, other, list(islice(cycle(rest), count - 1))))
    if any(device.type != "cpu" for device in copy.devices):
        return  # an index that is out of range stops a GPU for good
    for number, change in enumerate(changes_of(one, values)):
        if number >= _FEWEST and time.perf_counter() - start > _SECONDS:
            break
        try:
            found = coupling(copy, change(one, len(values)), other, rest[:1])
        except PrivacyError:
            raise
        except Exception:  # the step takes no such record
            continue
        _judge(found)


def _judge(found: tuple[str, float] | None) -> None:
    if found is not None:
        raise PrivacyError(
            "Expected a loss that is the plain mean over rows of what each record alone gives, got "
            f"one in which a record's part changes by {found[1]:.0%} at `{found[0]}` with the "
            f"others in the batch. {AS_RECORDS}"
        )


AS_RECORDS = (
    "Compute each row from its own record, and take the mean. Or set engine='record', which trains "
    "on another loss: each record's own mean, in a batch of its own, so without in-batch negatives "
    "and with no weight of one record against another."
)
