"""Records as rare as a data set may hold: one of its records, changed in one field.

A few records seldom hold what a coupling waits for: a rare label, a length, a mask, an ignored
token, an outlier. So a record is changed, one field at a time, to each value that occurs there.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

_MOST_VALUES = 8  # of an integer field: the rarest, and the two most common ones
_OUTLIER = 1e3


@dataclass(frozen=True)
class Change:
    """What is done to one field of a record.

    Attributes:
        name: what it does, in words that fit behind "a record with".
        field: number of the field.
        of: what becomes of the field, a tensor.
        of_all: whether it is tried among other records that are changed alike: a maximum over the
            batch shows when one record is long among short ones, and is so no more.
    """

    name: str
    field: int
    of: Callable[[Tensor], Tensor]
    of_all: bool = False

    def __call__(self, record: Any, fields: int) -> Any:
        """The record, changed; each of its views, where it holds several of `fields` fields."""
        leaves, form = tree_flatten(record)
        changed = [
            _changed(leaf, self.of) if number % fields == self.field else leaf
            for number, leaf in enumerate(leaves)
        ]
        return tree_unflatten(changed, form)


def occurring_values(items: Iterable[Any]) -> list[Counter[int]]:
    """For each field of an item, how many items hold each integer; empty for other fields.

    Args:
        items: of one form: tensors, arrays and numbers in containers. Those of another form than
            the first are passed over.
    """
    form: Any = None
    values: list[Counter[int]] = []
    for item in items:
        fields, found = tree_flatten(item)
        if form is None:
            form, values = found, [Counter() for _ in fields]
        if found == form:
            for counter, field in zip(values, fields, strict=True):
                tensor = as_tensor(field)
                if tensor is not None and not tensor.is_floating_point():
                    counter.update(tensor.unique().tolist())
    return values


def changes_of(record: Any, values: list[Counter[int]]) -> list[Change]:
    """What can be changed on a record: fields take turns, rare values come first.

    Integer fields of any shape, masks too, are filled with each value that occurs in that field,
    and with it everywhere but in one place; others are multiplied by 1000, and by 0.

    Args:
        record: an item of a data set, or a list of such, one a view.
        values: from `occurring_values`, of items of the same form.
    """
    fields = tree_flatten(record)[0]
    if not values or len(fields) % len(values):
        return []
    found = [
        list(_changes_of_field(number, as_tensor(field), counter))
        for number, (field, counter) in enumerate(zip(fields, values, strict=False))
    ]
    return [c for turn in itertools.zip_longest(*found) for c in turn if c is not None]


def as_tensor(field: Any) -> Tensor | None:
    """A field as a tensor; None for what has no numbers."""
    if isinstance(field, Tensor):
        plain = field.layout is torch.strided and not (field.is_complex() or field.is_quantized)
        return field.detach() if plain else None
    if isinstance(field, np.ndarray | np.generic) and field.dtype.kind in "biuf":
        field = np.ascontiguousarray(field, field.dtype.newbyteorder("="))[()]
    elif not isinstance(field, int | float):
        return None
    try:
        return torch.as_tensor(field)
    except (TypeError, ValueError, RuntimeError):  # numbers that torch does not have
        return None


def _changes_of_field(
    number: int, tensor: Tensor | None, counter: Counter[int]
) -> Iterator[Change]:
    if tensor is None or tensor.numel() == 0:
        return
    if tensor.is_floating_point():
        yield Change(f"field {number} × {_OUTLIER:.0f}", number, partial(torch.mul, other=_OUTLIER))
        yield Change(f"field {number} × 0", number, partial(torch.mul, other=0.0), of_all=True)
        return
    ordered = sorted(counter, key=lambda value: (counter[value], value))
    if len(ordered) > _MOST_VALUES:
        ordered = ordered[: _MOST_VALUES - 2] + ordered[-2:]
    for value in ordered:
        fill = partial(torch.full_like, fill_value=value)
        if not torch.equal(fill(tensor), tensor):
            yield Change(f"field {number} = {value}", number, fill)
        if tensor.numel() > 1 and len(ordered) > 1:
            other = next(v for v in ordered if v != value)
            but_one = partial(_but_in_one_place, value=value, other=other)
            name = f"field {number} = {value} but in one place"
            yield Change(name, number, but_one, of_all=True)


def _but_in_one_place(tensor: Tensor, value: int, other: int) -> Tensor:
    found = torch.full_like(tensor, value)
    found.view(-1)[:1] = other
    return found


def _changed(field: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A field after a change, in the type that it had."""
    tensor = as_tensor(field)
    if tensor is None:
        return field
    found = change(tensor)
    if isinstance(field, Tensor):
        return found
    if isinstance(field, np.ndarray | np.generic):
        return found.numpy().astype(field.dtype)[()]
    return type(field)(found.item())
