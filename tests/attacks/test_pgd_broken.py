"""Losses and logits that are not finite, and verdicts that only the attack's precision makes."""

import contextlib
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from defend import PGD, Linf
from defend.objectives.losses import cross_entropy
from tests.attacks.cases import batch, model_for, seeded

BAD = [float("inf"), float("-inf"), float("nan")]


def standing(**settings):
    """A model, the labels that it is sure of, and an attack too weak to change one of them."""
    x, _ = batch((40, 2, 4, 4))
    model = model_for(x.shape)
    first, second = model(x).topk(2, 1).values.T
    x = x[first - second > 0.05][:8]
    assert len(x) == 8
    y = model(x).argmax(1)
    attack = PGD(Linf(0.005), steps=3, **settings)
    assert torch.equal(model(attack(model, x, y, generator=seeded())).argmax(1), y)
    return model, x, y, attack


class BreaksAt:
    """Cross-entropy; at some of its calls with a value that is not finite, and a good gradient."""

    def __init__(self, value, *calls):
        self.value, self.calls, self.call = value, calls, 0

    def __call__(self, logits, y):
        self.call += 1
        losses = cross_entropy(logits, y)
        return losses + self.value if self.call in self.calls else losses


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("value", BAD)
def test_a_loss_that_is_not_finite_is_not_the_best(value, targeted):
    model, x, y, attack = standing(iterate="best")
    if targeted:
        y = (y + 1) % 3
    attack = dataclasses.replace(attack, targeted=targeted)
    expected = attack(model, x, y, generator=seeded())
    for call in (1, 2, 3):
        broken = dataclasses.replace(attack, loss=BreaksAt(value, call))
        assert torch.equal(broken(model, x, y, generator=seeded()), expected)
    # Not vacuous: where the true best breaks, another one is taken.
    broken = dataclasses.replace(attack, loss=BreaksAt(value, 4))
    assert not torch.equal(broken(model, x, y, generator=seeded()), expected)


@pytest.mark.parametrize("value", BAD)
def test_a_loss_that_is_not_finite_stops_nobody(value):
    model, x, y, attack = standing(stop_when_fooled=True)
    expected = attack.perturb(model, x, y, generator=seeded())
    broken = dataclasses.replace(attack, loss=BreaksAt(value, 1, 2))
    found = broken.perturb(model, x, y, generator=seeded())
    assert found.gradients == expected.gradients == 3 * len(x)
    assert torch.equal(found.x_adv, expected.x_adv)


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("broken", [4, 8])  # the look at the end of the first run, of the second
def test_a_run_that_ends_without_a_finite_loss_gives_way(value, broken):
    model, x, y, attack = standing(step_size=0.0005)  # it does not forget where it started
    generator = seeded()
    runs = [attack(model, x, y, generator=generator) for _ in range(2)]
    twice = dataclasses.replace(attack, restarts=2, loss=BreaksAt(value, broken))
    found = twice(model, x, y, generator=seeded())
    torch.testing.assert_close(found, runs[1 if broken == 4 else 0], rtol=0, atol=1e-6)
    assert not torch.allclose(*runs, atol=1e-4)


class Undefined(nn.Module):
    """Logits that fall with the first value, and are NaN where it is below 0.4."""

    def forward(self, x):
        z = torch.cat([x.sum(1, keepdim=True), torch.zeros(len(x), 1)], 1)
        return torch.where(x[:, :1] < 0.4, float("nan"), z)


@pytest.mark.parametrize("precision", [None, "fp32", "bf16"])
def test_logits_of_nan_fool_unless_only_the_attack_makes_them_so(precision):
    """Without a precision of its own the attack has found an input that the model fails on."""
    counts = precision is None
    y = torch.zeros(3).long()
    attack = PGD(Linf(0.3), steps=10, random_start=False, precision=precision)
    stops = dataclasses.replace(attack, stop_when_fooled=True)
    run = stops.perturb(Undefined(), torch.full((3, 2), 0.3), y)
    assert run.gradients == (0 if counts else 30)
    best = dataclasses.replace(attack, iterate="best")
    x_adv = best(Undefined(), torch.full((3, 2), 0.5), y)
    assert Undefined()(x_adv).isnan().all() == counts
    assert (x_adv < 0.5).all()


@pytest.mark.parametrize("loss", ["ce", "margin", "kl"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"iterate": "best"}, {"stop_when_fooled": True}, {"restarts": 3}],
    ids=str,
)
def test_classes_that_a_model_rules_out_are_as_if_they_were_not(loss, settings):
    """Logits of −inf: the same x_adv as without these classes."""
    shape = (12, 2, 4, 4)
    x, _ = batch(shape)
    net = model_for(shape, classes=6)
    out = torch.tensor([False, False, False, False, True, True])
    y = net(x)[:, :4].argmax(1)
    attack = PGD(Linf(0.1), steps=5, loss=loss, **settings)
    expected = attack.perturb(lambda v: net(v)[:, :4], x, y, generator=seeded())
    ruled = attack.perturb(lambda v: net(v).masked_fill(out, -torch.inf), x, y, generator=seeded())
    torch.testing.assert_close(ruled.x_adv, expected.x_adv, rtol=0, atol=1e-6)
    assert ruled.gradients == expected.gradients
    assert int(ruled.nonfinite_gradients) == int(ruled.zero_gradients) == 0


class Overflows(nn.Module):
    """Some records have a hidden value that float16 cannot hold."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(12, 16), nn.Linear(16, 5)

    def forward(self, x):
        return self.second(self.first(x - 0.5) * 1e5) * 1e-5


@pytest.mark.parametrize("settings", [{}, {"restarts": 3}, {"iterate": "best"}], ids=str)
@pytest.mark.filterwarnings("ignore:.*not finite", "ignore:.*no hardware")
def test_an_overflow_of_the_attacks_own_does_not_pass_for_success(settings):
    """Stopping there would leave records standing that others of the same run would have fooled."""
    model, x = Overflows(), torch.rand(64, 12, generator=seeded(2))
    y = model(x).argmax(1)

    def fooled(**more):
        attack = PGD(Linf(0.2), precision="fp16", **settings, **more)
        run = attack.perturb(model, x, y, generator=seeded())
        assert run.nonfinite_gradients > 0
        return int((model(run.x_adv).argmax(1) != y).sum())

    assert fooled(stop_when_fooled=True) >= fooled() > 10


class Coarse(nn.Module):
    """Logits (0, 5 · (mean − 0.3)), rounded to whole numbers wherever autocast is on.

    Rounded, a tie goes to class 0: class 1 seems lost from 0.5 on, and is lost from 0 on.
    """

    def forward(self, x):
        lead = 5 * (x.flatten(1).mean(1) - 0.3)
        if torch.is_autocast_enabled("cpu"):
            lead = lead + (lead.round() - lead).detach()
        return torch.stack([torch.zeros_like(lead), lead], 1)


X, Y = torch.full((5, 4), 0.5), torch.ones(5).long()  # a lead of 1
STOPS = PGD(Linf(0.3), steps=8, step_size=0.07, random_start=False, stop_when_fooled=True)


@pytest.mark.parametrize("iterate", [None, "best"])
def test_who_stops_is_fooled_in_the_precision_around_the_attack(iterate):
    """A lead of 0.3 after two steps is a tie in the attack's precision, and none outside."""
    attack = dataclasses.replace(STOPS, precision="bf16", iterate=iterate)
    run = attack.perturb(Coarse(), X, Y)
    assert (Coarse()(run.x_adv).argmax(1) == 0).all()
    assert run.gradients == 3 * len(X)
    exact = dataclasses.replace(attack, precision=None).perturb(Coarse(), X, Y)
    torch.testing.assert_close(run.x_adv, exact.x_adv)
    # Outside rounds as well: then the tie is a verdict, and two steps are enough.
    with torch.autocast("cpu", torch.bfloat16):
        run = attack.perturb(Coarse(), X, Y)
        assert (Coarse()(run.x_adv).argmax(1) == 0).all()
    assert run.gradients == 2 * len(X)


def test_who_only_seems_fooled_at_the_end_starts_again():
    """The last iterate is asked in the outer precision too, before a restart passes it over."""
    attack = PGD(Linf(0.05), steps=2, restarts=3, stop_when_fooled=True, precision="bf16")
    x = torch.full((5, 4), 0.37)  # a lead of 0.1 to 0.6: tied where rounded, never lost
    run = attack.perturb(Coarse(), x, Y, generator=seeded())
    assert (Coarse()(run.x_adv).argmax(1) == 1).all()
    assert run.gradients == 3 * 2 * len(x)


@pytest.mark.parametrize("outer", [None, torch.bfloat16], ids=str)
def test_the_confirming_forward_keeps_no_casts(outer):
    """Made without gradients, they would cut the training step's weights off from its loss."""
    model, x, y, _ = standing()
    y = (y + 1) % 3
    with torch.autocast("cpu", outer) if outer else contextlib.nullcontext():
        attack = PGD(Linf(0.005), stop_when_fooled=True, precision="bf16")
        assert (
            attack.perturb(model, x, y, generator=seeded()).gradients == 0
        )  # all were asked again
        F.cross_entropy(model(x), y).backward()
    assert all(p.grad is not None for p in model.parameters())
