"""What an attack increases: each loss against the slow reference, targets, outputs, shapes of y."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from defend import L2, PGD, InputError, Linf
from defend.objectives.losses import cross_entropy
from tests.attacks.cases import BALLS, Watched, batch, model_for, seeded
from tests.reference.objectives import divergence, dlr
from tests.reference.pgd import reference_pgd

SHAPE = (5, 1, 3, 3)

WAYS = [{}, {"iterate": "best"}, {"stop_when_fooled": True}]


def squares(logits, y):
    """A loss of one's own, of class indices."""
    return (logits - 3 * F.one_hot(y, logits.shape[1])).square().sum(1)


def slow_dlr(logits, y):
    return dlr(list(logits[0]), int(y)).view(1)


def slow_targeted_margin(logits, y):
    """(max_{i≠t} z_i − z_t) / (z_π1 − (z_π3 + z_π4) / 2); not divided below four classes."""
    z, t = logits[0], int(y)
    ranked = sorted(range(len(z)), key=lambda i: -float(z[i]))
    lead = max((z[i] for i in range(len(z)) if i != t), key=float) - z[t]
    if len(z) < 4:
        return lead.view(1)
    return (lead / (z[ranked[0]] - (z[ranked[2]] + z[ranked[3]]) / 2)).view(1)


# What PGD is told, and the same for one record.
LOSSES = {"ce": F.cross_entropy, "margin": slow_dlr, squares: squares}


def slow(attack, model, x, y, **settings):
    """The reference's x_adv for the settings of an attack, from the start that it draws."""
    ball = attack.ball
    start = ball.random_start(x, seeded(3), eps=ball.eps * ball.start_share)
    return reference_pgd(
        model, x, y, norm=attack.ball.name, eps=attack.ball.eps, steps=attack.steps,
        step_size=attack.effective_step_size, density=getattr(attack.ball, "density", None),
        start=torch.minimum(torch.maximum(start, -x), 1 - x), **settings,
    )  # fmt: skip


@pytest.mark.parametrize("classes", [3, 5])
@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("loss", LOSSES, ids=["ce", "margin", "own"])
@pytest.mark.parametrize("ball", BALLS, ids=lambda b: b.name)
def test_every_loss_equals_the_slow_reference(ball, loss, targeted, classes):
    x, y = batch(SHAPE, dtype=torch.float64, classes=classes)
    model = model_for(SHAPE, torch.float64, classes)
    attack = PGD(ball, steps=4, loss=loss, targeted=targeted)
    adv = attack(model, x, y, generator=seeded(3))
    by_hand = slow_targeted_margin if targeted and loss == "margin" else LOSSES[loss]
    expected = slow(attack, model, x, y, loss=by_hand, targeted=targeted)
    torch.testing.assert_close(adv, expected, rtol=0, atol=1e-9)
    # Planted wrong answer: towards the target instead of away from y, or the other way round.
    turned = PGD(ball, steps=4, loss=loss, targeted=not targeted)
    assert (turned(model, x, y, generator=seeded(3)) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("ball", BALLS, ids=lambda b: b.name)
def test_kl_equals_the_slow_reference(ball):
    """The clean logits are constants: no gradient flows through them."""
    x, y = batch(SHAPE, dtype=torch.float64)
    model = model_for(SHAPE, torch.float64)
    clean = model(x).detach()
    index = torch.arange(len(x))
    attack = PGD(ball, steps=4, loss="kl")
    adv = attack(model, x, y, generator=seeded(3))

    def forward_kl(logits, i):
        return divergence(clean[int(i)], logits[0]).view(1)

    def backward_kl(logits, i):
        return divergence(logits[0], clean[int(i)]).view(1)

    expected = slow(attack, model, x, index, loss=forward_kl)
    torch.testing.assert_close(adv, expected, rtol=0, atol=1e-9)
    if ball.name == "l2":  # planted wrong answer: KL(adv ‖ clean); L∞ and L1 hardly tell them apart
        wrong = slow(attack, model, x, index, loss=backward_kl)
        assert (adv - wrong).abs().max() > 1e-6


def test_kl_does_not_ask_for_y():
    x, y = batch((6, 2, 4, 4))
    model = model_for(x.shape)
    attack = PGD(Linf(0.1), loss="kl")
    assert torch.equal(
        attack(model, x, y, generator=seeded()), attack(model, x, 2 - y, generator=seeded())
    )


def test_kl_asks_for_the_clean_logits_once_a_run():
    x, y = batch((6, 2, 4, 4))
    model = Watched(model_for(x.shape))
    PGD(Linf(0.1), loss="kl", steps=3)(model, x, y, generator=seeded())
    assert torch.equal(model.inputs[0], x)
    assert not model.outputs[0].requires_grad
    assert len(model.inputs) == 1 + 3


def test_a_target_is_reached():
    x, _ = batch((20, 2, 4, 4))
    model = model_for(x.shape)
    target = (model(x).argmax(1) + 1) % 3
    for loss in ("ce", "margin"):
        adv = PGD(L2(3.0), steps=20, loss=loss, targeted=True)(model, x, target)
        assert (model(adv).argmax(1) == target).float().mean() > 0.9
        assert (cross_entropy(model(adv), target) < cross_entropy(model(x), target)).all()
    away = PGD(L2(3.0), steps=20)(model, x, target)
    assert (model(away).argmax(1) == target).float().mean() < 0.1


def test_the_margin_still_climbs_where_cross_entropy_is_saturated():
    """A model that is sure of itself in float32: softmax gives 1, and its gradient 0."""
    x, _ = batch((20, 2, 4, 4))
    plain = model_for(x.shape)
    y = plain(x).argmax(1)
    sure = nn.Sequential(plain, Scale(1e6))
    ce = PGD(Linf(0.2), random_start=False).perturb(sure, x, y)
    dlr = PGD(Linf(0.2), random_start=False, loss="margin").perturb(sure, x, y)
    assert int(ce.zero_gradients) > 0.5 * ce.gradients
    assert int(dlr.zero_gradients) == 0
    right_ce, right_dlr = ((sure(r.x_adv).argmax(1) == y).sum() for r in (ce, dlr))
    assert right_dlr < right_ce


class Scale(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x * self.factor


@pytest.mark.parametrize("loss", ["ce", "margin", "kl"])
@pytest.mark.parametrize("settings", WAYS, ids=str)
def test_soft_labels(loss, settings):
    x, y = batch((6, 2, 4, 4))
    model = model_for(x.shape)
    attack = PGD(Linf(0.1), loss=loss, **settings)
    soft = F.one_hot(y, 3).float()
    torch.testing.assert_close(
        attack(model, x, soft, generator=seeded()), attack(model, x, y, generator=seeded())
    )
    smooth = 0.8 * soft + 0.2 / 3
    adv = attack(model, x, smooth, generator=seeded())
    if loss == "ce" and not settings:
        assert (cross_entropy(model(adv), smooth) > cross_entropy(model(x), smooth)).all()


def test_segmentation():
    """Logits [N, classes, H, W], y [N, H, W]: a loss of one's own, averaged over pixels."""
    x, _ = batch((4, 2, 5, 5))
    torch.manual_seed(0)
    model = nn.Conv2d(2, 3, 3, padding=1)
    y = model(x).argmax(1)

    def loss(logits, y):
        return F.cross_entropy(logits, y, reduction="none").mean((1, 2))

    for settings in WAYS:
        adv = PGD(Linf(0.2), loss=loss, **settings)(model, x, y)
        assert (loss(model(adv), y) > loss(model(x), y)).all()
        assert (model(adv).argmax(1) != y).float().mean() > 0.05


REGRESSION = [
    *((shape, way) for shape in ((6,), (6, 1), (6, 3)) for way in [*WAYS, {"restarts": 2}]),
]


@pytest.mark.parametrize(("shape", "settings"), REGRESSION, ids=str)
def test_regression(shape, settings):
    """No classes, no fooled: the loss alone counts, and every record takes every step."""
    x, _ = batch((6, 2, 4, 4))
    outputs = shape[1] if len(shape) > 1 else 1
    net = model_for(x.shape, classes=outputs)
    model = net if len(shape) > 1 else (lambda v: net(v).squeeze(1))
    with torch.no_grad():
        y = model(x) + 0.1 * torch.randn(shape, generator=seeded(5))

    def loss(out, y):
        return (out - y).square().flatten(1).mean(1) if out.ndim > 1 else (out - y).square()

    result = PGD(Linf(0.1), loss=loss, **settings).perturb(model, x, y, generator=seeded())
    assert result.gradients == 6 * 10 * settings.get("restarts", 1)
    assert (loss(model(result.x_adv), y) > loss(model(x), y)).all()


@pytest.mark.parametrize("settings", WAYS, ids=str)
def test_regression_towards_a_target(settings):
    x, _ = batch((6, 2, 4, 4))
    model = model_for(x.shape, classes=1)
    y = model(x).detach() + 0.5

    def loss(out, y):
        return (out - y).square().mean(1)

    adv = PGD(Linf(0.1), loss=loss, targeted=True, **settings)(model, x, y, generator=seeded())
    assert (loss(model(adv), y) < loss(model(x), y)).all()


def logistic(logits, y):
    return F.binary_cross_entropy_with_logits(logits.squeeze(1), y.float(), reduction="none")


@pytest.mark.parametrize("settings", WAYS, ids=str)
def test_one_logit_for_two_classes(settings):
    """The argmax of one logit is always 0: it says nothing on who is fooled."""
    x, _ = batch((8, 2, 4, 4))
    model = model_for(x.shape, classes=1)
    y = (model(x).squeeze(1) > model(x).median()).long()
    attack = PGD(Linf(0.1), loss=logistic, **settings)
    adv = attack(model, x, y, generator=seeded())
    assert (logistic(model(adv), y) > logistic(model(x), y)).all()


@pytest.mark.parametrize("settings", WAYS, ids=str)
@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("columns", [1, 2])
def test_the_margin_refuses_labels_in_a_column(columns, targeted, settings):
    """Taken for probabilities, every label would be class 0, and the attack one on that class."""
    x, y = batch((8, 2, 4, 4))
    attack = PGD(Linf(0.1), loss="margin", targeted=targeted, **settings)
    message = rf"indices of shape \(8,\) or .* \(8, 3\), got targets of shape \(8, {columns}\)"
    with pytest.raises(InputError, match=message):
        attack(model_for(x.shape), x, y[:, None].expand(8, columns))


@pytest.mark.parametrize("settings", WAYS, ids=str)
def test_labels_in_a_column(settings):
    """y of shape [N, 1] holds labels, not probabilities of classes."""
    x, y = batch((8, 2, 4, 4))
    model = model_for(x.shape)

    def loss(logits, y):
        return F.cross_entropy(logits, y.squeeze(1), reduction="none")

    attack = PGD(Linf(0.1), loss=loss, **settings)
    adv = attack(model, x, y.unsqueeze(1), generator=seeded())
    right = model(x).argmax(1) == y
    assert right.any()
    assert (loss(model(adv), y[:, None]) > loss(model(x), y[:, None]))[right].all()


def test_outputs_with_logits_are_understood():
    x, y = batch((3, 2))
    model = model_for(x.shape)
    expected = PGD(Linf(0.1))(model, x, y, generator=seeded())

    class Output:
        def __init__(self, logits):
            self.logits = logits

    for wrap in (lambda z: {"loss": None, "logits": z}, Output):
        for loss in ("ce", "kl"):
            attack = PGD(Linf(0.1), loss=loss)
            expected = attack(model, x, y, generator=seeded())
            got = attack(lambda v, wrap=wrap: wrap(model(v)), x, y, generator=seeded())
            assert torch.equal(got, expected)
    for wrong in (lambda z: (z,), lambda z: {"output": z}, lambda z: {"logits": z.tolist()}):
        with pytest.raises(TypeError, match="return a tensor of logits"):
            PGD(Linf(0.1))(lambda v, wrong=wrong: wrong(model(v)), x, y)


@pytest.mark.parametrize("settings", [{}, {"stop_when_fooled": True}, {"loss": "kl"}], ids=str)
def test_a_plain_callable_is_a_model(settings):
    x, y = batch((6, 2, 4, 4))
    model = model_for(x.shape).eval()
    attack = PGD(Linf(0.1), **settings)
    expected = attack(model, x, y, generator=seeded())
    assert torch.equal(attack(lambda v: model(v), x, y, generator=seeded()), expected)


@pytest.mark.parametrize(
    "loss",
    [F.cross_entropy, lambda z, y: F.cross_entropy(z, y, reduction="none")[:, None]],
    ids=["a mean", "a column"],
)
def test_refuses_a_loss_that_is_not_one_number_a_record(loss):
    with pytest.raises(InputError, match=r"shape \(3,\), got .*reduction='none'"):
        PGD(Linf(0.1), loss=loss)(model_for((1, 2)), torch.rand(3, 2), torch.zeros(3).long())


def test_a_targeted_margin_is_not_stuck_where_the_target_is_third():
    """(max − z_t) / (z_π1 − z_π3) is 1, whatever the input, while z_t is z_π3."""
    x, _ = batch((16, 2, 4, 4), classes=5)
    model = model_for(x.shape, classes=5)
    third = model(x).topk(3, dim=1).indices[:, 2]
    attack = PGD(L2(0.5), steps=5, loss="margin", targeted=True, random_start=False)
    result = attack.perturb(model, x, third)
    assert int(result.zero_gradients) == 0
    assert (cross_entropy(model(result.x_adv), third) < cross_entropy(model(x), third)).all()
