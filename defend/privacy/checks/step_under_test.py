"""A training step in the parts in which it is tested."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

Loss = Callable[[nn.Module, Any], Tensor]
Attack = Callable[[nn.Module, Any], Any]
ReseededAttack = Callable[[nn.Module, Any, int], Any]
Backward = Callable[[Tensor], None]


def _as_it_is(module: nn.Module, batch: Any) -> Any:  # noqa: ARG001
    """A batch that no hook sees before the step, or after it."""
    return batch


def _forget_nothing(module: nn.Module) -> None:
    """Of hooks that keep nothing."""


def _ignore() -> None:
    """A step that notes nothing of a look."""


@dataclass(frozen=True, kw_only=True)
class StepUnderTest:
    """What training does with a batch, as functions of a module that may be a copy.

    Attributes:
        loss: (module, batch) → the mean loss over the rows of the batch, as training computes it.
        collate: items of the data set → batch.
        prepare: (module, batch) → the batch on the right device, as the step gets it, after the
            hooks that see it before; they may write to it.
        transfer: (module, batch) → the batch of one record on the right device, after the hooks of
            the transfer; where each record has a batch of its own. `prepare` leaves that out then.
        restart: (module) → None; before each trial: hooks forget what they kept in the last one.
        finish: (module, batch) → None; the hooks that run after the step on a batch. The next step
            has the next number.
        reads_clock: whether the last step asked for its number, or for the epoch.
        attack: (module, batch) → adversarial batch, or None. It must draw the same numbers at each
            call.
        attack_reseeded: (module, batch, number) → the same attack from other secret numbers, those
            of `number`, to see whether it uses them.
        drop_gradients: what the loop does, before the backward, with gradients that the loss left.
        backward: takes what comes from `loss` through its backward; for a loss that moves the
            weights until then, and has to put them back.
        isolated: whether each record has a batch of its own (`RecordBatches`).
        may_couple: whether a loss may couple the records of a batch; where they are isolated.
        views: rows of a record, K ≥ 1, next to each other in a batch.
        half: whether the step computes in half precision (autocast), which rounds more.
        share: objects that the module may refer to and that are not to be copied with it.
        user_code: objects beside module and data set whose code runs in a step and may draw random
            numbers: a collate function, a loss, callbacks.
        on_look: called before each look at the step.
    """

    loss: Loss
    collate: Callable[[list[Any]], Any]
    prepare: Callable[[nn.Module, Any], Any] = _as_it_is
    transfer: Callable[[nn.Module, Any], Any] = _as_it_is
    restart: Callable[[nn.Module], None] = _forget_nothing
    finish: Callable[[nn.Module, Any], Any] = _as_it_is
    reads_clock: Callable[[], bool] = lambda: False
    attack: Attack | None = None
    attack_reseeded: ReseededAttack | None = None
    drop_gradients: Callable[[nn.Module], None] = _forget_nothing
    backward: Backward = Tensor.backward
    isolated: bool = False
    may_couple: bool = True
    views: int = 1
    half: bool = False
    share: Sequence[Any] = ()
    user_code: Sequence[Any] = ()
    on_look: Callable[[], None] = _ignore


def in_double(step: StepUnderTest) -> StepUnderTest:
    """The same step on batches in float64 on the CPU; for a module that is there."""

    def prepare(module: nn.Module, batch: Any) -> Any:
        return tree_map(_double, step.prepare(module, batch))

    return replace(step, prepare=prepare)


def _double(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    return leaf.to("cpu", torch.float64 if leaf.is_floating_point() else leaf.dtype)
