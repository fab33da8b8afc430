"""Which δ a run returns: the last, the best, the first that fools; over restarts and chunks."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from defend import PGD, Linf
from defend.objectives.losses import cross_entropy, kl, margin
from tests.attacks.cases import BALLS, Watched, batch, model_for, seeded
from tests.reference.pgd import fools, reference_best, reference_iterates, reference_stopped

SHAPE = (12, 1, 3, 3)


def right(model, x, y):
    return model(x).argmax(1) == y


def some_fooled(ball, classes=3):
    """float64 inputs of which an attack fools some at once, some later and some never."""
    eps = {"linf": 0.15, "l2": 0.35, "l1": 0.7}[ball.name]
    x, _ = batch(SHAPE, dtype=torch.float64)
    model = model_for(SHAPE, torch.float64, classes)
    y = model(x).argmax(1)
    y[:3] = (y[:3] + 1) % classes
    return x, y, model, PGD(ball.with_eps(eps), steps=5)


def path(attack, model, x, y, **settings):
    """All iterates of the slow reference, from the start that the attack draws."""
    ball = attack.ball
    start = ball.random_start(x, seeded(), eps=ball.eps * ball.start_share)
    return reference_iterates(
        model, x, y, norm=attack.ball.name, eps=attack.ball.eps, steps=attack.steps,
        step_size=attack.effective_step_size, density=getattr(attack.ball, "density", None),
        start=torch.minimum(torch.maximum(start, -x), 1 - x), **settings,
    )  # fmt: skip


@pytest.mark.parametrize("ball", BALLS, ids=lambda b: b.name)
def test_best_last_and_first_equal_the_slow_reference(ball):
    x, y, model, attack = some_fooled(ball)
    iterates = path(attack, model, x, y)
    expected = {
        "last": iterates[-1],
        "best": reference_best(model, iterates, y, loss=F.cross_entropy),
        "first": reference_stopped(model, iterates, y),
    }
    for name, settings in (
        ("last", {}),
        ("last", {"iterate": "last"}),
        ("best", {"iterate": "best"}),
        ("first", {"stop_when_fooled": True}),
        ("first", {"stop_when_fooled": True, "iterate": "last"}),
    ):
        adv = dataclasses.replace(attack, **settings)(model, x, y, generator=seeded())
        torch.testing.assert_close(adv, expected[name], rtol=0, atol=1e-9, msg=str(settings))
    # The three are not the same thing here.
    assert not torch.allclose(expected["first"], expected["last"])
    assert not torch.allclose(expected["first"], expected["best"])


@pytest.mark.parametrize("ball", BALLS, ids=lambda b: b.name)
def test_the_best_of_those_who_stopped(ball):
    """With both, a record that never fooled the model gives its best iterate."""
    x, y, model, attack = some_fooled(ball)
    iterates = path(attack, model, x, y)
    best = reference_best(model, iterates, y, loss=F.cross_entropy)
    first = reference_stopped(model, iterates, y)
    fooled = ~right(model, best, y)
    assert 3 < fooled.sum() < len(x)  # not vacuous
    both = dataclasses.replace(attack, stop_when_fooled=True, iterate="best")
    adv = both(model, x, y, generator=seeded())
    torch.testing.assert_close(adv[fooled], first[fooled], rtol=0, atol=1e-9)
    torch.testing.assert_close(adv[~fooled], best[~fooled], rtol=0, atol=1e-9)


@pytest.mark.parametrize("loss", ["ce", "margin", "kl"])
@pytest.mark.parametrize("step", [0.02, 0.3])
def test_best_has_the_highest_loss_of_all_iterates_that_the_model_saw(loss, step):
    x, y = batch((16, 2, 4, 4), classes=5)
    net = model_for(x.shape, classes=5)
    watched = Watched(net)
    # Long steps go up and down.
    attack = PGD(Linf(0.3), steps=6, step_size=step, loss=loss, iterate="best")
    adv = attack(watched, x, y, generator=seeded())
    seen = torch.stack(watched.inputs[1:] if loss == "kl" else watched.inputs)
    assert len(seen) == 6 + 1  # one look more than there are steps
    losses = torch.stack([attack_loss(net, x, y, v, loss) for v in seen])
    fooled = torch.stack([~right(net, v, y) for v in seen])
    mine, chosen = attack_loss(net, x, y, adv, loss), ~right(net, adv, y)
    assert torch.equal(chosen, fooled.any(0))
    losses[~fooled & fooled.any(0)] = float("-inf")  # they count only where none fooled
    torch.testing.assert_close(mine, losses.amax(0), rtol=1e-4, atol=1e-6)
    # Planted wrong answer: the last iterate is not the best of all records.
    if step == 0.3 and loss != "kl":
        assert (attack_loss(net, x, y, seen[-1], loss) < losses.amax(0) - 1e-4).any()


def attack_loss(net, x, y, adv, loss):
    with torch.no_grad():
        out = net(adv)
        if loss == "kl":
            return kl(net(x), out)
        return {"ce": cross_entropy, "margin": margin}[loss](out, y)


def test_fooled_comes_before_loss():
    """A loss that is higher where the model is right."""
    x = torch.tensor([[0.9], [0.9]])

    def model(v):  # class 1 below 0.5
        return torch.cat([v - 0.5, 0.5 - v], 1)

    def upside_down(logits, y):
        return torch.where(logits.argmax(1) == y, 10.0, 0.0) + cross_entropy(logits, y)

    attack = PGD(Linf(0.6), steps=1, step_size=0.6, random_start=False, loss=upside_down)
    y = torch.zeros(2).long()
    last = attack(model, x, y)
    best = dataclasses.replace(attack, iterate="best")(model, x, y)
    assert not right(model, last, y).any()
    assert (upside_down(model(x), y) > upside_down(model(last), y)).all()
    assert torch.equal(best, last)  # by loss alone the clean input would have won


def test_of_two_that_fool_the_higher_loss_counts():
    x, y = batch((16, 2, 4, 4))
    model = model_for(x.shape)
    y = (model(x).argmax(1) + 1) % 3  # fooled from the start
    best = PGD(Linf(0.1), iterate="best")(model, x, y, generator=seeded())
    first = PGD(Linf(0.1), stop_when_fooled=True)(model, x, y, generator=seeded())
    assert (cross_entropy(model(best), y) > cross_entropy(model(first), y)).all()


def test_the_last_iterate_costs_no_forward_and_the_best_costs_one():
    x, y = batch((4, 2, 4, 4))
    counts = {}
    for iterate in ("last", "best", None):
        model = Watched(model_for(x.shape))
        PGD(Linf(0.1), steps=6, iterate=iterate)(model, x, y, generator=seeded())
        counts[iterate] = len(model.inputs)
    assert counts == {"last": 6, "best": 7, None: 6}


def test_evaluation_takes_the_best_unless_told_otherwise():
    assert PGD(Linf(0.1)).for_evaluation() == PGD(Linf(0.1), iterate="best")
    last = PGD(Linf(0.1), iterate="last")
    assert last.for_evaluation() == last


@pytest.mark.parametrize("iterate", ["last", "best"])
@pytest.mark.parametrize("targeted", [False, True])
def test_restarts_keep_the_best_run_of_each_record(iterate, targeted):
    """The runs one by one, with the starts that the attack draws one after the other."""
    x, y, model, attack = some_fooled(Linf(0.1))
    attack = dataclasses.replace(attack, iterate=iterate, targeted=targeted, step_size=0.01)
    generator = seeded()
    runs = torch.stack([attack(model, x, y, generator=generator) for _ in range(4)])
    expected = reference_best(model, runs, y, loss=F.cross_entropy, targeted=targeted)
    adv = dataclasses.replace(attack, restarts=4)(model, x, y, generator=seeded())
    torch.testing.assert_close(adv, expected, rtol=0, atol=1e-9)
    assert not torch.allclose(adv, runs[0], atol=1e-6)  # other runs than the first were chosen


@pytest.mark.parametrize("ball", BALLS, ids=lambda b: b.name)
def test_more_restarts_never_help_the_model(ball):
    x, y = batch((40, 2, 4, 4))
    model = model_for(x.shape)

    def stands(restarts):
        attack = PGD(ball, steps=2, restarts=restarts)
        return right(model, attack(model, x, y, generator=seeded()), y)

    # The same first run: whatever it fooled stays fooled.
    assert not (stands(5) & ~stands(1)).any()


@pytest.mark.parametrize(
    ("restarts", "targeted", "chunk_size"),
    [(1, False, 5), (1, True, None), (3, False, None), (3, True, 5)],
)
@pytest.mark.parametrize("ball", BALLS, ids=lambda b: b.name)
def test_stopping_fools_whom_the_best_iterate_fools(ball, chunk_size, targeted, restarts):
    """The same paths until they fool the model; who never does is left as without stopping."""
    x, y, model, attack = some_fooled(ball)
    if targeted:
        y = (y + 1) % 3
    attack = dataclasses.replace(attack, targeted=targeted, restarts=restarts, steps=3)

    def run(**settings):
        tried = dataclasses.replace(attack, **settings)
        return tried(model, x, y, generator=seeded(), chunk_size=chunk_size)

    stopped, best, last = run(stop_when_fooled=True), run(iterate="best"), run()
    fooled = [(model(v).argmax(1) == y) == targeted for v in (stopped, best, last)]
    assert torch.equal(fooled[0], fooled[1])
    assert not (fooled[2] & ~fooled[0]).any()
    assert fooled[0].sum() > 0
    standing = ~fooled[0]
    torch.testing.assert_close(stopped[standing], last[standing], rtol=0, atol=1e-9)


def test_stopping_takes_fewer_rows_through_the_model():
    x, y, net, attack = some_fooled(Linf(0.1))
    attack = dataclasses.replace(attack, ball=Linf(0.5), steps=20)
    rows, gradients = {}, {}
    for stop in (False, True):
        model = Watched(net)
        run = dataclasses.replace(attack, stop_when_fooled=stop).perturb(model, x, y)
        rows[stop], gradients[stop] = sum(model.rows), run.gradients
    assert rows[True] < 0.6 * rows[False]
    assert gradients[True] < 0.6 * gradients[False] == 0.6 * 20 * len(x)
    assert gradients[True] <= rows[True]


def test_a_few_who_still_stand_are_asked_again_without_the_others():
    """Half or less: a forward of them costs less than a backward of all. More: no second one."""
    for fooled, rows, gradients in ((5, [12, 7, 7], 12 + 7), (6, [12, 6, 6, 6], 6 + 6)):
        x, _ = batch((12, 1, 3, 3), dtype=torch.float64)
        net = model_for(x.shape, torch.float64)
        y = net(x).argmax(1)
        y[:fooled] = (y[:fooled] + 1) % 3
        model = Watched(net)
        attack = PGD(Linf(1e-4), steps=2, stop_when_fooled=True, random_start=False)
        run = attack.perturb(model, x, y)
        assert model.rows == rows
        assert run.gradients == gradients
        assert torch.equal(run.x_adv[:fooled], x[:fooled])
        assert (run.x_adv[fooled:] != x[fooled:]).flatten(1).any(1).all()


def test_nobody_left_standing_ends_the_run():
    x, _ = batch((6, 2, 4, 4))
    net = model_for(x.shape)
    wrong = (net(x).argmax(1) + 1) % 3
    model = Watched(net)
    attack = PGD(Linf(1e-3), stop_when_fooled=True, restarts=3, random_start=True)
    run = attack.perturb(model, x, wrong, generator=seeded())
    assert model.rows == [6]
    assert (run.gradients, int(run.zero_gradients)) == (0, 0)
    start = Linf(1e-3).random_start(x, seeded())
    torch.testing.assert_close(run.x_adv, (x + start).clamp(0, 1))


def test_restarts_after_stopping_run_only_who_still_stands():
    x, y, net, attack = some_fooled(Linf(0.1))
    model = Watched(net)
    attack = dataclasses.replace(attack, stop_when_fooled=True, steps=1)
    first = attack(model, x, y, generator=seeded())
    standing = int(right(net, first, y).sum())
    assert 0 < standing < len(x) - 3
    model.inputs.clear()
    dataclasses.replace(attack, restarts=2)(model, x, y, generator=seeded())
    second = model.rows[model.rows.index(standing, 1) :]
    assert max(second) <= standing


def test_who_stopped_is_what_fools():
    """The helper of the reference agrees with the obvious reading."""
    logits = torch.tensor([[0.1, 0.9]])
    assert fools(logits, torch.tensor(0), targeted=False)
    assert not fools(logits, torch.tensor(1), targeted=False)
    assert fools(logits, torch.tensor(1), targeted=True)
