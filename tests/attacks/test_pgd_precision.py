"""The attack's own precision, gradients that were of no use, and what makes the host wait."""

import contextlib
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from defend import L2, PGD, Linf
from defend.objectives.losses import cross_entropy
from tests.attacks.cases import BALLS, Waits, batch, model_for, seeded

NAMES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(dtype):
    return torch.autocast("cpu", dtype) if dtype else contextlib.nullcontext()


def dtypes_seen(attack, outer, model_dtype=torch.float32):
    """dtypes of the model's input and output, of what the loss gets, and of x_adv."""
    x, y = batch((4, 2, 4, 4), dtype=model_dtype)
    model = model_for(x.shape, model_dtype)
    seen = {"input": set(), "output": set(), "loss": set()}

    def look(module, args, output):
        seen["input"].add(args[0].dtype)
        seen["output"].add(output.dtype)

    def loss(logits, y):
        seen["loss"].add(logits.dtype)
        return cross_entropy(logits, y)

    model.register_forward_hook(look)
    with autocast(outer):
        adv = PGD(Linf(0.1), loss=loss, **attack)(model, x, y)
    return {**seen, "adv": {adv.dtype}}


@pytest.mark.parametrize("outer", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("precision", [None, "fp32", "bf16", "fp16"])
@pytest.mark.parametrize("stop_when_fooled", [False, True])
def test_the_forward_runs_in_the_precision_asked_for(precision, outer, stop_when_fooled):
    expected = NAMES[precision] if precision else (outer or torch.float32)
    seen = dtypes_seen({"precision": precision, "stop_when_fooled": stop_when_fooled}, outer)
    outputs = {expected, outer or torch.float32} if stop_when_fooled else {expected}
    assert seen.pop("output") == outputs  # who stops is looked at in the outer precision, too
    assert seen == {key: {torch.float32} for key in ("input", "loss", "adv")}


def test_float64_models_stay_in_float64():
    seen = dtypes_seen({"precision": "bf16"}, None, torch.float64)
    assert list(seen.values()) == [{torch.float64}] * 4


class Single(nn.Module):
    """A float32 model behind a cast: its losses are float32 whatever the input."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x.float())


def rounded(logits, y):
    return cross_entropy(logits, y).bfloat16()


WAYS = [
    {},
    {"iterate": "best"},
    {"stop_when_fooled": True},
    {"restarts": 2},
    {"stop_when_fooled": True, "restarts": 2, "iterate": "best"},
]


@pytest.mark.parametrize("settings", WAYS, ids=str)
@pytest.mark.parametrize("kind", ["float64 inputs", "bf16 losses", "float64 targets"])
def test_inputs_losses_and_targets_may_be_of_different_dtypes(kind, settings):
    x, _ = batch((8, 2, 4, 4))
    model = model_for(x.shape)
    y = model(x).argmax(1)
    attack = PGD(Linf(0.05), steps=3, **settings)
    expected = attack(model, x, y, generator=seeded())
    if kind == "float64 inputs":
        generator = torch.Generator().manual_seed(0)
        adv = attack(Single(model), x.double(), y, generator=generator)
        assert adv.dtype == torch.float64
        assert (adv - x).abs().max() <= 0.05 + 1e-12  # the start is another one in float64
        assert ((adv - x).abs() > 0.9 * 0.05).float().mean() > 0.3
    elif kind == "bf16 losses":
        adv = PGD(Linf(0.05), steps=3, loss=rounded, **settings)(model, x, y, generator=seeded())
        assert adv.dtype == torch.float32
        # Losses that round alike may prefer another iterate; the gradients are rounded by 2⁻⁸.
        assert ((adv - expected).abs() < 1e-6).float().mean() > 0.5
    else:
        adv = attack(model, x, F.one_hot(y, 3).double(), generator=seeded())
        assert torch.equal(adv, expected)


@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_fp32_is_the_same_whatever_the_training_runs_in(loss):
    x, y = batch((6, 2, 4, 4))
    model = model_for(x.shape)
    attack = PGD(Linf(0.1), precision="fp32", iterate="best", loss=loss)
    expected = attack(model, x, y, generator=seeded())
    with autocast(torch.bfloat16):
        assert torch.equal(attack(model, x, y, generator=seeded()), expected)
        half = PGD(Linf(0.1), iterate="best", loss=loss)(model, x, y, generator=seeded())
    assert not torch.equal(half, expected)


@pytest.mark.parametrize("ball", BALLS, ids=lambda b: b.name)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_attacks_as_well(ball, precision):
    x, y = batch((40, 2, 4, 4))
    model = model_for(x.shape)
    losses = [
        cross_entropy(model(PGD(ball, precision=p)(model, x, y, generator=seeded())), y).mean()
        for p in ("fp32", precision)
    ]
    clean = cross_entropy(model(x), y).mean()
    assert losses[1] - clean > 0.97 * (losses[0] - clean) > 0.01


def test_delta_stays_in_float32_under_autocast():
    """bfloat16 cannot hold x + 1e-4 steps; the result must still use the whole ball."""
    x, y = batch((4, 2, 4, 4))
    model = model_for(x.shape)
    with autocast(torch.bfloat16):
        adv = PGD(Linf(1e-3), steps=20)(model, x, y, generator=seeded())
    assert adv.dtype == torch.float32
    inner = (x > 0.01) & (x < 0.99)
    assert ((adv - x).abs()[inner] > 0.9e-3).float().mean() > 0.9


# Autocast keeps the casts of weights until its outermost block ends. What the attack leaves there
# must be what the training step would have put there: of its dtype, and with a gradient.
AGREE = [(None, torch.bfloat16), ("bf16", torch.bfloat16), ("fp32", torch.bfloat16)]
DIFFER = [("fp16", torch.bfloat16), ("bf16", torch.float16)]


@pytest.mark.parametrize(
    "settings",
    [{}, {"loss": "kl"}, {"stop_when_fooled": True}, {"iterate": "best", "restarts": 2}],
    ids=str,
)
@pytest.mark.parametrize(
    ("precision", "outer"),
    [*AGREE, *DIFFER],
    ids=str,
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_the_training_step_around_the_attack_gets_the_same_gradients(
    settings, precision, outer, when
):
    x, y = batch((6, 2, 4, 4))
    model = model_for(x.shape)
    attack = PGD(Linf(0.1), precision=precision, steps=2, **settings)

    def gradients(attacks):
        model.zero_grad()
        with autocast(outer):
            early = F.cross_entropy(model(x), y) if when == "after" else 0.0
            if attacks:
                attack(model, x, y, generator=seeded())
            loss = early + F.cross_entropy(model(x), y)
        loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    expected, after = gradients(False), gradients(True)
    for e, a in zip(expected, after, strict=True):
        assert torch.equal(e, a)
        assert e.abs().max() > 0


class Planted(nn.Module):
    """Records tell by their first value which gradient they want: none, NaN or a good one."""

    def forward(self, x):
        first, total = x[:, :1], x.sum(1, keepdim=True)
        broken = (first > 0.25) & (first < 0.5)
        root = torch.where(broken, 0 * total, 1.0).sqrt()  # its slope at 0: inf · 0
        good = torch.cat([total + root, -total], 1)
        return torch.where(first < 0.25, F.relu(good - 100), good)


def planted(zeros, nans, good):
    x = torch.full((zeros + nans + good, 3), 0.5)
    x[:, 0] = torch.tensor([0.1] * zeros + [0.4] * nans + [0.6] * good)
    return x, torch.zeros(len(x)).long()


@pytest.mark.parametrize("ball", BALLS, ids=lambda b: b.name)
@pytest.mark.parametrize("restarts", [1, 3])
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_useless_gradients_are_counted_exactly(ball, restarts, chunk_size):
    x, y = planted(3, 2, 4)
    attack = PGD(ball.with_eps(0.01), steps=5, restarts=restarts)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # `run` counts and leaves the warning to its caller
        run = attack.perturb(Planted(), x, y, generator=seeded(), chunk_size=chunk_size)
    counts = (run.gradients, run.zero_gradients, run.nonfinite_gradients)
    assert counts == (9 * 5 * restarts, 3 * 5 * restarts, 2 * 5 * restarts)
    assert run.zero_gradients.shape == run.nonfinite_gradients.shape == ()
    assert run.x_adv.isfinite().all()
    assert (ball.norm(run.x_adv - x)[5:] > 0.009).all()  # the good ones moved all the same


@pytest.mark.parametrize("ball", BALLS, ids=lambda b: b.name)
def test_a_tiny_gradient_is_a_good_one(ball):
    x, y = batch((6, 2, 4, 4))
    model = model_for(x.shape)
    with torch.no_grad():
        model[1].weight.mul_(1e-25)
    run = PGD(ball).perturb(model, x, y, generator=seeded())
    assert (int(run.zero_gradients), int(run.nonfinite_gradients)) == (0, 0)
    assert (ball.norm(run.x_adv - x)[1:] > 0.8 * ball.eps).all()


@pytest.mark.parametrize("ball", BALLS, ids=lambda b: b.name)
def test_a_useless_gradient_moves_nothing(ball):
    x, y = planted(2, 0, 1)
    adv = PGD(ball.with_eps(0.01), random_start=False)(Planted(), x, y)
    assert torch.equal(adv[:2], x[:2])
    assert not torch.equal(adv[2], x[2])


def test_a_call_warns_of_gradients_that_were_not_finite():
    x, y = planted(1, 2, 1)
    attack = PGD(L2(0.01), steps=5)
    with pytest.warns(UserWarning, match="10 of 20 input gradients were not finite"):
        attack(Planted(), x, y, generator=seeded())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attack(Planted(), *planted(2, 0, 2), generator=seeded())


def test_gradients_are_counted_for_those_who_still_stand():
    x, y = planted(3, 0, 0)
    run = PGD(Linf(0.01), steps=5, stop_when_fooled=True).perturb(Planted(), x, y)
    assert (run.gradients, int(run.zero_gradients)) == (15, 15)  # logits tie: class 0 is right
    run = PGD(Linf(0.01), steps=5, stop_when_fooled=True).perturb(Planted(), x, 1 - y)
    assert (run.gradients, int(run.zero_gradients)) == (0, 0)


def waits_of(attack, model, monkeypatch, **settings):
    """What the host waits for after the inputs have been checked."""
    x, y = batch((6, 2, 4, 4))
    waits = Waits()
    problem = PGD._problem

    def checked(self, *args):
        waits.allowed = True
        try:
            return problem(self, *args)
        finally:
            waits.allowed = False

    with monkeypatch.context() as patch, waits:
        patch.setattr(PGD, "_problem", checked)
        for name in ("tolist", "numpy", "cpu"):
            method = getattr(torch.Tensor, name)
            patch.setattr(
                torch.Tensor,
                name,
                lambda t, *a, name=name, method=method: waits.found.append(name) or method(t, *a),
            )
        waits.found.clear()
        attack.perturb(model, x, y, generator=seeded(), **settings)
    return [w for w in waits.found if w != "tolist"] + [
        w for w in waits.found[1:] if w == "tolist"
    ]  # one, of the check


@pytest.mark.parametrize("ball", BALLS, ids=lambda b: b.name)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"restarts": 3},
        {"iterate": "best", "loss": "margin"},
        {"loss": "kl", "precision": "bf16"},
        {"targeted": True},
        {"restarts": 2, "iterate": "best"},
    ],
    ids=str,
)
def test_the_host_waits_for_nothing(ball, settings, monkeypatch):
    model = model_for((1, 2, 4, 4))
    asked = {"eps": torch.full((6,), 0.2), "mask": torch.rand(2, 4, 4) > 0.3, "chunk_size": 4}
    attack = PGD(ball, **settings)
    assert waits_of(attack, model, monkeypatch) == []
    assert waits_of(attack, model, monkeypatch, **asked) == []


def test_a_wait_is_noticed(monkeypatch):
    """The planted wrong answers: models and losses that look at values."""
    inner = model_for((1, 2, 4, 4))
    attack = PGD(Linf(0.1), steps=2)
    for look in (
        lambda z: z.sum().item(),
        lambda z: bool(z.sum() > 0),
        lambda z: z[z > 0],
        lambda z: (z > 0).nonzero(),
        lambda z: z.detach().sum().cpu(),
    ):
        found = waits_of(attack, lambda v, look=look: (inner(v), look(inner(v)))[0], monkeypatch)
        assert len(found) >= 2
    stopping = waits_of(PGD(Linf(0.1), steps=5, stop_when_fooled=True), inner, monkeypatch)
    assert 1 <= len(stopping) <= 5  # once a step
