"""Each objective against its paper, value and gradient; and what an objective promises."""

import dataclasses
import pickle

import pytest
import torch
import torch.nn.functional as F

from defend.errors import InputError
from defend.objectives import AWP, MART, TRADES, Madry, Objective
from defend.objectives.losses import kl
from defend.objectives.mart import boost
from tests.reference import objectives as reference

OBJECTIVES = [
    (Madry(), reference.madry, {}),
    (TRADES(), reference.trades, {}),
    (TRADES(beta=1.5), reference.trades, {"beta": 1.5}),
    (TRADES(beta=0.0), reference.trades, {"beta": 0.0}),
    (MART(), reference.mart, {}),
    (MART(beta=0.7), reference.mart, {"beta": 0.7}),
    (AWP(TRADES(2.0)), reference.trades, {"beta": 2.0}),
]
NAMES = [f"{o.name}-{getattr(o, 'beta', '')}" for o, _, _ in OBJECTIVES]


def pair(records=9, classes=4, dtype=torch.float64, scale=2.0):
    """Clean logits, adversarial logits, and class indices; some records right, some wrong."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, records, classes)
    clean, adv = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
    return clean.to(dtype), adv.to(dtype), torch.arange(records) % classes


def agrees(losses, paper, settings):
    """Whether values and gradients are the paper's, for each record on its own."""
    clean, adv, y = pair()
    clean, adv = clean.requires_grad_(), adv.requires_grad_()
    weights = torch.linspace(0.5, 2.0, len(y), dtype=torch.float64)  # no two records alike
    ours, theirs = losses(clean, adv, y), reference.batch(paper, clean, adv, y, **settings)
    same = [torch.allclose(ours, theirs, rtol=1e-9, atol=1e-12)] if ours.shape == y.shape else [0]
    for logits in (clean, adv):
        gradients = [
            torch.autograd.grad(loss @ weights, logits, retain_graph=True, materialize_grads=True)[
                0
            ]
            for loss in (ours, theirs)
        ]
        same.append(torch.allclose(*gradients, rtol=1e-8, atol=1e-10))
    return all(same)


@pytest.mark.parametrize(("objective", "paper", "settings"), OBJECTIVES, ids=NAMES)
def test_value_and_gradient_are_the_paper_s(objective, paper, settings):
    assert agrees(objective.losses, paper, settings)


@pytest.mark.parametrize(("objective", "paper", "settings"), OBJECTIVES, ids=NAMES)
def test_the_penalty_is_what_the_users_own_loss_leaves_out(objective, paper, settings):
    def by_a_training_step(clean, adv, y):
        own = clean if objective.trains_on == "clean" else adv
        return F.cross_entropy(own, y, reduction="none") + objective.penalty(clean, adv, y)

    assert agrees(by_a_training_step, paper, settings)


def cross_entropy(logits, y):
    return F.cross_entropy(logits, y, reduction="none")


def mart_with(weight, divergence, boosted=boost):
    """MART put together from other parts."""

    def losses(clean, adv, y):
        p = weight(clean, adv).softmax(1).gather(1, y.unsqueeze(1)).squeeze(1)
        return cross_entropy(adv, y) + boosted(adv, y) + 5 * (1 - p) * divergence(clean, adv)

    return losses


WRONG = {
    "madry on the clean batch": (reference.madry, lambda c, a, y: cross_entropy(c, y)),
    "trades, divergence swapped": (
        reference.trades,
        lambda c, a, y: cross_entropy(c, y) + 6 * kl(a, c),
    ),
    "trades, mean over the classes": (
        reference.trades,
        lambda c, a, y: (
            cross_entropy(c, y)
            + 6 * F.kl_div(a.log_softmax(1), c.softmax(1), reduction="none").mean(1)
        ),
    ),
    "trades, clean side detached": (
        reference.trades,
        lambda c, a, y: cross_entropy(c, y) + 6 * kl(c.detach(), a),
    ),
    "trades on the adversarial batch": (
        reference.trades,
        lambda c, a, y: cross_entropy(a, y) + 6 * kl(c, a),
    ),
    "mart, divergence swapped": (
        reference.mart,
        mart_with(lambda c, a: c, lambda c, a: kl(a, c)),
    ),
    "mart, weighted by the adversarial batch": (
        reference.mart,
        mart_with(lambda c, a: a, kl),
    ),
    "mart, weight detached": (reference.mart, mart_with(lambda c, a: c.detach(), kl)),
    "mart, without the boost": (
        reference.mart,
        mart_with(lambda c, a: c, kl, lambda a, y: 0.0),
    ),
    "mart, the own class boosted too": (
        reference.mart,
        mart_with(lambda c, a: c, kl, lambda a, y: -(1.0001 - a.softmax(1).amax(1)).log()),
    ),
    "mart, without the guard": (
        reference.mart,
        mart_with(lambda c, a: c, kl, lambda a, y: boost(a, y) + 1e-4),
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_planted_wrong_objective_is_told_apart(name):
    paper, losses = WRONG[name]
    assert not agrees(losses, paper, {})


def test_the_parts_that_wrong_ones_are_made_of_make_the_right_one():
    assert agrees(mart_with(lambda c, a: c, kl), reference.mart, {})


@pytest.mark.parametrize(("objective", "paper", "settings"), OBJECTIVES, ids=NAMES)
def test_gradients_by_finite_differences(objective, paper, settings):
    clean, adv, y = pair(records=3)
    inputs = (clean.requires_grad_(), adv.requires_grad_())
    assert torch.autograd.gradcheck(lambda c, a: objective.losses(c, a, y), inputs)


@pytest.mark.parametrize("objective", [Madry(), TRADES(), MART(), AWP(MART())])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_give_finite_float32_losses(objective, dtype):
    for scale in (1.0, 1e4):  # the larger one overflows an exponential in float16
        clean, adv, y = pair(dtype=dtype, scale=scale)
        clean, adv = clean.requires_grad_(), adv.requires_grad_()
        for result in (objective.losses(clean, adv, y), objective.penalty(clean, adv, y)):
            assert result.dtype == torch.float32
            assert result.isfinite().all()
        exact = objective.losses(clean.double(), adv.double(), y)
        # Near certainty 1 − p_y keeps float32's absolute accuracy, and a divergence of 1e4 beside.
        torch.testing.assert_close(
            objective.losses(clean, adv, y), exact.float(), rtol=1e-4, atol=1e-6 * scale
        )
        gradients = torch.autograd.grad(
            objective.losses(clean, adv, y).mean(), (clean, adv), materialize_grads=True
        )
        assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("objective", [Madry(), TRADES(), MART(), AWP(MART())])
def test_a_record_does_not_reach_another(objective):
    clean, adv, y = pair()
    whole = objective.losses(clean, adv, y)
    for i in range(len(y)):
        alone = objective.losses(clean[i : i + 1], adv[i : i + 1], y[i : i + 1])
        torch.testing.assert_close(alone[0], whole[i])


def test_equal_batches_leave_the_natural_loss():
    clean, _, y = pair()
    natural = cross_entropy(clean, y)
    torch.testing.assert_close(TRADES().losses(clean, clean, y), natural)
    torch.testing.assert_close(Madry().losses(None, clean, y), natural)
    torch.testing.assert_close(MART().losses(clean, clean, y), natural + boost(clean, y))


def test_mart_counts_a_doubtful_record_for_more():
    adv = torch.tensor([[0.0, 1.0, 2.0]] * 2)
    clean = torch.tensor([[9.0, 0.0, 0.0], [0.0, 9.0, 0.0]])
    y = torch.tensor([0, 0])
    sure, doubtful = MART().penalty(clean, adv, y) - boost(adv, y)
    assert float(doubtful) > 100 * float(sure) > 0


def test_the_boost_is_bounded():
    z = torch.tensor([[0.0, 1e4, 0.0], [1e4, 0.0, 0.0]], requires_grad=True)
    worst, best = boost(z, torch.tensor([0, 0]))
    assert float(worst.detach()) == pytest.approx(9.21, abs=0.01)
    assert float(best.detach()) == pytest.approx(-1e-4, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_class_probabilities_as_targets(dtype):
    clean, adv, y = pair()
    soft = (0.8 * F.one_hot(y, 4) + 0.05).to(dtype)
    natural = {
        name: torch.stack(
            [reference.soft_cross_entropy(z, t) for z, t in zip(own, soft, strict=True)]
        )
        for name, own in (("adversarial", adv), ("clean", clean))
    }
    for objective in (Madry(), TRADES(), MART()):
        # The penalty knows the most probable class only.
        penalty = objective.penalty(clean, adv, y)
        assert torch.equal(objective.penalty(clean, adv, soft), penalty)
        torch.testing.assert_close(
            objective.losses(clean, adv, soft),
            natural[objective.trains_on] + penalty,
            rtol=1e-3 if dtype == torch.float16 else 1e-6,
            atol=1e-6,
        )


def test_half_precision_targets_are_welcome_with_full_precision_logits():
    clean, adv, y = pair(dtype=torch.bfloat16)
    soft = F.one_hot(y, 4).bfloat16()
    for objective in (Madry(), TRADES(), MART()):
        torch.testing.assert_close(
            objective.losses(clean, adv, soft), objective.losses(clean, adv, y)
        )


def test_madry_needs_no_clean_logits():
    clean, adv, y = pair()
    penalty = Madry().penalty(None, adv, y)
    assert penalty.shape == y.shape
    assert not penalty.any()
    assert torch.equal(Madry().losses(None, adv, y), Madry().losses(clean, adv, y))


TRAITS = {
    Madry(): ("madry", "ce", None, "adversarial", False),
    TRADES(): ("trades", "kl", 0.001, "clean", True),
    MART(): ("mart", "ce", None, "adversarial", True),
    AWP(): ("awp(madry)", "ce", None, "adversarial", False),
    AWP(TRADES()): ("awp(trades)", "kl", 0.001, "clean", True),
    AWP(MART()): ("awp(mart)", "ce", None, "adversarial", True),
}


@pytest.mark.parametrize("objective", TRAITS, ids=lambda o: o.name)
def test_what_the_training_loop_asks(objective):
    assert isinstance(objective, Objective)
    assert (
        objective.name,
        objective.inner_loss,
        objective.start_radius,
        objective.trains_on,
        objective.pairs,
    ) == TRAITS[objective]
    assert pickle.loads(pickle.dumps(objective)) == objective


def test_they_are_frozen_and_hold_only_their_settings():
    with pytest.raises(dataclasses.FrozenInstanceError, match="beta"):
        TRADES().beta = 1.0
    assert dataclasses.asdict(MART(3.0)) == {"beta": 3.0}
    assert dataclasses.asdict(Madry()) == {}
    assert AWP() == AWP(Madry(), gamma=0.01)
    assert AWP() != AWP(TRADES())


@pytest.mark.parametrize("kind", [TRADES, MART])
@pytest.mark.parametrize("beta", [-0.1, float("inf"), float("nan")])
def test_a_bad_beta(kind, beta):
    with pytest.raises(InputError, match=rf"`beta` to be a finite number ≥ 0, got {beta}\. Give"):
        kind(beta=beta)


@pytest.mark.parametrize("objective", [TRADES(), MART(), AWP(TRADES())])
def test_missing_clean_logits(objective):
    _, adv, y = pair()
    for method in (objective.penalty, objective.losses):
        with pytest.raises(InputError, match=r"clean logits too.* got None\. Run the model"):
            method(None, adv, y)


class Reminder(Objective):
    """One of a user's own: trains on the clean batch, and nothing else."""

    name = "reminder"
    inner_loss = "ce"
    start_radius = None
    trains_on = "clean"
    pairs = False

    def _penalty(self, clean_logits, adv_logits, y):
        raise AssertionError("not asked for: it has no pairs")


def test_one_of_your_own():
    clean, adv, y = pair()
    assert torch.equal(Reminder().losses(clean, adv, y), cross_entropy(clean, y))
    with pytest.raises(InputError, match=r"which reminder needs, got None"):
        Reminder().losses(None, adv, y)
    with pytest.raises(TypeError, match="abstract"):
        type("Unfinished", (Objective,), {"name": "unfinished"})()


@pytest.mark.parametrize(
    ("clean", "adv", "y", "message"),
    [
        ((4, 3), (5, 3), (5,), r"same shape, got \(4, 3\) and \(5, 3\)\. Run the model on all"),
        ((5, 2), (5, 3), (5,), r"same shape, got \(5, 2\) and \(5, 3\)"),
        ((5, 3), (5, 3, 2), (5,), r"shape \[N, classes\], got \(5, 3, 2\)\. Wrap"),
        ((5, 3), (5, 3), (4,), r"shape \(5,\) or .*\(5, 3\), got targets of shape \(4,\)\. Give"),
        ((5, 3), (5, 3), (5, 1), r"got targets of shape \(5, 1\)"),
    ],
)
def test_shapes_that_do_not_match(clean, adv, y, message):
    y = torch.zeros(y, dtype=torch.long)
    with pytest.raises(InputError, match=message):
        TRADES().penalty(torch.zeros(clean), torch.zeros(adv), y)


YAML = [
    ("{class_path: defend.objectives.Madry}", Madry()),
    ("{class_path: defend.objectives.TRADES, init_args: {beta: 3.0}}", TRADES(3.0)),
    ("{class_path: defend.objectives.MART}", MART()),
    (
        "{class_path: defend.objectives.AWP, init_args: {gamma: 0.005, objective: "
        "{class_path: defend.objectives.TRADES, init_args: {beta: 2.0}}}}",
        AWP(TRADES(2.0), gamma=0.005),
    ),
    ("{class_path: defend.objectives.AWP}", AWP()),
]


@pytest.mark.parametrize(("text", "expected"), YAML, ids=[o.name for _, o in YAML])
def test_built_from_yaml(text, expected):
    jsonargparse = pytest.importorskip("jsonargparse", reason="an extra")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--objective", type=Objective, default=Madry())
    build = getattr(parser, "instantiate", None) or parser.instantiate_classes  # renamed in 4.49
    built = build(parser.parse_args([f"--objective={text}"]))
    assert built.objective == expected
    assert type(built.objective) is type(expected)
