"""Which records to try a step on: different ones, of rare classes and of common ones."""

import itertools
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from defend.privacy.checks.changes import as_tensor, occurring_values

_MOST_SAMPLED, _FEWEST_SAMPLED, _SECONDS = 256, 4, 0.3
_MOST_NUMBERS = 2**22  # of a tensor in memory that are looked at
_MOST_ODD = 16


@dataclass(frozen=True)
class Survey:
    """What a data set holds, as far as it was looked at.

    Attributes:
        values: for each field of an item, how many items hold each integer; empty for other fields.
        odd: positions of records that are rare by a label, a length, a mask or the like, or at the
            end of its range; the rarest first.
    """

    values: list[Counter[int]]
    odd: list[int]


def survey(dataset: Any) -> Survey:
    """A look at all records where a data set holds tensors in memory, else briefly at some."""
    tensors, rows = _tensors_of(dataset)
    if tensors is not None:
        taken = [_taken(t, rows) for t in tensors]
        columns = [column for t in taken for column in _properties(t)]
        return Survey([_counts(t) for t in taken], _odd(columns))
    start, positions, items = time.perf_counter(), [], []
    for number, i in enumerate(positions_to_try(dataset, _MOST_SAMPLED)):
        if number >= _FEWEST_SAMPLED and time.perf_counter() - start > _SECONDS:
            break
        positions.append(i)
        items.append(dataset[i])
    return Survey(occurring_values(items), [positions[i] for i in _odd(_columns_of(items))])


def _tensors_of(dataset: Any) -> tuple[tuple[Tensor, ...] | None, Tensor | None]:
    """The tensors of a data set, and which of their rows it has; None for all."""
    if isinstance(dataset, TensorDataset):
        return dataset.tensors, None
    if isinstance(dataset, Subset):
        tensors, rows = _tensors_of(dataset.dataset)
        mine = torch.as_tensor(dataset.indices)
        return tensors, mine if rows is None else rows[mine]
    return None, None


def _taken(tensor: Tensor, rows: Tensor | None) -> Tensor:
    most = max(1, _MOST_NUMBERS // max(tensor[:1].numel(), 1))
    return (tensor if rows is None else tensor[rows[:most]])[:most]


def _counts(tensor: Tensor) -> Counter[int]:
    if tensor.is_floating_point() or tensor.is_complex():
        return Counter()
    values, counts = tensor.unique(return_counts=True)
    return Counter(dict(zip(values.tolist(), counts.tolist(), strict=True)))


def _properties(tensor: Tensor) -> list[Tensor]:
    """Whole numbers of each row of an integer field: its value, or how many of each sign it has."""
    if tensor.is_floating_point() or tensor.is_complex():
        return []
    rows = tensor.long().flatten(1) if tensor.ndim > 1 else tensor.long()
    if rows.ndim == 1:
        return [rows]
    return [(rows > 0).sum(1), (rows < 0).sum(1), (rows == 0).sum(1)]


def _columns_of(items: list[Any]) -> list[Tensor]:
    """The same of items one by one, and how long they are."""
    rows = []
    for item in items:
        row: list[int] = []
        for field in tree_leaves(item):
            tensor = as_tensor(field)
            if tensor is None:
                row += [len(field)] if isinstance(field, str | bytes) else []
                continue
            row += [len(tensor) if tensor.ndim else 0]
            row += [int(column) for column in _properties(tensor.unsqueeze(0))]
        rows.append(row)
    same = [row for row in rows if len(row) == len(rows[0])]
    return list(torch.tensor(same).T) if len(same) == len(rows) else []


def _odd(columns: list[Tensor]) -> list[int]:
    """Rows that are rare in a column, columns in turn; none of one that is the same for all."""
    ranked = []
    for column in columns:
        values, inverse, counts = column.unique(return_inverse=True, return_counts=True)
        if len(values) > 1:
            few = counts.argsort(stable=True)[:4] if 2 * len(values) < len(column) else []
            ends = [0, len(values) - 1]
            places = dict.fromkeys([*torch.as_tensor(few).tolist(), *ends])
            ranked.append([int((inverse == p).nonzero()[0]) for p in places])
    in_turn = (row for turn in itertools.zip_longest(*ranked) for row in turn if row is not None)
    return list(dict.fromkeys(in_turn))[:_MOST_ODD]


def positions_to_try(dataset: Any, count: int, turn: int = 0, odd: Sequence[int] = ()) -> list[int]:
    """Up to `count` positions in a data set, from the rarest classes and the most common ones.

    A loss that is weighted by class gives itself away only where a batch holds classes of different
    weight, and the weight is often on a rare one. Where the labels are not known without reading
    the data, the positions are spread evenly, so that sorted labels differ.

    Args:
        dataset: with a length.
        count: how many, ≥ 1.
        turn: 0, 1, 2, … for other records each time.
        odd: positions of records that are rare; one comes first, each time another.
    """
    size = len(dataset)
    count = min(count, size)
    step = max(size // count, 1)
    spread = [(i * (size - 1) // max(count - 1, 1) + turn * (step // 3 + 1)) % size
              for i in range(count)]  # fmt: skip
    labels = labels_of(dataset)
    chosen = [odd[turn % len(odd)]] if odd else []
    if labels is not None:
        ones = _one_of_each(labels, count - len(chosen), turn)
        chosen += [i for i in ones if i not in chosen]
    rest = (i for i in (*spread, *range(size)) if i not in chosen)
    for i in rest:
        if len(chosen) >= count:
            break
        if i not in chosen:
            chosen.append(i)
    return chosen


def _one_of_each(labels: Tensor, count: int, turn: int) -> list[int]:
    """A position of each class; with too many classes, of the rarest and the most common."""
    classes, sizes = labels.unique(return_counts=True)
    by_size = classes[sizes.argsort(stable=True)].tolist()
    if len(by_size) > count:
        rare = count // 2
        by_size = by_size[:rare] + by_size[len(by_size) - (count - rare) :]
    chosen = []
    for one in by_size:
        where = (labels == one).nonzero().flatten()
        chosen.append(int(where[turn % len(where)]))
    return chosen


def labels_of(dataset: Any) -> Tensor | None:
    """One integer label for each record, where a data set holds them in memory; else None."""
    if isinstance(dataset, TensorDataset):
        return _labels(dataset.tensors[-1], dataset)
    if isinstance(dataset, Subset):
        inner = labels_of(dataset.dataset)
        return None if inner is None else inner[torch.as_tensor(dataset.indices)]
    if isinstance(dataset, ConcatDataset):
        parts = [labels_of(part) for part in dataset.datasets]
        return None if any(p is None for p in parts) else torch.cat(parts)  # type: ignore[arg-type]
    for name in ("targets", "labels"):
        found = _labels(getattr(dataset, name, None), dataset)
        if found is not None:
            return found
    return None


def _labels(values: Any, dataset: Any) -> Tensor | None:
    try:
        labels = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError):
        return None
    whole = not (labels.is_floating_point() or labels.is_complex())
    return labels if whole and labels.shape == (len(dataset),) else None
