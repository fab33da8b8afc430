"""A small private loop that the tests share."""

import json
from pathlib import Path

import torch
import torch.nn.functional as F

from tests.helpers import Net, loader
from tests.loops import private_loop

SETTINGS = {"delta": 1e-3, "max_grad_norm": 0.5, "noise_multiplier": 0.7}
TARGET = {"noise_multiplier": None, "target_epsilon": 3.0}


def mean_loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def net():
    torch.manual_seed(0)
    return Net()


def sgd(model, lr=0.05):
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def private(model, optimizer=None, batches=None, *, loss=mean_loss, epochs=1, **settings):
    return private_loop(
        model,
        optimizer or sgd(model),
        loader(256, 32) if batches is None else batches,
        loss=loss,
        epochs=epochs,
        **{**SETTINGS, **settings},
    )


def train(loop, epochs=1):
    with loop:
        for _ in range(epochs):
            for batch in loop.loader:
                loop.step(batch)
    return loop


def some_steps(loop, count):
    for _, batch in zip(range(count), loop.loader, strict=False):
        loop.step(batch)


def steps_in(ledger):
    lines = [json.loads(line) for line in Path(ledger).read_text().splitlines()]
    return sum(line["kind"] == "step" for line in lines)


def assert_closed(model):
    assert all(vars(p) == {} and p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())
    assert not any(m._forward_pre_hooks or m._backward_pre_hooks for m in model.modules())
