"""Batches of any kind find the model, wherever it is."""

import dataclasses
from collections import namedtuple

import pytest
import torch
from torch import nn

from defend.training.runtime import PlainRuntime

Pair = namedtuple("Pair", ["x", "y"])


@dataclasses.dataclass(frozen=True)
class Fields:
    x: torch.Tensor
    y: torch.Tensor
    name: str = "kept"
    rows: int = dataclasses.field(init=False, default=2)


class Bag:
    """Knows how to move."""

    def __init__(self, x, device="cpu"):
        self.x, self.device = x, device

    def to(self, device):
        return Bag(self.x, str(device))


def loss(model, batch):
    return model(batch).mean()


X, Y = torch.zeros(2, 3), torch.ones(2)


@pytest.mark.parametrize(
    "batch",
    [(X, Y), [X, Y], Pair(X, Y), Fields(X, Y), {"x": X, "y": [Y, {"name": "kept"}]}, X],
    ids=["tuple", "list", "namedtuple", "dataclass", "dict", "tensor"],
)
def test_batches_move_to_the_model(batch):
    moved = PlainRuntime(nn.Linear(3, 3, device="meta"), loss).to_device(batch)
    assert type(moved) is type(batch)
    assert _devices(moved) == {"meta"}
    assert _devices(batch) == {"cpu"}  # the loader's own stays where it is
    assert _strings(moved) == _strings(batch)


def test_a_batch_that_knows_how_to_move():
    moved = PlainRuntime(nn.Linear(3, 3, device="meta"), loss).to_device({"bag": Bag(X)})
    assert moved["bag"].device == "meta"


def _leaves(batch):
    if isinstance(batch, dict):
        batch = list(batch.values())
    if dataclasses.is_dataclass(batch):
        batch = [getattr(batch, f.name) for f in dataclasses.fields(batch)]
    if isinstance(batch, list | tuple):
        return [leaf for item in batch for leaf in _leaves(item)]
    return [batch]


def _devices(batch):
    return {leaf.device.type for leaf in _leaves(batch) if isinstance(leaf, torch.Tensor)}


def _strings(batch):
    return [leaf for leaf in _leaves(batch) if isinstance(leaf, str | int)]
