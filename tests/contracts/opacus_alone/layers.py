"""Layers that mix the records of a batch, or keep something of them."""

from collections.abc import Callable

from torch import Tensor, nn

from tests.contracts.mistakes import (
    HandWrittenNorm,
    Recurrent,
    RemembersInAWeight,
    RemembersItsInput,
)
from tests.contracts.opacus_alone.yardstick import breaks, judge, of_a_step, private, train
from tests.contracts.outcomes import Outcome
from tests.contracts.small import Wrap, batch, flat, loss, same_weights, sensitivity

BREAKS = breaks()


@BREAKS.add
def batch_norm() -> Outcome:
    return judge(of_a_step(lambda: Wrap(nn.BatchNorm1d(8))))


@BREAKS.add
def batch_norm_affine_false() -> Outcome:
    return judge(of_a_step(lambda: Wrap(nn.BatchNorm1d(8, affine=False))))


@BREAKS.add
def frozen_batch_norm_in_train_mode() -> Outcome:
    return judge(of_a_step(lambda: Wrap(nn.BatchNorm1d(8).requires_grad_(False))))


@BREAKS.add
def hand_written_batch_norm() -> Outcome:
    return judge(of_a_step(lambda: Wrap(HandWrittenNorm())))


@BREAKS.add
def batch_mean_subtracted() -> Outcome:
    return judge(of_a_step(lambda: Wrap(lambda h: h - h.mean(0))))


def _buffers_move(make: Callable[[], nn.Module]) -> Outcome:
    """How far a step moves the module's buffers with one record and without it."""
    x, y = batch()

    def total(x: Tensor, y: Tensor) -> Tensor:
        p = private(make())
        train(p, x, y)
        return flat(p.module.buffers())

    moved = sensitivity(total, x, y)
    verdict = "accepts" if moved > 0 else "safe"
    return Outcome(verdict, f"one record moves a buffer by {moved:.2f}, without noise")


@BREAKS.add
def instance_norm_running_stats() -> Outcome:
    def make() -> nn.Module:
        norm = nn.InstanceNorm1d(1, track_running_stats=True)
        return Wrap(nn.Sequential(nn.Unflatten(1, (1, 8)), norm, nn.Flatten()))

    return _buffers_move(make)


@BREAKS.add
def buffer_filled_from_data() -> Outcome:
    return _buffers_move(lambda: Wrap(RemembersItsInput()))


@BREAKS.add
def weights_changed_in_forward() -> Outcome:
    def total(x: Tensor, y: Tensor) -> Tensor:
        with same_weights():
            layer = RemembersInAWeight()
        p = private(Wrap(layer))
        p.optimizer.zero_grad()
        loss(p.module, x, y).backward()  # and no step at all
        return flat([layer.inner.bias])

    moved = sensitivity(total, *batch())
    verdict = "accepts" if moved > 0 else "safe"
    return Outcome(verdict, f"one record moves a weight by {moved:.2f}, without noise")


@BREAKS.add
def fused_recurrent_layer() -> Outcome:
    return judge(of_a_step(Recurrent))
