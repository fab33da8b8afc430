"""The contract of an attack, over every ball, loss, preset, dtype, layout, rank and input space."""

import contextlib
import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from defend import L2, PGD, Linf
from defend.objectives.losses import cross_entropy, kl
from defend.threat import L1
from tests.attacks.cases import Watched, model_for, seeded
from tests.attacks.combinations import (
    BALLS,
    CASES,
    CLASSES,
    FACTORS,
    LOSSES,
    PRESETS,
    SPACES,
    Case,
    may_meet,
    named,
    pairs_of,
)
from tests.attacks.test_context import Moody, assert_same, snapshot


def rounding(case, adv, clean):
    """What rounding x_adv to its dtype may add to ‖δ_i‖, in raw units."""
    space = SPACES[case.space]
    unit = torch.finfo(case.dtype).eps * (adv.double().abs().max() * max(space.std or (1,)) + 1)
    moved = (adv != clean).flatten(1).sum(1)
    return unit, unit * {"linf": moved.clamp(max=1), "l2": moved.sqrt(), "l1": moved}[
        case.ball.name
    ]


@pytest.mark.parametrize("case", CASES, ids=named)
def test_contract(case):
    """In the ball, in the box, what is held bit for bit; like x in every other respect."""
    x, y = case.batch()
    before, labels = x.clone(), y.clone()
    attack, space, model = case.attack(), SPACES[case.space], case.model()
    state = torch.get_rng_state()
    adv = attack(model, x, y, generator=seeded(), **case.asked())

    assert torch.equal(x, before)
    assert torch.equal(y, labels)
    assert (adv.shape, adv.dtype, adv.device) == (x.shape, x.dtype, x.device)
    assert adv.stride() == torch.empty_like(x).stride()  # x's, but where x has gaps
    assert not adv.requires_grad
    assert adv.data_ptr() != x.data_ptr()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(adv[case.held()], x[case.held()])

    raw, clean = space.to_raw(adv.double()), space.to_raw(x.double())
    unit, slack = rounding(case, adv, x)
    norms, radii = case.ball.norm(raw - clean), case.radii().double()
    assert (norms <= radii + slack).all()
    low, high = space.bounds(clean)
    assert (raw >= low - unit).all()
    assert (raw <= high + unit).all()
    if space.std is None and case.dtype == torch.float64:
        low, high = space.bounds(x)  # without a change of units not even rounding leaves the box
        assert ((low <= adv) & (adv <= high)).all()
    if case.preset == "radii":
        assert torch.equal(adv[0], x[0])
    # Not vacuous: it goes to the edge of the ball (but for those who stop on the way).
    if "stop" not in case.preset and case.preset != "n_fgsm":
        assert ((norms / radii.clamp_min(1e-9)) > 0.6).any()
    assert (norms > 0).any()

    again = attack(model, x, y, generator=seeded(), **case.asked())
    assert torch.equal(adv, again)


def test_the_cases_hold_every_pair_of_values():
    held = set().union(*map(pairs_of, CASES))
    for (a, xs), (b, ys) in itertools.combinations(FACTORS.items(), 2):
        for x, y in itertools.product(xs, ys):
            assert (((a, x), (b, y)) in held) == may_meet(a, x, b, y)
    assert len(CASES) < 120


def in_float64(case):
    return dataclasses.replace(case, dtype=torch.float64)


BY_LOSS = list(dict.fromkeys(map(in_float64, CASES)))[::2]


@pytest.mark.parametrize("case", BY_LOSS, ids=named)
def test_neither_chunks_nor_other_records_matter(case):
    """To float precision, in eval mode."""
    case = dataclasses.replace(case, layout="contiguous")
    if case.preset == "bf16":
        pytest.skip("half precision rounds a product by the shape it is computed in")
    x, y = case.batch()
    attack, model = case.attack(), case.model()
    whole = attack(model, x, y, generator=seeded(), **case.asked())
    for chunk_size in (1, 4, 100):
        adv = attack(model, x, y, generator=seeded(), chunk_size=chunk_size, **case.asked())
        torch.testing.assert_close(adv, whole, rtol=0, atol=1e-9)
    other_x, other_y = x.clone(), y.clone()
    other_x[3], other_y[3] = x[4], (y[4] + 1) % CLASSES
    other = attack(model, other_x, other_y, generator=seeded(), **case.asked())
    keep = [0, 1, 2, 4, 5]
    torch.testing.assert_close(other[keep], whole[keep], rtol=0, atol=1e-9)
    if not case.held()[3].all() and attack.ball.eps:
        assert not torch.equal(other[3], whole[3])


@pytest.mark.parametrize("case", BY_LOSS, ids=named)
def test_the_attack_gains(case):
    """What it climbs is higher than at the clean input, or lower if it has a target."""
    x, y = case.batch()
    attack, model = case.attack(), case.model()
    adv = attack(model, x, y, generator=seeded(), **case.asked())
    gain = gains(case, model, x, adv, y)
    if "stop" in case.preset:  # who was fooled at the start stays there
        gain = gain[model(x).argmax(1) == y]
    moved = gain.abs() > 1e-12
    assert len(gain) == 0 or moved.any()
    assert (gain[moved] > 0).double().mean() >= 0.5
    # More than a random start that is as far away: by the mean of the same records.
    chance = gains(case, model, x, at_random(case, x), y)
    if "stop" not in case.preset:
        assert gain.sum() > chance.sum()


def gains(case, model, x, adv, y):
    """By how much the loss of each record has gone where the attack wants it."""
    with torch.no_grad():
        if case.loss == "kl":
            return kl(model(x), model(adv))
        gain = LOSSES[case.loss](model(adv), y) - LOSSES[case.loss](model(x), y)
    return -gain if case.attack().targeted else gain


def at_random(case, x):
    """A legal input drawn from the ball instead of climbed to."""
    space, asked = SPACES[case.space], case.asked()
    raw = space.to_raw(x)
    region = space.region(raw, asked.get("eps", case.attack().ball.eps), asked.get("mask"))
    start = case.ball.random_start(raw, seeded(9), eps=region.eps, free=region.free)
    return space.to_model(raw + case.ball.project_(start, region))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(
    ("mode", "fail_at"),
    [("grad", None), ("grad", 1), ("no_grad", 3), ("inference", None), ("inference", 3),
     ("autocast", None), ("autocast", 3)],
)  # fmt: skip
def test_no_trace(preset, fail_at, mode):
    """Modes by submodule, gradients, buffers, RNG: as before, also after an exception."""
    losses = ["ce"] if preset in ("clean start", "targeted") else ["ce", "kl"]
    for loss, ball in itertools.product(losses, BALLS[:1] if "fgsm" in preset else BALLS[:3]):
        attack = Case(ball, loss, preset, torch.float32, "contiguous", 4, "raw").attack()
        torch.manual_seed(0)
        model = Moody().train()
        model.frozen_norm.eval()
        x, y = torch.rand(8, 1, 4, 4), torch.randint(0, 3, (8,))
        cross_entropy(model(x), y).sum().backward()  # gradients to preserve
        looks = attack.steps + (loss == "kl")
        model.calls, model.fail_at = 0, fail_at if fail_at is None or fail_at <= looks else 1
        outer = {
            "grad": contextlib.nullcontext,
            "no_grad": torch.no_grad,
            "inference": torch.inference_mode,
            "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
        }[mode]
        expects = pytest.raises(RuntimeError, match="out of luck")
        if preset.startswith("stop"):  # whoever stands is still asked at the third step
            y = moody_labels(model, x) if fail_at else y
        with outer():
            if mode == "inference":
                x, y = x.clone(), y.clone()
            before = snapshot(model)
            with contextlib.nullcontext() if fail_at is None else expects:
                attack(model, x, y, generator=seeded())
            assert_same(before, snapshot(model))
            assert torch.is_autocast_enabled("cpu") == (mode == "autocast")


def moody_labels(model, x):
    """What the model says in eval mode, so that records stand at first."""
    model.fail_at, fail_at, training = None, model.fail_at, [m.training for m in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        labels = model.eval()(x).argmax(1)
    for module, was in zip(model.modules(), training, strict=True):
        module.training = was
    model.load_state_dict(state)
    model.calls, model.fail_at = 0, fail_at
    return labels


@st.composite
def situations(draw):
    """A ball of any radius, inputs at the ends of the box and between, steps of any length."""
    ball = draw(st.sampled_from([Linf(1.0), L2(1.0), L1(1.0), L1(1.0, density=1.0)]))
    eps = draw(st.lists(st.sampled_from([0.0, 1e-6, 0.03, 0.5, 4.0]), min_size=3, max_size=3))
    values = st.one_of(st.sampled_from([0.0, 1.0, 1e-30, 0.5]), st.floats(0, 1, width=32))
    x = draw(st.lists(values, min_size=12, max_size=12))
    mask = draw(st.lists(st.booleans(), min_size=12, max_size=12))
    chosen = {
        "steps": draw(st.integers(1, 4)),
        "step_size": draw(st.sampled_from([None, 1e-4, 0.3, 50.0])),
        "iterate": draw(st.sampled_from(["last", "best"])),
        "stop_when_fooled": draw(st.booleans()),
        "loss": draw(st.sampled_from(["ce", "margin", "kl"])),
        "restarts": draw(st.integers(1, 2)),
    }
    shape = (3, 2, 2)
    return (
        PGD(ball, **chosen),
        torch.tensor(x, dtype=torch.float32).view(shape),
        torch.tensor(eps),
        torch.tensor(mask).view(shape),
        draw(st.integers(0, 1000)),
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(situations())
def test_no_situation_leaves_ball_box_or_mask(situation):
    attack, x, eps, mask, seed = situation
    model = model_for(x.shape)
    y = torch.tensor([0, 1, 2])
    adv = attack(model, x, y, generator=seeded(seed), eps=eps, mask=mask)
    assert adv.isfinite().all()
    assert 0 <= adv.min() <= adv.max() <= 1
    assert torch.equal(adv[~mask], x[~mask])
    moved = (adv.double() - x.double()).flatten(1)
    assert (attack.ball.norm(moved) <= eps + 1e-6 * eps + 6e-8 * moved.shape[1]).all()


def test_the_model_is_asked_about_legal_inputs_only():
    """Not only the result: what the model sees on the way is in ball and box as well."""
    x = torch.rand(8, 2, 4, 4, generator=seeded(1))
    for ball in BALLS:
        model = Watched(model_for(x.shape))
        PGD(ball, restarts=2, iterate="best")(model, x, torch.zeros(8).long(), generator=seeded())
        seen = torch.cat(model.inputs)
        assert -1e-6 <= seen.min() <= seen.max() <= 1 + 1e-6
        norms = ball.norm(seen - x.repeat(len(model.inputs), 1, 1, 1))
        assert norms.max() <= ball.eps + 1e-5
