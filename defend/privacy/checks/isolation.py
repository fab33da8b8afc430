"""Between two records of a step: whatever the first one left behind is put back."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from defend.privacy.checks.kept_state import Undo, remember, remember_buffers
from defend.privacy.mechanism.generators import is_users, objects_in


class Isolation:
    """What a step keeps while it runs on one record, so that the next one finds nothing of it.

        isolation.begin()                 # a step
        for record in records:
            isolation.next_record()       # the state that `begin` found
            ...
                                          # the last one's stays, like that of any step

    Put back are buffers, frozen weights (up to 64 MB), and what `kept_state.remember` knows:
    attributes, items, cells and globals of the user's code, and numbers in them. What it does not
    know stays the user's promise: large tensors outside of buffers, objects of libraries, files.
    Metrics of torchmetrics go on counting, and lists that are appended to stay as they are: they
    are read by loggers.

    Args:
        module: the model, or a copy of it.
        code: objects beside it whose code runs in a step.
        skip: objects that are not entered, such as a trainer.
    """

    def __init__(self, module: nn.Module, code: Iterable[Any], skip: Iterable[Any]) -> None:
        self._module, self._code = module, tuple(code)
        self._skip = (*skip, *(m for m in module.modules() if _is_metric(m)))
        self._undo: list[Undo] = []
        self._is_first = True

    def begin(self) -> None:
        """A step begins: remember the state."""
        roots, skip = roots_of(self._module, self._code, self._skip)
        objects = objects_in(roots, skip, users_only=True)
        self._undo = [remember(objects, lists_grow=True), remember_buffers(self._module)]
        self._is_first = True

    def next_record(self) -> None:
        """A record begins: put the state back, unless it is the first."""
        if not self._is_first:
            for undo in self._undo:
                undo()
        self._is_first = False


def roots_of(
    module: nn.Module, code: Iterable[Any], skip: Iterable[Any]
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Where a search for what user code keeps begins, and what it does not enter."""
    classes = {type(m) for m in module.modules() if is_users(type(m))}
    tables = [t for m in module.modules() for t in (m._parameters, m._buffers)]
    return (module, *classes, *code), (*skip, *tables)


def _is_metric(module: nn.Module) -> bool:
    return any(kind.__module__.partition(".")[0] == "torchmetrics" for kind in type(module).__mro__)
