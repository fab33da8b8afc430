"""Objectives, Free and the alarm in two processes: what the loop by hand, or one process, gives."""

import dataclasses
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy

from defend import AdversarialTraining
from defend.attacks.free import Free
from defend.attacks.presets import fgsm_rs
from defend.attacks.result import GradientCounts
from defend.evaluation.overfitting import OverfittingAlarm, OverfittingWatch
from defend.objectives import AWP, MART, TRADES, Madry
from defend.training.adversarial import AdversarialSteps
from tests.callbacks.by_hand import ATTACK, Rich, fit, plain_layers, train
from tests.training.adversarial_cases import GAMMA, state_of

OBJECTIVES = [TRADES(4.0), MART(3.0), AWP(Madry(), GAMMA), AWP(TRADES(4.0), GAMMA)]


class Ranks(Callback):
    """What each rank ended with, and the batches that it trained."""

    def __init__(self, folder):
        self.folder, self.steps = folder, []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        gradient = torch.cat([p.grad.flatten() for p in pl_module.parameters()])
        self.steps.append((state_of(pl_module), gradient.clone()))

    def on_train_end(self, trainer, pl_module):
        report = {
            "weights": state_of(pl_module),
            "steps": self.steps,
            "attack": repr(next(c for c in trainer.callbacks if hasattr(c, "attack")).attack),
            "metrics": {k: float(v) for k, v in trainer.callback_metrics.items()},
        }
        torch.save(report, Path(self.folder, f"{trainer.global_rank}.pt"))


def module():
    return Rich(layers=plain_layers())


def two(folder, objective, *, find_unused=False, **settings):
    """A fit of 2 epochs in two processes; what both ended with."""
    strategy = DDPStrategy(
        start_method="fork", find_unused_parameters=find_unused, process_group_backend="gloo"
    )
    options = {"strategy": strategy, "devices": 2, "max_epochs": 2, "precision": "64-true"}
    options["use_distributed_sampler"] = False  # it would shuffle
    settings = {"callbacks": [Ranks(str(folder))], **options, **settings}
    fit(objective, module(), **settings)
    return [torch.load(Path(folder, f"{rank}.pt")) for rank in range(2)]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: o.name)
def test_two_processes_equal_the_loop_by_hand(tmp_path, objective):
    first, second = two(tmp_path, objective)
    assert torch.equal(first["weights"], second["weights"])
    for (mine, my_gradient), (other, others) in zip(first["steps"], second["steps"], strict=True):
        assert torch.equal(mine, other)  # also before each step: no rank is left perturbed
        assert torch.equal(my_gradient, others)
    model = module().double()
    states = train(model, objective, epochs=2, world=2, dtype=torch.float64)
    torch.testing.assert_close(first["weights"], states[-1], rtol=0, atol=1e-9)


def test_two_processes_equal_one(tmp_path):
    """Where nothing is drawn at random, and each weight is where it was."""
    attack = dataclasses.replace(ATTACK, random_start=False)
    first, _ = two(tmp_path, MART(3.0), attack=attack, find_unused=True)
    one = fit(MART(3.0), module(), attack=attack, max_epochs=2, precision="64-true")
    torch.testing.assert_close(first["weights"], state_of(one), rtol=0, atol=1e-9)


def test_free_in_two_processes(tmp_path):
    """δ belongs to a position on a rank; the gradients are of all ranks."""
    free = Free(ATTACK.ball, replays=2)
    first, second = two(tmp_path, Madry(), attack=free)
    assert torch.equal(first["weights"], second["weights"])
    assert len(first["steps"]) == 16
    assert first["metrics"]["attack/nonfinite_grad_rate"] == 0
    one = fit(Madry(), module(), attack=free, max_epochs=2, precision="64-true")
    # One process keeps the δ of all rows by position: rank r has those at r, r + 2, …
    torch.testing.assert_close(first["weights"], state_of(one), rtol=0, atol=1e-9)


@pytest.mark.parametrize("theirs", [(0, 0, 0), (24, 1, 3)], ids=["none", "more"])
def test_rates_are_of_all_ranks_together(tmp_path, monkeypatch, theirs):
    """A rank may have had no records, as under Poisson sampling: others wait for what it logs."""

    def counts(self):
        return GradientCounts(*(theirs if torch.distributed.get_rank() else (8, 2, 1)))

    monkeypatch.setattr(AdversarialSteps, "take_counts", counts)
    first, second = two(tmp_path, Madry(), max_epochs=1)
    for metrics in (first["metrics"], second["metrics"]):
        total = 8 + theirs[0]
        assert metrics["attack/zero_grad_rate"] == pytest.approx((2 + theirs[1]) / total)
        assert metrics["attack/nonfinite_grad_rate"] == pytest.approx((1 + theirs[2]) / total)


class OnOneRank(OverfittingWatch):
    """Goes off at step 2, on rank 1 only."""

    looks = 0

    def look(self, model, x, y, generator=None):
        reading = super().look(model, x, y, generator)
        self.looks += 1
        alarm = torch.distributed.get_rank() == 1 and self.looks == 3
        return dataclasses.replace(reading, alarm=alarm)


def test_an_alarm_on_one_rank_switches_all_and_the_original_knows(tmp_path, monkeypatch):
    monkeypatch.setattr(OverfittingAlarm, "watch", lambda self, attack: OnOneRank(self, attack))
    callbacks = []

    class Kept(AdversarialTraining):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            callbacks.append(self)

    monkeypatch.setattr("tests.callbacks.by_hand.AdversarialTraining", Kept)
    alarm = OverfittingAlarm(every_n_steps=1, switch=True)
    attack = fgsm_rs(0.1)
    first, second = two(tmp_path, Madry(), attack=attack, settings={"alarm": alarm})
    assert first["attack"] == second["attack"] != repr(attack)
    assert "steps=10" in first["attack"]
    assert first["metrics"]["attack/overfitting"] == 1
    assert torch.equal(first["weights"], second["weights"])
    (original,) = callbacks
    assert repr(original.attack) == first["attack"]
    assert original.state_dict()["switched"]
    assert original.state_dict()["seed"] == 11
