"""Where and how far an attack may go: masks, immutable channels, radii by record, small batches."""

import dataclasses

import pytest
import torch
from torch import nn

from defend import L2, PGD, InputError, InputSpace, Linf
from defend.objectives.losses import cross_entropy
from defend.threat import L1
from tests.attacks.cases import BALLS, batch, model_for, seeded
from tests.reference.pgd import reference_pgd

SHAPE = (5, 2, 3, 3)


def slow(attack, model, x, y, *, eps, free=None):
    """The reference at the radii `eps`, one a record, from the start that the attack draws."""
    column = eps.view(-1, 1, 1, 1)
    inner = column * attack.ball.start_share
    start = attack.ball.random_start(x, seeded(3), eps=inner, free=free)
    return reference_pgd(
        model, x, y, norm=attack.ball.name, steps=attack.steps, eps=eps,
        step_size=eps * (attack.effective_step_size / attack.ball.eps),
        start=torch.minimum(torch.maximum(start, -x), 1 - x),
        free=free, density=getattr(attack.ball, "density", None),
    )  # fmt: skip


MASKS = {
    "value by value": torch.rand(SHAPE, generator=seeded(7)) > 0.4,
    "pixels": torch.rand(3, 3, generator=seeded(8)) > 0.4,
    "channel": torch.tensor([True, False]).view(2, 1, 1),
    "records": torch.tensor([1, 0, 1, 1, 0]).view(5, 1, 1, 1),
}


@pytest.mark.parametrize("ball", BALLS, ids=lambda b: b.name)
@pytest.mark.parametrize("mask", ["value by value", "pixels", "channel"])
def test_a_mask_equals_the_slow_reference(ball, mask):
    """The steepest direction is that of the free coordinates alone."""
    x, y = batch(SHAPE, dtype=torch.float64)
    model = model_for(SHAPE, torch.float64)
    free = MASKS[mask].bool().expand(SHAPE)
    attack = PGD(ball, steps=3)
    adv = attack(model, x, y, generator=seeded(3), mask=MASKS[mask])
    expected = slow(attack, model, x, y, eps=torch.full((5,), ball.eps), free=free)
    torch.testing.assert_close(adv, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("ball", BALLS, ids=lambda b: b.name)
@pytest.mark.parametrize("mask", MASKS)
def test_what_the_mask_holds_stays_bit_for_bit(ball, mask):
    x, y = batch(SHAPE)
    space = InputSpace(mean=(0.3, 0.7), std=(0.3, 0.7))
    held = ~MASKS[mask].bool().expand(SHAPE)
    x = space.to_model(x)
    for settings in ({}, {"iterate": "best"}, {"stop_when_fooled": True}, {"restarts": 2}):
        attack = PGD(ball, inputs=space, **settings)
        adv = attack(model_for(SHAPE), x, y, mask=MASKS[mask])
        assert torch.equal(adv[held], x[held])
        assert ((adv - x)[~held] != 0).float().mean() > (0.05 if ball.name == "l1" else 0.5)


@pytest.mark.parametrize("ball", BALLS, ids=lambda b: b.name)
def test_what_is_held_stays_though_it_lies_a_hair_outside_the_box(ball):
    x, y = batch(SHAPE)
    x[:, 0], x[:, 1, 0] = 1 + 5e-6, -0.0  # within the rounding that is forgiven
    held = ~MASKS["channel"].expand(SHAPE)
    adv = PGD(ball)(model_for(SHAPE), x, y, mask=~MASKS["channel"])
    free, still = adv[held], adv[~held]
    assert torch.equal(still, x[~held])
    assert (free != x[held]).any()
    adv = PGD(ball)(model_for(SHAPE), x, y, mask=MASKS["channel"])
    assert torch.equal(adv[held].view(torch.int32), x[held].view(torch.int32))  # −0 as well
    assert adv[:, 0][adv[:, 0] != x[:, 0]].max() <= 1  # what moves, moves into the box


@pytest.mark.parametrize("ball", BALLS, ids=lambda b: b.name)
def test_nothing_free_nothing_moves(ball):
    x, y = batch(SHAPE)
    for settings in ({}, {"restarts": 2, "iterate": "best"}, {"stop_when_fooled": True}):
        adv = PGD(ball, **settings)(model_for(SHAPE), x, y, mask=torch.tensor(False))
        assert torch.equal(adv, x)


@pytest.mark.parametrize("shape", [(5,), (4, 1, 1, 1), (1, 5, 2, 3, 3), (2, 2, 3, 3)], ids=str)
def test_refuses_a_mask_that_does_not_fit(shape):
    x, y = batch(SHAPE)
    with pytest.raises(InputError, match=r"`mask` to broadcast to inputs of shape \(5, 2, 3, 3\)"):
        PGD(Linf(0.1))(model_for(SHAPE), x, y, mask=torch.ones(shape))


class Table(nn.Module):
    """A model of tables: column 1 is a category, and steep; column 3 is unknown where NaN."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(2, 3)

    def forward(self, x):
        known = torch.where(x[:, 3:].isnan(), 0.0, x[:, 3:])
        return self.linear(x[:, [0, 2]]) + (x[:, 1:2] - 4) ** 2 * torch.arange(3) + known


TABLE = InputSpace(low=(0.0, 0.0, -5.0, 0.0), high=(1.0, 1.0, 5.0, 1.0), immutable=(1, 3))


def table():
    x = torch.rand(8, 4, generator=seeded(1)) * torch.tensor([1.0, 1.0, 10.0, 1.0])
    x = x - torch.tensor([0.0, 0.0, 5.0, 0.0])
    x[:, 1] = torch.arange(8) % 4 + 7.0  # far outside every box
    x[::2, 3] = float("nan")
    return x, torch.arange(8) % 3


@pytest.mark.parametrize("ball", BALLS, ids=lambda b: b.name)
def test_immutable_columns_may_hold_anything_and_keep_it(ball):
    x, y = table()
    adv = PGD(ball.with_eps(0.3), inputs=TABLE)(Table(), x, y, generator=seeded())
    for column in (1, 3):
        assert torch.equal(adv[:, column].view(torch.int32), x[:, column].view(torch.int32))
    assert (adv[:, [0, 2]] != x[:, [0, 2]]).any(1).all()
    assert adv[:, 0].min() >= 0
    assert adv[:, 0].max() <= 1
    assert (adv[:, 2].abs() <= 5).all()


@pytest.mark.parametrize("ball", BALLS, ids=lambda b: b.name)
def test_steep_columns_that_stay_do_not_slow_the_others(ball):
    """One step from the clean input is as long as without the immutable columns."""
    x, y = table()
    x[:, [0, 2]] = torch.tensor([0.5, 0.0])
    attack = PGD(ball.with_eps(0.2), steps=1, step_size=0.2, random_start=False, inputs=TABLE)
    adv = attack(Table(), x, y)
    length = ball.norm((adv - x)[:, [0, 2]])
    torch.testing.assert_close(length, torch.full((8,), 0.2), rtol=1e-4, atol=0)


@pytest.mark.parametrize("ball", BALLS, ids=lambda b: b.name)
def test_radii_by_record_equal_the_slow_reference(ball):
    x, y = batch(SHAPE, dtype=torch.float64)
    model = model_for(SHAPE, torch.float64)
    eps = ball.eps * torch.tensor([0.0, 0.3, 1.0, 2.0, 5.0], dtype=torch.float64)
    attack = PGD(ball, steps=3)
    expected = slow(attack, model, x, y, eps=eps)
    for chunk_size in (None, 2):
        adv = attack(model, x, y, generator=seeded(3), eps=eps, chunk_size=chunk_size)
        torch.testing.assert_close(adv, expected, rtol=0, atol=1e-9)
    assert torch.equal(adv[0], x[0])
    # Planted wrong answer: one radius for all.
    assert (attack(model, x, y, generator=seeded(3)) - expected)[[1, 3]].abs().max() > 0.01


@pytest.mark.parametrize("settings", [{}, {"step_size": 0.03}, {"start_radius": 0.02}], ids=str)
@pytest.mark.parametrize("ball", BALLS, ids=lambda b: b.name)
def test_another_radius_is_with_eps(ball, settings):
    """As a number, as a tensor, as one for each record: step and start scale along."""
    x, y = batch(SHAPE, dtype=torch.float64)
    model = model_for(SHAPE, torch.float64)
    attack = PGD(ball, steps=2, **settings)
    expected = attack.with_eps(0.4)(model, x, y, generator=seeded())
    for eps in (0.4, torch.tensor(0.4), torch.full((5,), 0.4), torch.full((5, 1, 1, 1), 0.4)):
        adv = attack(model, x, y, generator=seeded(), eps=eps)
        torch.testing.assert_close(adv, expected, rtol=0, atol=1e-6)
    assert not torch.allclose(attack(model, x, y, generator=seeded()), expected, atol=1e-3)


@pytest.mark.parametrize("ball", BALLS, ids=lambda b: b.name)
@pytest.mark.parametrize("settings", [{}, {"step_size": 0.03, "restarts": 2}], ids=str)
def test_a_radius_that_wants_a_gradient_gets_none(ball, settings):
    x, y = batch(SHAPE)
    for shape in ((), (5,)):
        eps = torch.full(shape, 0.1, requires_grad=True)
        adv = PGD(ball, **settings)(model_for(SHAPE), x, y, generator=seeded(), eps=eps)
        assert not adv.requires_grad
        assert eps.requires_grad
        assert eps.grad is None


@pytest.mark.parametrize("ball", BALLS, ids=lambda b: b.name)
def test_a_start_is_drawn_from_the_ball_s_share_of_the_radius(ball):
    """All of it but in L2, where steps from the surface have only the way around; or as asked."""
    x, y = torch.full((400, 20), 0.5), torch.zeros(400).long()
    model = model_for(x.shape)
    expected = {"linf": 1.0, "l2": 0.5, "l1": 1.0}[ball.name]
    for settings, radius in (({}, expected * 0.2), ({"start_radius": 0.07}, 0.07)):
        attack = PGD(ball.with_eps(0.2), steps=1, step_size=1e-7, **settings)
        longest = ball.norm(attack(model, x, y, generator=seeded()) - x).max()
        assert 0.9 * radius < longest <= radius * (1 + 1e-4)


def test_with_eps_scales_step_and_start():
    attack = PGD(Linf(0.2), step_size=0.05, start_radius=0.1).with_eps(0.1)
    assert attack.ball.eps == 0.1
    assert attack.effective_step_size == pytest.approx(0.025)
    assert attack.start_radius == pytest.approx(0.05)
    plain = PGD(Linf(0.2), steps=5).with_eps(0.1)
    assert (plain.step_size, plain.start_radius) == (None, None)
    assert plain.effective_step_size == pytest.approx(0.05)
    assert PGD(L1(0.2, density=0.3)).with_eps(0.1).ball == L1(0.1, density=0.3)


@pytest.mark.parametrize("ball", BALLS, ids=lambda b: b.name)
@pytest.mark.parametrize("settings", [{}, {"step_size": 0.1, "start_radius": 0.2}], ids=str)
def test_radius_zero_is_the_clean_input(ball, settings):
    x, y = batch((3, 2))
    model = model_for(x.shape)
    attack = PGD(ball, restarts=2, iterate="best", **settings)
    assert torch.equal(attack.with_eps(0.0)(model, x, y), x)
    assert torch.equal(attack(model, x, y, eps=0.0), x)
    assert torch.equal(PGD(ball.with_eps(0.0), step_size=0.1)(model, x, y), x)
    zero = dataclasses.replace(attack, ball=ball.with_eps(0.0))
    assert (ball.norm(zero(model, x, y, eps=0.3) - x)[1:] > 0.1).all()  # and back again


@pytest.mark.parametrize("eps", [-0.1, float("inf"), float("nan"), torch.tensor([0.1, -0.1, 0.1])])
def test_refuses_a_radius_that_is_none(eps):
    x, y = batch((3, 2))
    with pytest.raises(InputError, match="`eps` to be finite and ≥ 0"):
        PGD(Linf(0.1))(model_for(x.shape), x, y, eps=eps)


@pytest.mark.parametrize("shape", [(4,), (1,), (3, 2), (1, 3)], ids=str)
def test_refuses_radii_that_do_not_match_the_records(shape):
    x, y = batch((3, 2))
    with pytest.raises(InputError, match="one number for each of the 3 records, got shape"):
        PGD(Linf(0.1))(model_for(x.shape), x, y, eps=torch.full(shape, 0.1))


@pytest.mark.parametrize("ball", BALLS, ids=lambda b: b.name)
@pytest.mark.parametrize("settings", [{"iterate": "best"}, {"stop_when_fooled": True}], ids=str)
def test_a_wide_start_does_not_leave_the_ball(ball, settings):
    """A start that is returned, as the best or the first that fools, is in the ball as well."""
    x, _ = batch((20, 2, 4, 4))
    model = model_for(x.shape)
    y = (model(x).argmax(1) + 1) % 3
    attack = PGD(ball.with_eps(0.05), steps=1, step_size=1e-6, start_radius=3.0, **settings)
    adv = attack(model, x, y, generator=seeded())
    assert ball.norm(adv - x).max() <= 0.05 * (1 + 1e-4)


@pytest.mark.parametrize("ball", BALLS, ids=lambda b: b.name)
@pytest.mark.parametrize(
    "settings",
    [{}, {"stop_when_fooled": True, "restarts": 2}, {"iterate": "best"}, {"loss": "kl"}],
    ids=str,
)
def test_one_record_alone(ball, settings):
    x, y = batch((3, 2, 4, 4), dtype=torch.float64)
    model = model_for(x.shape, torch.float64)
    y = model(x).argmax(1)
    eps = ball.eps * torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)
    mask = torch.rand(3, 2, 4, 4, generator=seeded(4)) > 0.2
    attack = PGD(ball, **settings)
    one = attack(model, x[:1], y[:1], generator=seeded(), eps=eps[:1], mask=mask[:1])
    assert one.shape == (1, 2, 4, 4)
    if "stop_when_fooled" not in settings:
        assert ball.norm(one - x[:1]) > 0.5 * eps[0]
    if "loss" not in settings:
        assert cross_entropy(model(one), y[:1]) > cross_entropy(model(x[:1]), y[:1])
    assert ball.norm(one - x[:1]) <= eps[0] * (1 + 1e-9)
    assert torch.equal(one[~mask[:1]], x[:1][~mask[:1]])


@pytest.mark.parametrize("shape", [(0, 2), (0, 2, 4, 4)], ids=str)
@pytest.mark.parametrize(
    "settings", [{}, {"restarts": 2}, {"stop_when_fooled": True}, {"loss": "kl"}], ids=str
)
def test_an_empty_batch_stays_empty(shape, settings):
    def never(x):
        raise AssertionError("asked")

    run = PGD(L2(0.1), **settings).perturb(never, torch.rand(shape), torch.zeros(0).long())
    assert run.x_adv.shape == shape
    assert (run.gradients, int(run.zero_gradients), int(run.nonfinite_gradients)) == (0, 0, 0)
