"""Which records to try a step on: different ones, of rare classes and of common ones."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset, TensorDataset


def positions_to_try(dataset: Any, count: int, turn: int = 0) -> list[int]:
    """Up to `count` positions in a data set, from the rarest classes and the most common ones.

    A loss that is weighted by class gives itself away only where a batch holds classes of different
    weight, and the weight is often on a rare one. Where the labels are not known without reading
    the data, the positions are spread evenly, so that sorted labels differ.

    Args:
        dataset: with a length.
        count: how many, ≥ 1.
        turn: 0, 1, 2, … for other records each time.
    """
    size = len(dataset)
    count = min(count, size)
    step = max(size // count, 1)
    spread = [(i * (size - 1) // max(count - 1, 1) + turn * (step // 3 + 1)) % size
              for i in range(count)]  # fmt: skip
    labels = labels_of(dataset)
    chosen = [] if labels is None else _one_of_each(labels, count, turn)
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
