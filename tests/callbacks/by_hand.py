"""Adversarial training under a Trainer, and the same training as a loop written by hand."""

import copy
import dataclasses

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

from defend import PGD, AdversarialTraining, Linf
from defend.objectives import AWP
from tests.helpers import data, trainer
from tests.training.adversarial_cases import GAMMA, SLOW, state_of

SEED = 11
EPS = 0.1
ATTACK = PGD(Linf(EPS), steps=2)


class Rich(pl.LightningModule):
    """Batch normalization and dropout, so that the order of forwards shows.

    Each step draws from the global RNG as its number says, whatever was drawn before it.
    """

    def __init__(self, output="loss", layers=None):
        super().__init__()
        torch.manual_seed(0)
        self.net = layers or nn.Sequential(
            nn.Linear(8, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.3), nn.Linear(12, 3)
        )
        self.output = output
        self.own = []

    def forward(self, x):
        return self.net(x)

    def on_train_batch_start(self, batch, batch_idx):
        torch.manual_seed(batch_idx)

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.own.append(float(loss.detach()))
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss if self.output == "loss" else {"loss": loss, "extra": batch_idx}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def plain_layers():
    """Nothing that depends on the batch, for several processes."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 3))


def batches(count=4):
    return DataLoader(data(count * 16), batch_size=16)


class Rows(pl.LightningDataModule):
    """Batches of 16 on all processes together, in their order: rank r has every world-th row."""

    def __init__(self, count):
        super().__init__()
        self.count = count

    def train_dataloader(self):
        world, rank = self.trainer.world_size, self.trainer.global_rank
        rows = data(self.count * 16)
        shard = DistributedSampler(rows, world, rank, shuffle=False)
        return DataLoader(rows, batch_size=16 // world, sampler=shard)


def fit(
    objective,
    module=None,
    *,
    attack=ATTACK,
    count=4,
    first=(),
    callbacks=(),
    settings=None,
    **options,
):
    """A Trainer's fit over `count` batches; gives the module. `first` are before our callback."""
    module = module or Rich()
    callback = AdversarialTraining(attack, objective=objective, **(settings or {}))
    pl.seed_everything(SEED)
    trainer(callbacks=[*first, callback, *callbacks], **options).fit(module, datamodule=Rows(count))
    return module


# --- by hand --------------------------------------------------------------------------------------


def generator(number, rank=0):
    """The source of random starts of the batch of that number, on that rank."""
    return torch.Generator().manual_seed(hash((SEED, rank, number + 1)) % 2**62)


def inner(objective):
    return objective.objective if isinstance(objective, AWP) else objective


def attack_of(objective):
    """PGD up the loss that the objective's paper names."""
    if inner(objective).name != "trades":
        return ATTACK
    return dataclasses.replace(ATTACK, loss="kl", start_radius=0.001)


def autocast(half):
    return torch.autocast("cpu", torch.bfloat16, enabled=half)


def whole_loss(model, x, x_adv, y, objective, *, clean_first, half):
    """The mean over rows of an objective, from two forwards (Madry: one) in the order asked."""

    def logits(inputs):
        # Each casts the weights anew, so that the gradients of two forwards meet in float32.
        with autocast(half):
            return model(inputs)

    name = inner(objective).name
    if name == "madry":
        clean = adv = logits(x_adv)
    elif clean_first:
        clean, adv = logits(x), logits(x_adv)
    else:
        adv, clean = logits(x_adv), logits(x)
    if not half:
        return reference_loss(name, clean, adv, y)
    # Slow sums in another order would round another way, by whole steps of bfloat16.
    own = clean if name == "trades" else adv
    penalty = inner(objective).penalty(clean, adv, y).mean() if name != "madry" else 0.0
    return F.cross_entropy(own.float(), y) + penalty


def reference_loss(name, clean, adv, y):
    rows = [SLOW[name](c, a, int(t)) for c, a, t in zip(clean, adv, y, strict=True)]
    return torch.stack(rows).mean()


def gradients(model, x, y, number, objective, *, rank=0, half=False, gamma=GAMMA, swapped=False):
    """The gradient of one batch on one rank, its attack included; the weights stay."""
    with autocast(half):
        x_adv = attack_of(objective)(model, x, y, generator=generator(number, rank))
    before = [p.detach().clone() for p in model.parameters()]
    if isinstance(objective, AWP):
        climb(model, x, x_adv, y, objective, gamma, half)
    own_first = (inner(objective).name == "trades") != swapped
    loss = whole_loss(model, x, x_adv, y, objective, clean_first=own_first, half=half)
    found = torch.autograd.grad(loss, list(model.parameters()))
    with torch.no_grad():
        for p, value in zip(model.parameters(), before, strict=True):
            p.copy_(value)
    return found


def climb(model, x, x_adv, y, objective, gamma, half):
    """Add v = γ · ‖w‖ · g / ‖g‖ to each weight matrix, g from a copy of the model."""
    proxy = copy.deepcopy(model)
    names = [n for n, p in proxy.named_parameters() if p.ndim > 1]
    with torch.random.fork_rng():
        loss = whole_loss(proxy, x, x_adv, y, objective, clean_first=True, half=half)
    found = torch.autograd.grad(loss, [dict(proxy.named_parameters())[n] for n in names])
    with torch.no_grad():
        for name, g in zip(names, found, strict=True):
            w = dict(model.named_parameters())[name]
            w.add_(g / g.norm() * (gamma * w.norm()))


def train(model, objective, *, epochs=1, accumulate=1, world=1, count=4, dtype=None, **settings):
    """Train by hand: SGD on the mean over ranks and over accumulated batches."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    states, number = [], 0
    for _ in range(epochs):
        for index, (x, y) in enumerate(batches(count)):
            x = x if dtype is None else x.to(dtype)
            if index % accumulate == 0:
                optimizer.zero_grad()
            for rank in range(world):
                torch.manual_seed(index)
                mine = x[rank::world], y[rank::world]
                found = gradients(model, *mine, number, objective, rank=rank, **settings)
                for p, g in zip(model.parameters(), found, strict=True):
                    share = g / (accumulate * world)
                    p.grad = share if p.grad is None else p.grad + share
            if index % accumulate == accumulate - 1:
                optimizer.step()
            states.append(state_of(model))
            number += 1
    return states
