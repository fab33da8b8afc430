"""Layers that mix the records of a batch, or keep something of them."""

from torch import nn

from tests.contracts import mistakes
from tests.contracts.defend_does.yardstick import Plain, breaks, fit, judge, largest_move, measure
from tests.contracts.outcomes import Outcome
from tests.contracts.small import Wrap

BREAKS = breaks()


@BREAKS.add
def batch_norm() -> Outcome:
    return measure(lambda: Wrap(nn.BatchNorm1d(8)))


@BREAKS.add
def batch_norm_affine_false() -> Outcome:
    return measure(lambda: Wrap(nn.BatchNorm1d(8, affine=False)))


@BREAKS.add
def frozen_batch_norm_in_train_mode() -> Outcome:
    return measure(lambda: Wrap(nn.BatchNorm1d(8).requires_grad_(False)))


@BREAKS.add
def hand_written_batch_norm() -> Outcome:
    return measure(lambda: Wrap(mistakes.HandWrittenNorm()))


@BREAKS.add
def batch_mean_subtracted() -> Outcome:
    return measure(lambda: Wrap(lambda h: h - h.mean(0)))


def _accepted(module: nn.Module) -> Outcome:
    fit(Plain(module))
    return Outcome("open", "it went on")


@BREAKS.add
def instance_norm_running_stats() -> Outcome:
    norm = nn.InstanceNorm1d(1, track_running_stats=True)
    return _accepted(Wrap(nn.Sequential(nn.Unflatten(1, (1, 8)), norm, nn.Flatten())))


@BREAKS.add
def buffer_filled_from_data() -> Outcome:
    return _accepted(Wrap(mistakes.RemembersItsInput()))


@BREAKS.add
def weights_changed_in_forward() -> Outcome:
    return _accepted(Wrap(mistakes.RemembersInAWeight()))


@BREAKS.add
def fused_recurrent_layer() -> Outcome:
    return judge(largest_move(mistakes.Recurrent))
