"""The alarm in a small training that truly overfits, and in one that does not.

A training's course differs between processors as it does between seeds. So what is asserted held
for each of six seeds with a margin; beside it stands what was found.
"""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from defend import PGD, Linf
from defend.evaluation.overfitting import OverfittingAlarm
from tests.evaluation.test_overfitting import FGSM, seeded


def frail_and_robust(records=1024, bits=3, copies=8):
    """Three bits to read, each told by one robust column and by eight frail ones.

    The robust column (0.05 or 0.95) is wrong for 12% of the records. The frail ones lie 0.13 off
    the middle, so that ε = 0.2 turns them over, but to 0.07 off the middle and not to 0.13: a
    bent model can tell a frail bit from the same bit under attack. Then FGSM fails, and PGD, which
    stops on the way, succeeds. (Ortiz-Jimenez et al. 2023, arXiv 2206.08242, have images so.)
    """
    generator = seeded()
    bit = torch.randint(0, 2, (records, bits), generator=generator)
    sign = 2.0 * bit - 1
    told = torch.where(torch.rand(records, bits, generator=generator) < 0.88, sign, -sign)
    noise = 0.06 * torch.randn(records, bits * copies, generator=generator)
    frail = 0.5 + 0.13 * sign.repeat_interleave(copies, 1) + noise
    x = torch.cat([0.5 + 0.45 * told, frail], 1).clamp(0, 1)
    return x, (bit * 2 ** torch.arange(bits)).sum(1)


ATTACKS = {"fgsm": FGSM, "pgd": PGD(Linf(0.2), steps=3)}


@functools.cache
def watched_training(attack, seed, steps):
    torch.manual_seed(seed)
    generator, (x, y) = seeded(seed), frail_and_robust()
    attack = ATTACKS[attack]
    model = nn.Sequential(
        nn.Linear(27, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 8)
    )
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    watch, history = OverfittingAlarm(every_n_steps=25).watch(attack), []
    for step in range(steps):
        if step % 8 == 0:
            order = torch.randperm(len(x), generator=generator).split(128)
        rows = order[step % 8]
        if watch.is_due(step):
            history.append(watch.look(model, x[rows], y[rows], generator))
        x_adv = attack(model, x[rows], y[rows], generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x_adv), y[rows]).backward()
        optimizer.step()
    return history


def recent(values):
    """The mean of each four in a row: of 256 records, so that chance moves it by 0.03."""
    return [sum(values[i - 4 : i]) / 4 for i in range(4, len(values) + 1)]


def assert_overfits(history):
    """Robustness was there and is gone; the attack of the training says the opposite."""
    accuracy = recent([reading.pgd_accuracy for reading in history])
    seen = recent([reading.single_step_accuracy for reading in history])
    loss = recent([reading.single_step_loss for reading in history])
    best = max(accuracy)
    assert best > 0.5  # 0.70 to 0.74
    assert accuracy[-1] < 0.5 * best  # 0 to 0.29
    assert seen[-1] > accuracy[-1] + 0.3  # 0.60 to 0.85
    assert loss[-1] < loss[accuracy.index(best)]


@pytest.mark.parametrize("seed", [0, 3])
def test_the_alarm_goes_off_in_fgsm_training_that_overfits(seed):
    history = watched_training("fgsm", seed, 1100)
    assert_overfits(history)
    accuracy = recent([reading.pgd_accuracy for reading in history])
    alarm = [reading.alarm for reading in history][3:]
    best = max(accuracy)
    # Not before it begins, nor long after.
    assert max(a for a, on in zip(accuracy, alarm, strict=True) if on) < 0.6 * best  # 0.31 to 0.44
    gone = next(i for i, a in enumerate(accuracy) if a < best / 3 and i > accuracy.index(best))
    assert alarm.index(True) < gone + 5  # from 2 looks before to 1 after
    # Where nothing is left of it, the alarm is on.
    nothing = [on for a, on in zip(accuracy, alarm, strict=True) if a < best / 4]
    assert sum(nothing) >= len(nothing) / 2  # at most one look in 15 was off


def test_it_does_not_go_off_in_pgd_training_of_the_same_model():
    history = watched_training("pgd", 3, 600)
    assert not any(reading.alarm for reading in history)
    assert recent([reading.pgd_accuracy for reading in history])[-1] > 0.5  # 0.67 to 0.76
    with pytest.raises(AssertionError):
        assert_overfits(history)
