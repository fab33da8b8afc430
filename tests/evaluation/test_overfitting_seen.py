"""The alarm in a small training that truly overfits, and in one that does not."""

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


def watched_training(attack, steps):
    torch.manual_seed(3)
    generator, (x, y) = seeded(3), frail_and_robust()
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


def test_the_alarm_goes_off_in_fgsm_training_that_overfits():
    history = watched_training(FGSM, 1100)
    accuracy = [reading.pgd_accuracy for reading in history]
    first = [reading.alarm for reading in history].index(True)
    # It is catastrophic overfitting: robustness was there and is gone, FGSM says the opposite.
    assert max(accuracy[:first]) > 0.65
    assert sum(accuracy[-5:]) / 5 < 0.2
    assert sum(r.single_step_accuracy for r in history[-5:]) / 5 > 0.7
    assert sum(r.single_step_loss for r in history[-5:]) < sum(
        r.single_step_loss for r in history[first // 2 : first // 2 + 5]
    )
    # Neither before it begins nor long after: the training ends with the alarm on.
    assert accuracy[first] < 0.5 * max(accuracy)
    assert min(accuracy[4 : first - 3]) > 0.25
    assert sum(reading.alarm for reading in history[-5:]) >= 3


def test_it_does_not_go_off_in_pgd_training_of_the_same_model():
    history = watched_training(PGD(Linf(0.2), steps=3), 900)
    assert not any(reading.alarm for reading in history)
    assert history[-1].pgd_accuracy > 0.6
