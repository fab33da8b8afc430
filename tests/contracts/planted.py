"""Wrong ways to train robustly and privately at once, each of which the harness has to flag.

The natural ones: most people would write one of these first. Each is a function of the records that
gives the clipped sum of one step; defend's guards are off.
"""

import functools
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from defend.objectives import AWP
from defend.objectives.awp import PerturbedWeights, weight_perturbation
from defend.objectives.losses import kl
from defend.privacy.gradients import per_record
from defend.privacy.gradients.per_record import PerRecordGradients
from defend.privacy.mechanism.gaussian import clip_and_sum
from defend.training import Adversarial
from tests.contracts import sensitivity
from tests.contracts.sensitivity import ATTACK, C, Combination, Record, augmented, clipped_sum, net
from tests.contracts.small import flat


def by_hand(loss, batch: list[Record]) -> Tensor:
    """Per-record gradients of `loss(model, x, x_adv, y)`, summed over rows, clipped and added."""
    model = net()
    x, y = augmented(batch)
    x_adv = ATTACK(model, x, y)
    watch = PerRecordGradients(model, loss_reduction="sum")
    try:
        rows, backwards = loss(model, x, x_adv, y)
        total = None
        for part in backwards:
            watch.clear()
            watch.expect(rows)
            part().backward()
            sums = flat(clip_and_sum(watch.read(rows), C)).double()
            total = sums if total is None else total + sums
        return total
    finally:
        watch.remove()


def ce(model, x, y):
    return F.cross_entropy(model(x), y, reduction="sum")


def concatenated(model, x, x_adv, y):
    both, labels = torch.cat([x, x_adv]), torch.cat([y, y])
    return len(both), [lambda: ce(model, both, labels)]


def two_backwards(model, x, x_adv, y):
    return len(x), [lambda: ce(model, x, y), lambda: ce(model, x_adv, y)]


def permuted_second_forward(model, x, x_adv, y):
    """The rows meet again in the loss, but the hooks took them for others."""
    order = torch.arange(len(x)).roll(1)

    def loss():
        clean = model(x)
        adv = model(x_adv[order])[order.argsort()]
        return F.cross_entropy(clean, y, reduction="sum") + 6 * kl(clean, adv).sum()

    return len(x), [loss]


def no_merge(batch):
    """Views as rows of their own: each is clipped, none are merged."""
    combination = Combination("Madry", 2, None)

    with (
        mock.patch.object(per_record, "mean_of_views", lambda gradient, views: gradient),
        mock.patch.object(PerRecordGradients, "_compare_with_autograd"),
        mock.patch.object(PerRecordGradients, "_of", lambda s, n, p, r: s._gradients[p]),
    ):
        return clipped_sum(batch, combination)


def merged_with_the_next(batch):
    """Views laid out [K, records], merged as if they were [records, K]."""
    interleave = augmented

    def shuffled(items):
        return interleave([*items[0::2], *items[1::2]])

    with mock.patch.object(sensitivity, "augmented", shuffled):
        return clipped_sum(batch, Combination("Madry", 2, None))


class Attack:
    """An attack of someone's own, under defend."""

    def __init__(self, perturb):
        self.perturb = perturb

    def __call__(self, model, x, y, *, generator=None, chunk_size=None):
        if len(x) == 0:
            return x
        return self.perturb(model, x, y)


def gradient(model, x, y):
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(ce(model, x, y), x)[0]


def batch_statistics(model, x, y):
    """The step is normalized over the batch, as BatchNorm in train mode would."""
    g = gradient(model, x, y)
    return (x + 3.0 * g / g.norm()).clamp(0, 1)


def centred(model, x, y):
    """The attack looks at the model through a BatchNorm of this batch."""

    def seen(inputs):
        return model((inputs - inputs.mean(0)) * 3)

    return (x + 0.3 * gradient(seen, x, y).sign()).clamp(0, 1)


def stops_on_batch_success(model, x, y):
    """It goes on for all until the whole batch is fooled, or some steps are over."""
    x_adv = x
    for _ in range(10):
        if (model(x_adv).argmax(1) != y).float().mean() >= 0.6:
            break
        x_adv = (x_adv + 0.1 * gradient(model, x_adv, y).sign()).clamp(0, 1)
    return x_adv


def universal(model, x, y):
    """One perturbation for all."""
    return (x + 0.3 * gradient(model, x, y).mean(0).sign()).clamp(0, 1)


def attacked_by(perturb, batch):
    settings = Adversarial(Attack(perturb))
    with mock.patch.dict(sensitivity.OBJECTIVES, {"planted": settings}):
        return clipped_sum(batch, Combination("planted", 1, None))


def raw_awp(batch):
    """Weights moved along the gradient of this very batch, without noise."""

    def loss(model, x, x_adv, y):
        objective = AWP(gamma=5.0)
        moved = PerturbedWeights(
            model, weight_perturbation(model, objective, x, x_adv, y, objective.gamma)
        )
        moved.apply()
        return len(x), [lambda: ce(model, x_adv, y)]

    return by_hand(loss, batch)


def as_many_clean(batch):
    """The same number of records stays clean in every batch."""
    draw = sensitivity.draw_rows

    def fixed(steps, x, generator, private, views):
        return draw(steps, x, generator, False, views)

    with mock.patch.object(sensitivity, "draw_rows", fixed):
        return clipped_sum(batch, Combination("half clean", 1, None))


PLANTED = {
    "clean and adversarial rows in one batch": functools.partial(by_hand, concatenated),
    "two backwards": functools.partial(by_hand, two_backwards),
    "a second forward on permuted rows (TRADES)": functools.partial(
        by_hand, permuted_second_forward
    ),
    "views clipped one by one": no_merge,
    "views of different records merged": merged_with_the_next,
    "an attack with statistics of the batch": functools.partial(attacked_by, centred),
    "an attack step normalized over the batch": functools.partial(attacked_by, batch_statistics),
    "an attack that stops when the batch is fooled": functools.partial(
        attacked_by, stops_on_batch_success
    ),
    "a universal perturbation": functools.partial(attacked_by, universal),
    "AWP from the batch's own gradient": raw_awp,
    "as many clean records in every batch": as_many_clean,
}


def move_of(name: str) -> float:
    """How far one record moves the sum, in units of C."""
    return sensitivity.largest_move(PLANTED[name], sensitivity.records())
