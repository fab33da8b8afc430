"""A training step in the parts in which it is tested."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

Loss = Callable[[nn.Module, Any], Tensor]
Attack = Callable[[nn.Module, Any], Any]
ReseededAttack = Callable[[nn.Module, Any, int], Any]
Backward = Callable[[Tensor], None]


def _ignore(turn: int) -> None:
    """A step that is the same in every look."""


@dataclass(frozen=True, kw_only=True)
class StepUnderTest:
    """What training does with a batch, as functions of a module that may be a copy.

    Attributes:
        loss: (module, batch) → the mean loss over the rows of the batch, as training computes it.
        collate: items of the data set → batch on the right device, as training sees it.
        attack: (module, batch) → adversarial batch, or None. It must draw the same numbers at each
            call.
        attack_reseeded: (module, batch, number) → the same attack from other secret numbers, those
            of `number`, to see whether it uses them.
        backward: takes what comes from `loss` through its backward; for a loss that moves the
            weights until then, and has to put them back.
        views: rows of a record, K ≥ 1, next to each other in a batch.
        half: whether the step computes in half precision (autocast), which rounds more.
        share: objects that the module may refer to and that are not to be copied with it.
        user_code: objects beside module and data set whose code runs in a step and may draw random
            numbers: a collate function, a loss, callbacks.
        on_look: called with 0, 1, 2, … before each look at the step.
    """

    loss: Loss
    collate: Callable[[list[Any]], Any]
    attack: Attack | None = None
    attack_reseeded: ReseededAttack | None = None
    backward: Backward = Tensor.backward
    views: int = 1
    half: bool = False
    share: Sequence[Any] = ()
    user_code: Sequence[Any] = ()
    on_look: Callable[[int], None] = _ignore
