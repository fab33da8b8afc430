"""Looks at a step in the middle of a fit: when, at what cost, and what a finding means for ε."""

import random

import pytest
import torch.nn.functional as F
from torch.utils.data import DataLoader

from defend import DifferentialPrivacy, Privacy, PrivacyError
from defend.callbacks import _evidence
from defend.privacy import Randomness, read_ledger
from defend.privacy.checks.dry_run import is_due
from defend.training import looks
from defend.training.looks import Looks
from defend.training.private_data import PrivateData
from defend.training.processes import Processes
from tests.helpers import Net, data, loader, trainer
from tests.training.loops import SETTINGS, mean_loss, net, private


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # for the ledgers


class Sometimes:
    """A loss that is over a statistic of the batch after so many calls of a step in earnest."""

    def __init__(self, first, last):
        self.first, self.last, self.steps = first, last, 0

    def __call__(self, model, batch):
        value = mean_loss(model, batch)
        bad = self.first <= self.steps < self.last
        return value / batch[0].detach().std() if bad and len(batch[0]) > 1 else value


def fit(loss, **settings):
    """32 steps, all records in each of them; the loss is told which one is next."""
    loop = private(
        net(), batches=DataLoader(data(24), batch_size=24), loss=loss, epochs=32, **settings
    )
    with loop:
        for _ in range(32):
            for batch in loop.loader:
                loop.step(batch)
                loss.steps += 1
    return loop


def by_schedule():
    """Steps of `fit` that are looked at anyway: each is an epoch of its own."""
    return [step for step in range(1, 32) if is_due(step, step, first_of_epoch=True)]


def test_what_is_bad_between_two_looks_is_met_by_chance(monkeypatch):
    first = by_schedule()[-1] + 2
    assert fit(Sometimes(first, first + 6)).private  # the schedule alone does not meet it
    monkeypatch.setattr(looks, "_SHARE", 1e9)  # a look before each step
    loss = Sometimes(first, first + 6)
    with pytest.raises(
        PrivacyError, match=rf"(?s)mixes records.*after step {first - 1} of this fit"
    ):
        fit(loss)
    assert loss.steps == first


def test_a_finding_marks_the_account_and_its_ledger(monkeypatch):
    monkeypatch.setattr(looks, "_SHARE", 1e9)
    with pytest.raises(PrivacyError, match="marked as not private"):
        fit(Sometimes(5, 9), ledger="one.jsonl")
    (note,) = [line for line in read_ledger("one.jsonl") if "doubted_since" in line]
    assert note["doubted_since"] == 4  # the last look was before the fifth step
    with private(net(), batches=DataLoader(data(24), 24), ledger="one.jsonl") as again:
        assert again.steps == 5
        assert not again.private
    with private(net(), ledger=False, state=again.state_dict()) as moved:
        assert not moved.private


class Turning(Net):
    """Sound for longer than the first trial looks ahead."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        value = F.cross_entropy(self(x), y)
        return value / x.std() if self.trainer.global_step >= 14 and len(x) > 1 else value


def test_a_finding_changes_the_tag_of_the_run(monkeypatch):
    tags = []

    class Run:
        def log_params(self, settings):
            tags.append("begun")

        def set_tag(self, name, value):
            tags.append((name, value))

    monkeypatch.setattr(_evidence, "run_logs", lambda trainer: [Run()])
    dp = DifferentialPrivacy(noise_multiplier=1.0, delta=1e-3, max_grad_norm=1.0)
    with pytest.raises(PrivacyError, match="marked as not private"):
        trainer(callbacks=[dp], max_epochs=32).fit(Turning(), DataLoader(data(24), batch_size=24))
    assert tags == ["begun", ("defend.private", "true"), ("defend.private", "false")]
    assert not dp.private


@pytest.mark.parametrize(("step_ms", "look_ms"), [(20, 50), (10, 40), (200, 30)])
def test_looks_by_chance_take_half_a_percent_of_the_time(monkeypatch, step_ms, look_ms):
    now = [0.0]
    monkeypatch.setattr(looks.time, "perf_counter", lambda: now[0])
    coin = random.Random(0).random
    plan, count, steps = Looks(lambda step: coin()), 0, 40_000
    with plan.timed():
        now[0] += look_ms / 1000
    for _ in range(steps):
        if plan.are_due(epochs=1):
            count += 1
            with plan.timed():
                now[0] += look_ms / 1000
        now[0] += step_ms / 1000
    count -= 7  # of the schedule, at steps 4, 16, …, and 16384
    share = count * look_ms / (steps * step_ms)
    expected = 0.005
    deviation = (expected * look_ms / (steps * step_ms)) ** 0.5  # of a Poisson count
    assert abs(share - expected) < 5 * deviation
    assert abs(share - 2 * expected) > 5 * deviation  # would be found


def test_the_first_steps_are_not_looked_at_before_a_look_was_timed():
    assert Looks(lambda step: 0.0).rate(3) == 0.0


def test_several_processes_look_together():
    """One decision for the same coin, however long their steps and looks take."""
    coins = [random.Random(0) for _ in range(2)]
    plans = [Looks(lambda step, c=c: c.random(), alone=False) for c in coins]
    for step in range(5000):
        if step % 3 == 0:
            with plans[0].timed():
                pass
        one, other = (plan.are_due(epochs=1) for plan in plans)
        assert one == other
    seen = [data_of(root).coin(step) for root in (7, 7, 8) for step in (0, 1)]
    assert seen[:2] == seen[2:4]
    assert len(set(seen)) == 4


def data_of(root):
    """The data of one process of a fit, its secret root known to the test."""
    found = PrivateData(loader(32, 8), Privacy(**SETTINGS), Processes())
    found.randomness = Randomness(root=root)
    return found
