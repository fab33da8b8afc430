"""What the user's code keeps: on the copy of a module, in functions, globals and classes."""

import contextlib
import copy
import functools
import types
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from defend.privacy.checks.module_copy import same
from defend.privacy.mechanism.generators import is_users, names_in

# No subclasses: those of libraries may do other things when they are filled.
_CONTAINERS = (dict, list, set, deque, OrderedDict, defaultdict, Counter)
_MOST_ITEMS = 1_000
# Bytes of a tensor or an array, and of all of them: what is larger is not copied, nor put back.
_LARGE, _ALL = 2**22, 2**26


Undo = Callable[[], bool]  # puts something back; whether it had changed


def remember(objects: Iterable[Any], *, lists_grow: bool = False) -> Undo:
    """Remember what objects hold; returns what puts it back, and says whether anything changed.

    Looked at are cells and globals of functions, attributes of classes and objects of the user's
    and of modules, items of built-in containers, and the values of tensors and arrays in all of
    them. Only what changed is written to. Large things, and objects of other kinds, stay as they
    are, and so do weights and buffers.

    Args:
        objects: from `objects_in`.
        lists_grow: whether lists that were only appended to stay as they are.
    """
    undo: list[Undo] = []
    left = [_ALL]
    for value in objects:
        if isinstance(value, types.FunctionType):
            undo += _of_function(value, left)
        elif isinstance(value, type):
            undo += _of_class(value, left)
        elif not isinstance(value, DataLoader):
            undo += _of_container(value, left, lists_grow)

    return partial(_put_back, undo)


def remember_buffers(module: nn.Module) -> Undo:
    """The same of buffers, and of frozen weights where all together are not too large."""
    undo: list[Undo] = []
    for m in module.modules():
        if isinstance(m._buffers, dict) and m._buffers:  # TorchScript has something else
            undo.append(partial(_refill, m._buffers, dict(m._buffers)))
    frozen = [p for p in module.parameters() if not p.requires_grad and not p.is_meta]
    if sum(p.nbytes for p in frozen) > _ALL:
        frozen = []
    held = [*(b for b in module.buffers() if not b.is_meta), *frozen]
    undo += [partial(_rewrite, b, b.detach().clone()) for b in held]

    return partial(_put_back, undo)


def _put_back(undo: list[Undo]) -> bool:
    return sum(step() for step in undo) > 0  # all of them


def _of_function(function: types.FunctionType, left: list[int]) -> Iterator[Undo]:
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # an empty one
            yield partial(_refill_cell, cell, cell.cell_contents)
            yield from _of_values([cell.cell_contents], left)
    space = function.__globals__
    named = {name: space[name] for name in names_in(function.__code__) if name in space}
    yield partial(_refill_names, space, named)
    yield from _of_values(named.values(), left)


def _of_class(kind: type, left: list[int]) -> Iterator[Undo]:
    if is_users(kind):
        for name, value in list(vars(kind).items()):
            if not name.startswith("__"):
                yield partial(_rebind, kind, name, value)
        yield from _of_values(vars(kind).values(), left)


def _of_container(value: Any, left: list[int], lists_grow: bool) -> Iterator[Undo]:
    held = value if type(value) in _CONTAINERS else None
    if isinstance(value, nn.Module) or (
        is_users(type(value)) and not isinstance(value, types.ModuleType)
    ):
        held = getattr(value, "__dict__", None)
    for name in _slots_of(type(value)):  # type: ignore[arg-type]
        with contextlib.suppress(AttributeError):  # an empty one
            yield partial(_reset, value, name, getattr(value, name))
            yield from _of_values([getattr(value, name)], left)
    if held is not None and len(held) <= _MOST_ITEMS:
        if lists_grow and type(held) is list:
            yield partial(_refill_unless_grown, held, copy.copy(held))
        else:
            yield partial(_refill, held, copy.copy(held))
        yield from _of_values(held.values() if isinstance(held, dict) else held, left)


def _of_values(values: Iterable[Any], left: list[int]) -> Iterator[Undo]:
    """The numbers in tensors and arrays, as long as there are bytes left for copies."""
    for value in values:
        plain = isinstance(value, Tensor) and value.layout is torch.strided and not value.is_meta
        numbers = isinstance(value, np.ndarray) and value.dtype.kind in "biufc"
        if not (plain or (numbers and value.flags.writeable)):
            continue
        if value.nbytes <= min(_LARGE, left[0]):
            left[0] -= value.nbytes
            yield partial(_rewrite, value, value.detach().clone() if plain else value.copy())


@functools.cache
def _slots_of(kind: Any) -> list[str]:
    """Names of the slots that classes of the user's give their objects."""
    kinds = [base for base in kind.__mro__ if is_users(base)]
    return [
        name
        for base in kinds
        for name, part in vars(base).items()
        if isinstance(part, types.MemberDescriptorType)
    ]


def _reset(owner: Any, name: str, value: Any) -> bool:
    changed = getattr(owner, name, None) is not value
    if changed:
        setattr(owner, name, value)
    return changed


def _rebind(kind: type, name: str, value: Any) -> bool:
    changed = vars(kind).get(name) is not value
    if changed:
        setattr(kind, name, value)
    return changed


def _refill_cell(cell: types.CellType, held: Any) -> bool:
    try:
        changed = cell.cell_contents is not held
    except ValueError:  # it was emptied
        changed = True
    cell.cell_contents = held
    return changed


def _refill_names(space: dict[str, Any], named: dict[str, Any]) -> bool:
    changed = {name: value for name, value in named.items() if space.get(name) is not value}
    space.update(changed)
    return bool(changed)


def _refill(container: Any, held: Any) -> bool:
    """Only what differs is written: other threads may read."""
    if isinstance(container, dict):
        same = len(container) == len(held) and all(map(is_, container.values(), held.values()))
        if same and all(map(is_, container, held)):
            return False
        changed = {k: v for k, v in held.items() if k not in container or container[k] is not v}
        new = [key for key in container if key not in held]
        for key in new:
            del container[key]
        container.update(changed)
        return bool(changed or new)
    if isinstance(container, set):
        changed_set = container != held
        container.intersection_update(held)
        container.update(held)
        return changed_set
    if len(container) == len(held) and all(a is b for a, b in zip(container, held, strict=True)):
        return False
    if isinstance(container, list):
        container[:] = held
    else:
        container.clear()
        container.extend(held)
    return True


def _refill_unless_grown(container: list[Any], held: list[Any]) -> bool:
    if len(container) >= len(held) and all(map(is_, container, held)):
        return False
    return _refill(container, held)


def _rewrite(target: Any, held: Any) -> bool:
    if isinstance(target, np.ndarray):
        changed = not np.array_equal(target, held, equal_nan=target.dtype.kind in "fc")
    else:
        changed = not same(target.detach(), held)
    if changed and isinstance(target, Tensor):
        target.data.copy_(held)
    elif changed:
        target[...] = held
    return changed
