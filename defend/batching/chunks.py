"""Logical batch → physical chunks: as few as fit, all of nearly the same size."""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from defend.errors import InputError


def chunk_bounds(rows: int, chunk_size: int | None) -> list[tuple[int, int]]:
    """Cut `rows` rows into the fewest chunks of at most `chunk_size` rows.

    Sizes differ by at most one, so that no tiny last chunk wastes a pass through the model.

    Args:
        rows: rows in all, ≥ 1.
        chunk_size: most rows in a chunk, ≥ 1; None means one chunk.

    Returns:
        (start, stop) of each chunk, in order.

    Raises:
        InputError: if `chunk_size` is below 1.
    """
    if chunk_size is None or rows <= chunk_size:
        return [(0, rows)]
    if chunk_size < 1:
        raise InputError(f"Expected `chunk_size` to be ≥ 1, got {chunk_size}.")
    return even_bounds(rows, -(-rows // chunk_size))


def check_chunk_size(chunk_size: int | str | None) -> None:
    """Refuse what is neither "auto", None nor an integer ≥ 1."""
    if chunk_size in ("auto", None) or (isinstance(chunk_size, int) and chunk_size >= 1):
        return
    raise InputError(
        f"Expected `chunk_size` to be 'auto', None or an integer ≥ 1, got {chunk_size!r}."
    )


def even_bounds(rows: int, count: int) -> list[tuple[int, int]]:
    """(start, stop) of `count` chunks of `rows` rows whose sizes differ by at most one."""
    cuts = [i * rows // count for i in range(count + 1)]
    return list(itertools.pairwise(cuts))


def slice_rows(batch: Any, start: int, stop: int, rows: int) -> Any:
    """Rows start…stop of a batch: every tensor, array and list of one object a record is cut.

    Args:
        batch: tensor, or list, tuple, dict, namedtuple or dataclass of tensors, nested at will.
        start: first row.
        stop: row after the last.
        rows: rows in the whole batch.

    Returns:
        A batch of the same type.

    Raises:
        InputError: for a tensor whose first dimension is not `rows`: nobody can tell which of
            its values belong to which record.
    """
    if isinstance(batch, Tensor | np.ndarray):
        if batch.ndim == 0:
            return batch
        if batch.shape[0] != rows:
            raise InputError(
                f"Expected every tensor of the batch to have {rows} rows, one a record, got shape "
                f"{tuple(batch.shape)}. Return one row a record from the data set, or keep what "
                "is not per record out of the batch."
            )
        return batch[start:stop]

    def cut(value: Any) -> Any:
        return slice_rows(value, start, stop, rows)

    if isinstance(batch, Mapping):
        return _rebuild_mapping(batch, {key: cut(value) for key, value in batch.items()})
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*map(cut, batch))
    if isinstance(batch, list | tuple):
        if len(batch) == rows and count_rows(batch) != rows:
            return batch[start:stop]  # one object a record: names, boxes, tensors of any length
        return type(batch)(map(cut, batch))
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        fields = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch) if f.init}
        return dataclasses.replace(batch, **{name: cut(value) for name, value in fields.items()})
    return batch


def count_rows(batch: Any) -> int | None:
    """Rows of the first tensor found in a batch; None if it holds no tensor with rows."""
    if isinstance(batch, Tensor | np.ndarray):
        return batch.shape[0] if batch.ndim else None
    return next((n for n in map(count_rows, _parts(batch)) if n is not None), None)


def holds_rows(batch: Any, rows: int) -> int | None:
    """Rows of a batch that is to have so many: also lists of one object a record count.

    Args:
        batch: in any container.
        rows: how many are expected.

    Returns:
        `rows`, or what was found instead; None if nothing in it has rows.
    """
    if isinstance(batch, Tensor | np.ndarray):
        return count_rows(batch)
    found = [n for n in (holds_rows(part, rows) for part in _parts(batch)) if n is not None]
    if rows in found or (isinstance(batch, list | tuple) and len(batch) == rows):
        return rows  # beside it may stand what is not by rows: ids of all bags, edges of graphs
    return found[0] if found else None


def _parts(batch: Any) -> list[Any]:
    """What a container holds; nothing of what is no container."""
    if isinstance(batch, Mapping):
        return list(batch.values())
    if isinstance(batch, list | tuple):
        return list(batch)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return [getattr(batch, f.name) for f in dataclasses.fields(batch)]
    return []


def _rebuild_mapping(batch: Mapping, values: dict) -> Any:
    if isinstance(batch, dict) and type(batch) is not dict:
        copy = batch.copy()
        copy.update(values)
        return copy if type(copy) is type(batch) else type(batch)(values)
    return values if type(batch) is dict else type(batch)(values)  # type: ignore[call-arg]
