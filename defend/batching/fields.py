"""Read and replace one field of a batch, whatever container it comes in."""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from defend.errors import InputError


def get_field(batch: Any, key: int | str) -> Any:
    """The field `key` of a batch.

    Args:
        batch: list, tuple, dict, namedtuple or dataclass.
        key: position in a list, tuple, namedtuple or dataclass, or name in a dict, namedtuple or
            dataclass.

    Raises:
        InputError: if there is no such field; names the fields that there are.
    """
    try:
        if isinstance(batch, Mapping) or (_is_plain_sequence(batch) and isinstance(key, int)):
            return batch[key]
        return getattr(batch, _names(batch)[key] if isinstance(key, int) else key)
    except (KeyError, IndexError, AttributeError, TypeError):
        raise InputError(_no_field(batch, key)) from None


def with_field(batch: Any, key: int | str, value: Any) -> Any:
    """A shallow copy of the batch, of the same type, whose field `key` is `value`.

    The batch itself is never written to: a loader may hand out the same memory again.
    """
    get_field(batch, key)  # the same errors
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        name = batch._fields[key] if isinstance(key, int) else key
        return batch._replace(**{name: value})  # type: ignore[attr-defined]
    if isinstance(batch, tuple):
        index = int(key) % len(batch)
        return type(batch)((*batch[:index], value, *batch[index + 1 :]))
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        name = _names(batch)[key] if isinstance(key, int) else key
        return dataclasses.replace(batch, **{name: value})
    changed = copy.copy(batch)
    changed[key] = value
    return changed


def _is_plain_sequence(batch: Any) -> bool:
    return isinstance(batch, Sequence) and not isinstance(batch, str | bytes)


def _names(batch: Any) -> list[str]:
    if isinstance(batch, Mapping):
        return [str(key) for key in batch]
    if dataclasses.is_dataclass(batch):
        return [f.name for f in dataclasses.fields(batch)]
    return list(getattr(batch, "_fields", ()))


def _no_field(batch: Any, key: int | str) -> str:
    names = _names(batch)
    if names:
        has = f"one with the fields {names}"
    elif _is_plain_sequence(batch):
        has = f"one of {len(batch)} fields"
    else:
        has = "neither a list, tuple, dict, namedtuple nor dataclass"
    return (
        f"Expected the batch to have a field {key!r}, got a {type(batch).__name__}, {has}. "
        "Pass input_key=... and target_key=... for where the inputs and targets are."
    )
