"""Audits: without its guard a break tells more of a record than ε says; with it, it does not."""

from collections.abc import Callable
from dataclasses import dataclass

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import beta
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from defend import DifferentialPrivacy, PrivacyError
from defend.callbacks._guarded_hooks import GuardedHooks
from defend.privacy import Segment, epsilon
from defend.privacy.mechanism.user_randomness import UserRandomness
from tests.helpers import trainer

WIDTH, STEPS, NOISE, DELTA = 8, 150, 4.0, 1e-3


class Net(pl.LightningModule):
    """The weights stay, so that each step is one more draw of the same mechanism."""

    def __init__(self, dropout):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.sums = nn.Sequential(nn.Dropout(dropout), nn.Linear(WIDTH, 3)), []

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Reader(pl.Callback):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        gradient = torch.cat([p.grad.flatten() for p in pl_module.parameters()])
        total = gradient * len(trainer.train_dataloader.dataset)
        pl_module.sums.append(total.numpy().tobytes())  # a list of tensors would be watched


class Standardizes(pl.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        batch[0].sub_(batch[0].mean(0)).div_(batch[0].std(0) + 1e-5)


class Seeds(pl.Callback):
    """Makes the masks of dropout known; without one record, all after it have other ones."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        torch.manual_seed(trainer.global_step)


class Flips(Dataset):
    """Augments by coins from a generator of its own, which everybody can make."""

    def __init__(self, x, y):
        self.x, self.y, self.rng = x, y, np.random.default_rng(0)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i] * (1 if self.rng.random() < 0.5 else -1), self.y[i]


def hooks_off(monkeypatch):
    monkeypatch.setattr(GuardedHooks, "check", lambda *_: None)
    monkeypatch.setattr(GuardedHooks, "check_end", lambda *_: None)


def numbers_off(monkeypatch):
    monkeypatch.setattr(UserRandomness, "renew", lambda *_, **__: None)


@dataclass(frozen=True)
class Case:
    """A break, and what switches its guard off."""

    off: Callable[[pytest.MonkeyPatch], None]
    callbacks: tuple[type[pl.Callback], ...] = ()
    dataset: type[Dataset] = TensorDataset
    rows: int = 96  # so many that the bound is above ε by 6 of its deviations and more
    outlier: float = 1.0
    dropout: float = 0.0


BREAKS = {
    "a hook": Case(hooks_off, (Standardizes,), outlier=1e3),
    "a seed": Case(numbers_off, (Seeds,), rows=144, dropout=0.5),
    "a generator": Case(numbers_off, dataset=Flips),
}


def sums(name, without, noise):
    """The released sums of a fit of many steps, with the first record or without it."""
    case, generator = BREAKS[name], torch.Generator().manual_seed(1)
    x, y = torch.randn(case.rows, WIDTH, generator=generator), torch.arange(case.rows) % 3
    x[0] *= case.outlier
    rows = case.dataset(x[without:].clone(), y[without:])
    dp = DifferentialPrivacy(noise_multiplier=noise, delta=DELTA, max_grad_norm=1.0, ledger=False)
    fit = trainer(callbacks=[*(kind() for kind in case.callbacks), dp, Reader()], max_epochs=STEPS)
    module = Net(case.dropout)
    fit.fit(module, DataLoader(rows, batch_size=len(rows)))
    return torch.tensor(np.frombuffer(b"".join(module.sums), np.float32).reshape(STEPS, -1))


def audited(name):
    """A lower bound of one step's ε that holds with 99%, and the ε that it is to stay below.

    The auditor knows all but the record: what a step would release without noise in both worlds,
    as far as that can be known. The statistic is the likelihood ratio, cut at 0.
    """
    expected = [sums(name, without, noise=1e-6) for without in (0, 1)]
    direction = F.normalize(expected[0] - expected[1], dim=1)
    middle = (expected[0] + expected[1]) / 2
    guesses = [
        int((((sums(name, w, NOISE) - middle) * direction).sum(1) > 0).sum()) for w in (0, 1)
    ]
    hits = beta.ppf(0.005, guesses[0], STEPS - guesses[0] + 1)
    false = beta.ppf(0.995, guesses[1] + 1, STEPS - guesses[1])
    reported = epsilon([Segment(NOISE, 1.0, 1)], DELTA)
    return float(np.log(max(hits - DELTA, 1e-9) / false)), reported


@pytest.mark.parametrize("name", BREAKS)
def test_without_its_guard_a_break_tells_more_than_epsilon_says(name, monkeypatch):
    BREAKS[name].off(monkeypatch)
    found, reported = audited(name)
    assert found > reported, (found, reported)


@pytest.mark.parametrize("name", BREAKS)
def test_with_the_guard_it_is_refused_or_tells_less(name):
    try:
        found, reported = audited(name)
    except PrivacyError:
        return
    assert found < reported, (found, reported)
