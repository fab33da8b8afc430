"""What the per-record hooks do not see as the user means it."""

from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from defend import PrivacyError
from defend.privacy.checks.selftest import RECORDS
from tests.contracts import mistakes
from tests.contracts.defend_does.yardstick import (
    Plain,
    Released,
    breaks,
    dp,
    fit,
    holds,
    judge,
    largest_move,
    measure,
)
from tests.contracts.outcomes import Outcome
from tests.contracts.small import (
    ROWS,
    TOLERANCE,
    batch,
    net,
    off_reference,
    same_weights,
)

BREAKS = breaks()


def released_sum(module: nn.Module, x: Tensor, y: Tensor, **settings: object) -> Tensor:
    """What one step on all records releases, times their number."""
    spy = Released()
    callback = dp(**{"insecure_seed": 7, "noise_multiplier": 0.0, "ledger": False, **settings})
    fit(Plain(module), DataLoader(TensorDataset(x, y), len(x)), callback, (spy,))
    return spy.gradients[0] * len(x)


def _equals_reference(make: Callable[[], nn.Module], x: Tensor, y: Tensor) -> Outcome:
    """Sensitivity, and whether the release is what a loop over records gives."""
    with same_weights():
        got = released_sum(make(), x, y, max_grad_norm=1.0)
    with same_weights():
        off = off_reference(got, make(), x, y)
    if off > TOLERANCE:
        return Outcome("open", f"the gradient is {off:.0%} off")
    return judge(largest_move(make, data=(x, y)))


@BREAKS.add
def tied_weights() -> Outcome:
    return _equals_reference(lambda: mistakes.Words("layer"), *mistakes.words())


@BREAKS.add
def weight_outside_module() -> Outcome:
    return _equals_reference(lambda: mistakes.Words("function"), *mistakes.words())


@BREAKS.add
def weight_outside_module_ghost() -> Outcome:
    """There is no ghost mode; the weight is found in the only mode there is."""
    return weight_outside_module()


@BREAKS.add
def clip_scheduler_in_ghost_mode() -> Outcome:
    """A schedule takes C to a tenth: gradients and noise have to follow it alike."""
    schedule = {"clip_schedule": lambda step: 0.1}
    x, y = batch()
    quiet, loud = (
        released_sum(net(), x, y, noise_multiplier=s, max_grad_norm=0.1, **schedule)
        for s in (0.0, 1.0)
    )
    alone = (
        released_sum(net(), x[1:], y[1:], noise_multiplier=0.0, max_grad_norm=0.1, **schedule)
        - quiet
    )
    moved, deviation = float(alone.norm()) / 0.01, float((loud - quiet).std()) / 0.01
    right = moved <= 1 + TOLERANCE and abs(deviation - 1) < 0.4
    return holds(right, f"clip_schedule: {moved:.2f} C' moved, noise follows C'")


@BREAKS.add
def direct_parameter() -> Outcome:
    return _equals_reference(mistakes.Direct, *batch())


@BREAKS.add
def position_table_broadcast() -> Outcome:
    return measure(lambda: mistakes.Positions(5))


@BREAKS.add
def position_table_as_long_as_the_batch() -> Outcome:
    """As many places as records, in the data or in the self-test's own batch of six."""
    with suppress(PrivacyError):
        return measure(lambda: mistakes.Positions(ROWS))
    return measure(lambda: mistakes.Positions(RECORDS - 1))


@BREAKS.add
def sequence_first_batch() -> Outcome:
    return measure(net, mistakes.positions_before_records, mistakes.sequences())


@BREAKS.add
def records_flattened_into_rows() -> Outcome:
    return measure(net, mistakes.tokens_as_rows, mistakes.sequences())


@BREAKS.add
def gradient_checkpointing() -> Outcome:
    return _equals_reference(mistakes.Checkpointed, *batch())


@BREAKS.add
def compiled_module() -> Outcome:
    return measure(lambda: torch.compile(net(), backend="eager"))
