import collections
import dataclasses

import numpy as np
import pytest
import torch

from defend import InputError
from defend.batching.chunks import chunk_bounds, count_rows, slice_rows

Pair = collections.namedtuple("Pair", "x y")


@dataclasses.dataclass
class Record:
    x: torch.Tensor
    y: torch.Tensor


X, Y = torch.arange(14.0).view(7, 2), torch.arange(7)
BATCHES = [X, [X, Y], (X, Y), {"x": X, "y": Y}, Pair(X, Y), Record(X, Y), {"a": [X, {"b": Y}]}]


@pytest.mark.parametrize("rows", range(1, 30))
@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 100])
def test_bounds_cover_all_rows_once_in_the_fewest_equal_chunks(rows, size):
    bounds = chunk_bounds(rows, size)
    assert [r for start, stop in bounds for r in range(start, stop)] == list(range(rows))
    sizes = [stop - start for start, stop in bounds]
    assert max(sizes) <= size
    assert max(sizes) - min(sizes) <= 1
    assert len(bounds) == -(-rows // size)


def test_none_means_one_chunk():
    assert chunk_bounds(1000, None) == [(0, 1000)]


def test_refuses_empty_chunks():
    with pytest.raises(InputError, match="`chunk_size` to be ≥ 1, got 0"):
        chunk_bounds(5, 0)


def leaves(batch):
    if isinstance(batch, torch.Tensor):
        return [batch]
    if isinstance(batch, dict):
        return [t for v in batch.values() for t in leaves(v)]
    if dataclasses.is_dataclass(batch):
        return [batch.x, batch.y]
    return [t for v in batch for t in leaves(v)]


@pytest.mark.parametrize("batch", BATCHES, ids=lambda b: type(b).__name__)
def test_slices_every_container_and_keeps_its_type(batch):
    cut = slice_rows(batch, 2, 5, 7)
    assert type(cut) is type(batch)
    for part, whole in zip(leaves(cut), leaves(batch), strict=True):
        assert torch.equal(part, whole[2:5])
    assert count_rows(batch) == 7
    assert count_rows(cut) == 3


def test_slices_lists_of_scalars_and_strings():
    batch = {"x": X, "name": list("abcdefg"), "note": "all", "temperature": torch.tensor(1.0)}
    cut = slice_rows(batch, 1, 3, 7)
    assert (cut["name"], cut["note"], cut["temperature"].item()) == (["b", "c"], "all", 1.0)


def test_slices_arrays_and_lists_of_one_object_a_record():
    boxes = [torch.rand(i, 4) for i in range(7)]
    batch = [X, [(i, "a") for i in range(7)], np.arange(7), boxes]
    x, pairs, array, cut = slice_rows(batch, 2, 4, 7)
    assert torch.equal(x, X[2:4])
    assert pairs == [(2, "a"), (3, "a")]
    assert array.tolist() == [2, 3]
    assert cut == boxes[2:4]


def test_refuses_a_tensor_that_is_not_per_record():
    with pytest.raises(InputError, match=r"7 rows, one a record, got shape \(3,\)"):
        slice_rows([X, torch.ones(3)], 0, 2, 7)


def test_no_rows_to_count():
    assert count_rows({"a": "text", "b": torch.tensor(1.0)}) is None
