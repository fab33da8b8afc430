"""A model, attacks and a stand-in for recording, that the tests of replayed steps share."""

import copy
import dataclasses

import torch
from torch import nn

from defend import PGD
from defend.threat import L1, L2, InputSpace, Linf

X = torch.rand(12, 2, 5, 5, generator=torch.Generator().manual_seed(3))
Y = torch.arange(12) % 5


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class Net(nn.Module):
    """Convolution, BatchNorm and a flag that only Python reads."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 5)
        self.sign = 1.0

    def forward(self, x):
        return self.sign * 5 * self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


class Counts(Net):
    calls = 0

    def forward(self, x):
        self.calls += 1
        self.features = x.detach()
        return super().forward(x)


def net(kind=Net):
    torch.manual_seed(1)
    return kind()


class Recorder:
    """Stands in for recording where there is no GPU.

    Like a graph, its replays work on the memory that was captured, read the weights where they
    were, and run what Python decided at capture. They hold neither the model nor the loss.
    """

    def __init__(self):
        self.made = self.replays = 0
        self.fails = None

    def __call__(self, own, pool):
        if self.fails is not None:
            raise self.fails
        self.made += 1
        model = copy.deepcopy(own.model)
        for mine, its in zip(model.parameters(), own.model.parameters(), strict=True):
            mine.data = its.data
        for mine, its in zip(model.buffers(), own.model.buffers(), strict=True):
            mine.data = its.data
        loss = own.loss
        if getattr(loss, "__self__", None) is own.model:
            loss = loss.__func__.__get__(model)
        step = dataclasses.replace(own, model=model, loss=loss)

        def replay():
            self.replays += 1
            step()

        return replay, pool


def plain(attack, model, x=X, y=Y, **settings):
    """The attack, every step run by Python."""
    attack = dataclasses.replace(attack, cuda_graphs=False)
    return attack.perturb(model, x, y, generator=seeded(), **settings)


def graphed(attack, model, x=X, y=Y, **settings):
    """The attack, its steps captured and replayed where they can be."""
    attack = dataclasses.replace(attack, cuda_graphs=True)
    return attack.perturb(model, x, y, generator=seeded(), **settings)


def assert_same(found, expected):
    assert torch.equal(found.x_adv, expected.x_adv)
    assert found.gradients == expected.gradients
    assert found.zero_gradients == expected.zero_gradients
    assert found.nonfinite_gradients == expected.nonfinite_gradients


SPACE = InputSpace(mean=(0.5, 0.4), std=(0.25, 0.2))
EPS = torch.linspace(0.0, 0.2, 12)
MASK = torch.rand(2, 5, 5, generator=seeded(7)) < 0.5
ATTACKS = {
    "linf": (PGD(Linf(0.1), steps=4), {}),
    "l2": (PGD(L2(0.5), steps=4), {}),
    "l1": (PGD(L1(2.0), steps=4), {}),
    "margin": (PGD(Linf(0.1), steps=4, loss="margin"), {}),
    "kl": (PGD(Linf(0.1), steps=4, loss="kl"), {}),
    "callable": (PGD(L2(0.5), steps=4, loss=lambda z, y: z.logsumexp(1) - z[:, 0]), {}),
    "targeted": (PGD(Linf(0.1), steps=4, targeted=True), {}),
    "best": (PGD(Linf(0.1), steps=4, step_size=0.1, iterate="best"), {}),
    "restarts": (PGD(Linf(0.1), steps=4, restarts=3), {}),
    "restarts-best": (PGD(L2(0.5), steps=4, restarts=3, iterate="best"), {}),
    "chunks": (PGD(Linf(0.1), steps=4), {"chunk_size": 5}),
    "radii": (PGD(L2(0.5), steps=4), {"eps": EPS}),
    "mask": (PGD(L1(2.0), steps=4), {"mask": MASK}),
    "normalized": (PGD(L2(0.5), steps=4, inputs=SPACE), {}),
    "bf16": (PGD(Linf(0.1), steps=4, precision="bf16"), {}),
}
