"""AdversarialTraining beside DifferentialPrivacy: what goes, at what sensitivity, and what not."""

from unittest import mock

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, Subset

from defend import PGD, AdversarialTraining, DifferentialPrivacy, Linf, PrivacyError
from defend.attacks.free import Free
from defend.attacks.presets import fgsm_rs, n_fgsm
from defend.attacks.torchattacks.adapter import TorchAttack
from defend.training.adversarial import AdversarialSteps
from tests.callbacks.test_together import C, Release, fit, private
from tests.helpers import Net, data, loader, trainer

EPS = 0.1
ATTACK = PGD(Linf(EPS), steps=3, random_start=False)


# --- what goes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attack", "settings"),
    [
        (ATTACK, {"clean_fraction": 0.5}),
        (ATTACK, {"warmup_epochs": 1}),
        (PGD(Linf(EPS), steps=2), {"clean_fraction": 0.25, "warmup_epochs": 0.5}),
        (fgsm_rs(EPS), {}),
        (n_fgsm(EPS), {"warmup_epochs": 1}),
        (TorchAttack("PGD", {"eps": EPS, "steps": 2}), {"clean_fraction": 0.5}),
        (TorchAttack("CW", {"steps": 2}), {"chunk_size": 1}),
    ],
    ids=["fraction", "warm-up", "both", "fgsm_rs", "n_fgsm", "torchattacks", "alone"],
)
@pytest.mark.parametrize("chunk_size", [None, 8])
def test_it_passes_the_selftest_and_trains(attack, settings, chunk_size):
    callback = private(insecure_seed=None, chunk_size=chunk_size)
    fit([AdversarialTraining(attack, **settings), callback])
    assert callback.steps == 8


def test_the_selftest_is_at_full_strength_whatever_the_warm_up():
    """An attack in which records see each other is found, though the first step is nearly clean."""

    class Coupled:
        def __init__(self, eps):
            self.eps = eps

        def with_eps(self, eps):
            return Coupled(eps)

        def __call__(self, model, x, y, *, generator=None, chunk_size=None):
            return (x + self.eps * (x - x.mean(0)).sign()).clamp(0, 1)

    with pytest.raises(PrivacyError, match="would not be private"):
        fit([AdversarialTraining(Coupled(0.3), warmup_epochs=1000), private()])


def test_and_does_not_count():
    """The rates are those of training; the copy on which a step is tried out has its own."""
    counted, rows, tried = [], [], mock.Mock()  # a list would be put back as it was before

    class Counting(AdversarialTraining):
        def on_train_epoch_end(self, trainer, pl_module):
            counted.append(self.steps.counts.gradients)
            super().on_train_epoch_end(trainer, pl_module)

    class Rows(Net):
        def training_step(self, batch, batch_idx):
            real = type(self.trainer) is Trainer
            (rows.append if real else tried)(len(batch[0]))
            return super().training_step(batch, batch_idx)

    fit([Counting(ATTACK), private()], Rows)
    assert counted == [ATTACK.steps * sum(rows)]
    assert tried.called


# --- sensitivity ----------------------------------------------------------------------------------

draw_rows = AdversarialSteps._rows_to_attack


def own_coins(steps, x, generator, private, views=1):
    """Each record's coin is its own, wherever it stands in the batch: the guarantee's coupling."""
    coins = torch.tensor([int(row.double().sum().mul(1e9)) % 997 / 997 for row in x])
    with mock.patch("torch.rand", return_value=coins):
        return draw_rows(steps, x, generator, private, views)


def in_every_batch_as_many(steps, x, generator, private, views=1):
    """A planted wrong answer: which records stay clean depends on the others."""
    return own_coins(steps, x, generator, False)


def sum_of_one_step(records, **settings):
    """The clipped sum over all `records`: q = 1, noise off, one step."""
    spy = Release()
    callbacks = [
        AdversarialTraining(PGD(Linf(0.3), steps=3, random_start=False), **settings),
        private(noise_multiplier=0.0, selftest=False),
        spy,
    ]
    fit(callbacks, Net, DataLoader(records, batch_size=len(records)), max_steps=1)
    return spy.gradient.double() * len(records)


def largest_move(n=8, **settings):
    """max over records of ‖change of the clipped sum when it is left out‖, in units of C."""
    whole = sum_of_one_step(data(n), **settings)
    rests = [Subset(data(n), [j for j in range(n) if j != i]) for i in range(n)]
    return max((whole - sum_of_one_step(rest, **settings)).norm().item() / C for rest in rests)


@pytest.mark.parametrize("settings", [{"clean_fraction": 0.5}, {"warmup_epochs": 2}])
def test_leaving_one_record_out_moves_the_clipped_sum_by_at_most_C(monkeypatch, settings):  # noqa: N802
    monkeypatch.setattr(AdversarialSteps, "_rows_to_attack", own_coins)
    assert 0.2 < largest_move(**settings) <= 1 + 1e-4


def test_a_fixed_number_of_clean_records_would_break_it(monkeypatch):
    monkeypatch.setattr(AdversarialSteps, "_rows_to_attack", in_every_batch_as_many)
    assert largest_move(clean_fraction=0.5) > 1.01


def test_each_record_tosses_a_secret_coin():
    still = []

    class Seeing(Net):
        def on_train_batch_start(self, batch, batch_idx):
            self.clean = batch[0].clone()

        def training_step(self, batch, batch_idx):
            still.append((batch[0] == self.clean).all(1))
            return super().training_step(batch, batch_idx)

    for _ in range(2):
        callbacks = [
            AdversarialTraining(ATTACK, clean_fraction=0.5),
            private(insecure_seed=None, chunk_size=None, selftest=False),
        ]
        fit(callbacks, Seeing, DataLoader(data(512), batch_size=512), max_steps=1)
    one, two = still  # q = 1: the same records
    assert not torch.equal(one, two)
    counts = {int(one.sum()), int(two.sum())}
    assert all(abs(count - 256) < 5 * 512**0.5 / 2 for count in counts)
    agree = int((one == two).sum())
    assert abs(agree - 256) < 5 * 512**0.5 / 2


# --- what not -------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize(
    ("attack", "settings", "message"),
    [
        (Free(Linf(EPS)), {}, "got Free: its perturbation is carried on .* without noise"),
        (TorchAttack("CW"), {}, "each record alone .* records of a chunk move each other"),
    ],
)
def test_refuses_what_one_clip_does_not_bound(first, attack, settings, message):
    callback = AdversarialTraining(attack, **settings)
    callbacks = [callback, DifferentialPrivacy(delta=1e-3, max_grad_norm=C, noise_multiplier=1.0)]
    module = Net()
    before = [p.clone() for p in module.parameters()]
    with pytest.raises(PrivacyError, match=message):
        trainer(callbacks=callbacks if first else callbacks[::-1]).fit(module, loader())
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), before, strict=True))
