"""What a batch holds, in a few numbers: has somebody changed it since?"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def digest(batch: Any) -> list[Any]:
    """Numbers that change with any value of a batch, and with the order of its rows.

    Values that change places within a row may go unseen: they stay with their record.

    Args:
        batch: tensors, arrays and plain values, in any containers, on any device.

    Returns:
        What `same` compares. Nothing waits for the device, and no row is kept.
    """
    return [_of_tensor(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves(batch)]


def same(one: list[Any], other: list[Any]) -> bool:
    """Whether two digests are of equal batches; waits for the device."""
    if len(one) != len(other):
        return False
    return all(_alike(a, b) for a, b in zip(one, other, strict=True))


def leaves(batch: Any) -> Iterator[Any]:
    """Everything in a batch that is no container; arrays as tensors."""
    if isinstance(batch, np.ndarray) and batch.dtype.kind in "biufc":
        yield torch.from_numpy(np.ascontiguousarray(batch, batch.dtype.newbyteorder("=")))
    elif isinstance(batch, Mapping):
        for key, value in batch.items():
            yield key
            yield from leaves(value)
    elif isinstance(batch, list | tuple):
        for value in batch:
            yield from leaves(value)
    elif dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        for field in dataclasses.fields(batch):
            yield from leaves(getattr(batch, field.name, None))
    else:
        yield batch


@torch.no_grad()
def sum_of_bits(tensor: Tensor) -> Tensor:
    """The sum of the bits of a tensor's real values: any single one that changes, changes it."""
    tensor = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    return tensor.view(_KINDS[tensor.element_size()]).sum()


_KINDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def _of_tensor(tensor: Tensor) -> tuple[Any, ...]:
    form = tensor.shape, tensor.dtype
    if tensor.layout is not torch.strided or tensor.is_quantized:
        return *form, id(tensor), tensor._version
    if tensor.numel() == 0:
        return form
    rows = tensor.detach().reshape(len(tensor) if tensor.ndim else 1, -1)
    if rows.dtype is torch.bool:
        sums = rows.sum(1)
    else:
        rows = (torch.view_as_real(rows) if rows.is_complex() else rows).contiguous().flatten(1)
        size = rows.element_size()
        width, offset = rows.shape[1] * size, rows.storage_offset() * size
        # Words of eight bytes are added up as fast as memory is read, narrower ones slowly.
        word = next(w for w in _WORDS if width % w.itemsize == offset % w.itemsize == 0)
        sums = rows.view(word).sum(1, dtype=torch.int64)
    return *form, (sums * _places(len(sums), sums.device)).sum()


def _places(rows: int, device: torch.device) -> Tensor:
    """An odd number for each place, as if at random: no sum stays when rows are turned around."""
    numbers = torch.arange(1, rows + 1, device=device) * _MIX
    numbers ^= numbers >> 29
    numbers *= _MIX
    return (numbers ^ (numbers >> 32)) | 1


_MIX = 0x1E3779B97F4A7C15  # of splitmix64, within the positive numbers
_WORDS = (torch.int64, torch.int32, torch.int16, torch.int8)


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, tuple) and isinstance(other, tuple):
        return one[:2] == other[:2] and [*map(int, one[2:])] == [*map(int, other[2:])]
    try:
        return one is other or bool(one == other)
    except (TypeError, ValueError):
        return one is other
