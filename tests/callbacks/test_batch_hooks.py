"""Hooks that write to a batch before the step: what couples records is found, the rest trains."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from torch.utils.data import DataLoader

from defend import DifferentialPrivacy, PrivacyError
from tests.helpers import Net, data, trainer

ROWS = 24
FOUND = r"mixes records|when one record is replaced|at most C without one record"


def standardize(x, y):
    x.sub_(x.mean(0)).div_(x.std(0) + 1e-5)


def mixup(x, y):
    x.mul_(0.7).add_(0.3 * x[torch.randperm(len(x))])


def neighbour(x, y):
    x.data.mul_(0.7).add_(0.3 * x.roll(1, 0))  # no version is counted


def through_numpy(x, y):
    x.numpy()[:] = x.numpy() * 0.7 + 0.3 * x.numpy()[::-1].copy()


def by_labels(x, y):
    y.copy_(y.roll(1))


def rows_scaled(x, y):
    x.mul_(0.5).add_(0.1)


def rows_flipped_by_chance(x, y):
    if torch.rand(()) < 0.5:
        x.mul_(torch.randint(0, 2, (len(x), 1)) * 2 - 1)


def nothing(x, y):
    pass


UNSOUND = (standardize, mixup, neighbour, through_numpy, by_labels)
SOUND = (rows_scaled, rows_flipped_by_chance, nothing)
ALWAYS, LATE = (lambda step: True), (lambda step: step == 3)


class Hook(pl.Callback):
    def __init__(self, change, when=ALWAYS):
        self.change, self.when = change, when

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.when(trainer.global_step):
            self.change(*batch)


def on_module(change, when):
    class Hooked(Net):
        def on_train_batch_start(self, batch, batch_idx):
            if when(self.trainer.global_step):
                change(*batch)

    return Hooked(), []


PLACES = {
    "callback": lambda change, when: (Net(), [Hook(change, when)]),
    "LambdaCallback": lambda change, when: (
        Net(), [LambdaCallback(on_train_batch_start=Hook(change, when).on_train_batch_start)],
    ),
    "module": on_module,
}  # fmt: skip


def run(place, change, when=ALWAYS, **settings):
    module, hooks = PLACES[place](change, when)
    dp = DifferentialPrivacy(
        noise_multiplier=1.0, delta=1e-3, max_grad_norm=1.0, ledger=False, **settings
    )
    fit = trainer(callbacks=[*hooks, dp], max_epochs=6)
    fit.fit(module, DataLoader(data(ROWS), batch_size=ROWS))
    return dp


def pairs(changes):
    """Each change in two places, once always and once late; each place with most changes."""
    places = list(PLACES)
    return [
        (places[(number + shift) % len(places)], change, when)
        for number, change in enumerate(changes)
        for shift, when in enumerate((ALWAYS, LATE))
    ]


@pytest.mark.parametrize(("place", "change", "when"), pairs(UNSOUND))
def test_a_hook_that_couples_records_is_found(place, change, when):
    with pytest.raises(PrivacyError, match=FOUND):
        run(place, change, when)


@pytest.mark.parametrize(("place", "change", "when"), pairs(SOUND))
def test_a_hook_that_treats_each_row_alone_trains(place, change, when):
    assert run(place, change, when).steps == 6


class Uncopied(Hook):
    def __deepcopy__(self, memo):
        raise TypeError("holds a lock")


def test_what_cannot_be_tried_may_not_change_a_batch():
    assert fitted(Uncopied(nothing)).steps == 1
    with pytest.raises(PrivacyError, match="Uncopied cannot be copied"):
        fitted(Uncopied(rows_scaled))


def fitted(hook):
    dp = DifferentialPrivacy(noise_multiplier=1.0, delta=1e-3, max_grad_norm=1.0, ledger=False)
    fit = trainer(callbacks=[hook, dp], max_epochs=1)
    fit.fit(Net(), DataLoader(data(ROWS), batch_size=ROWS))
    return dp


class OnlyInEarnest(Hook):
    """Tells a trial from a step: of copies it changes nothing."""

    def __deepcopy__(self, memo):
        return Hook(nothing)


def test_a_change_that_no_trial_shows_is_refused():
    with pytest.raises(PrivacyError, match="they change nothing"):
        fitted(OnlyInEarnest(rows_scaled))


def test_without_a_self_test_the_user_answers_for_hooks():
    assert run("callback", standardize, selftest=False).steps == 6
