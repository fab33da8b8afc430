"""What a set-up is, and the table that `@setup` fills."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import Dataset


@dataclass(frozen=True)
class SetUp:
    """A model with its data and its loss, as somebody would write them.

    Sound: the loss of a batch is the plain mean of what each of its records gives alone.

    Attributes:
        name: What it is, in words; the key in `SETUPS`.
        family: One of `tests.zoo.FAMILIES`.
        module: Makes the module. The weights are the same at each call.
        data: Makes the map-style data set, 8 to 16 records, the same at each call.
        collate: Makes a batch of a list of records; None is PyTorch's own.
    """

    name: str
    family: str
    module: Callable[[], pl.LightningModule]
    data: Callable[[], Dataset]
    collate: Callable[[list], Any] | None = None


SETUPS: dict[str, SetUp] = {}


def seeded(make: Callable[[], pl.LightningModule]) -> pl.LightningModule:
    """The module with weights from a fixed seed; the caller's random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


def setup(name, family, data, collate=None):
    """Decorator: a class or function that makes a module becomes an entry of `SETUPS`."""

    def register(make):
        assert name not in SETUPS, name
        SETUPS[name] = SetUp(name, family, functools.partial(seeded, make), data, collate)
        return make

    return register


class Plain(pl.LightningModule):
    """SGD over what is trainable; the rest is the set-up's own."""

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)
