"""Randomness of a module held still, for comparing what it gives twice."""

import functools
from collections.abc import Iterator

import lightning.pytorch as pl
import torch
from torch import nn


def stilled(module: pl.LightningModule) -> pl.LightningModule:
    """Sets every probability of dropping something to 0, in place, and noise to zeros.

    Probabilities are attributes with "drop" in their names that hold a float (`dropout`,
    `drop_prob`, `attention_dropout`, `dropout_p`, `layerdrop`, `resid_pdrop`, …), on modules and
    on their `config`, and `p` of modules with "drop" in the names of their classes. A module that
    draws in another way does so in a method `noise(shape)`, which gives zeros afterwards.

    Returns:
        The module itself.
    """
    for part in module.modules():
        for owner, name in probabilities(part):
            setattr(owner, name, 0.0)
        if callable(getattr(part, "noise", None)):
            part.noise = functools.partial(zeros, part)
    return module


def zeros(part: nn.Module, shape) -> torch.Tensor:
    """Stands for a module's own `noise`. It goes with the module when that is copied."""
    return torch.zeros(shape, device=next(part.parameters()).device)


def probabilities(part: nn.Module) -> Iterator[tuple[object, str]]:
    """Where the module keeps probabilities: (object, name of its attribute)."""
    for owner in (part, getattr(part, "config", None)):
        for name, value in list(getattr(owner, "__dict__", {}).items()):
            drops = "drop" in name or (name == "p" and "drop" in type(part).__name__.lower())
            if drops and isinstance(value, float):
                yield owner, name
