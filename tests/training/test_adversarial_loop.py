"""`make_adversarial` in a plain PyTorch loop: each objective as its paper has it, and no traces."""

import io
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from defend import PGD, Linf
from defend.attacks.free import Free
from defend.attacks.presets import fgsm_rs
from defend.evaluation.overfitting import OverfittingAlarm
from defend.objectives import AWP, MART, TRADES, Madry
from tests.helpers import data, flat
from tests.training.adversarial_cases import (
    ATTACK,
    EPS,
    OBJECTIVES,
    batches,
    loop_of,
    mean_loss,
    net,
    sgd,
    slow_step,
    state_of,
)

NAMES = [objective.name for objective in OBJECTIVES]
FREE = Free(Linf(EPS), replays=3)

# --- the objectives -------------------------------------------------------------------------------


def train_slowly(objective, **settings):
    model = net()
    optimizer = sgd(model)
    losses = [
        slow_step(model, optimizer, batch, number, objective, **settings)
        for number, batch in enumerate(batches())
    ]
    return model, losses


@pytest.mark.parametrize("objective", OBJECTIVES, ids=NAMES)
def test_equals_a_loop_from_the_paper(objective):
    """Random starts, batch normalization and dropout included, step by step."""
    expected, losses = train_slowly(objective)
    model = net()
    loop = loop_of(model, objective=objective)
    found = [loop.step(batch) for batch in batches()]
    torch.testing.assert_close(torch.stack(found), torch.stack(losses), rtol=0, atol=1e-9)
    torch.testing.assert_close(state_of(model), state_of(expected), rtol=0, atol=1e-9)
    assert not any(loss.requires_grad for loss in found)


@pytest.mark.parametrize("objective", [TRADES(4.0), MART(3.0)], ids=["trades", "mart"])
def test_the_order_of_forwards_shows(objective):
    """A planted wrong answer, which the test above rejects."""
    expected, _ = train_slowly(objective)
    swapped, _ = train_slowly(objective, swapped=True)
    assert (state_of(swapped) - state_of(expected)).abs().max() > 1e-4


def test_free_equals_a_loop_from_its_paper():
    expected = net()
    optimizer = sgd(expected)
    delta = torch.zeros(16, 8, dtype=torch.float64)
    for x, y in batches():
        delta = (x + delta).clamp(0, 1) - x
        for _ in range(3):
            adv = (x + delta).clamp(0, 1).requires_grad_()
            loss = F.cross_entropy(expected(adv), y)
            optimizer.zero_grad()
            loss.backward()
            delta = (delta + EPS * adv.grad.sign()).clamp(-EPS, EPS)
            delta = (x + delta).clamp(0, 1) - x
            optimizer.step()
    model = net()
    loop = loop_of(model, FREE)
    found = [loop.step(batch) for batch in batches()]
    torch.testing.assert_close(state_of(model), state_of(expected), rtol=0, atol=1e-9)
    torch.testing.assert_close(found[-1], loss.detach(), rtol=0, atol=1e-9)
    assert loop.rates() == {"attack/zero_grad_rate": 0.0, "attack/nonfinite_grad_rate": 0.0}


@pytest.mark.parametrize("objective", [Madry(), TRADES(4.0), AWP(MART(3.0), 0.05)])
def test_accumulated_batches_make_one_step(objective):
    """Without batch normalization and dropout two halves are one batch."""
    x, y = (t[:32] for t in data(32).tensors)
    x, attack = x.double(), PGD(Linf(EPS), steps=2, random_start=False, loss="margin")
    grads = []
    for halves in (1, 2):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)).double()
        if isinstance(objective, AWP):  # its v depends on the batch
            objective = AWP(MART(3.0), 1e-12)
        loop = loop_of(model, attack, objective=objective)
        parts = list(zip(x.chunk(halves), y.chunk(halves), strict=True))
        before = flat(model)
        losses = [loop.backward(part, 1 / halves) for part in parts]
        assert torch.equal(flat(model), before)
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=1e-9)
    assert losses[0] > 0.5  # not multiplied


# --- warm-up, clean records, seeds ----------------------------------------------------------------


class Seen:
    """The mean loss, and the inputs that it was asked for."""

    def __init__(self):
        self.inputs = []

    def __call__(self, model, batch):
        self.inputs.append(batch[0].detach().clone())
        return mean_loss(model, batch)


@pytest.mark.parametrize("attack", [ATTACK, FREE], ids=["pgd", "free"])
def test_eps_grows_by_the_batch(attack):
    seen, (x, y) = Seen(), batches(1)[0]
    loop = loop_of(net(), attack, warmup_batches=4, loss=seen)
    for _ in range(6):
        loop.step((x, y))
    sizes = [float((adv - x).abs().max()) for adv in seen.inputs]
    bounds = [EPS * min(1.0, number / 4) for number in range(1, 7)]
    if attack is FREE:
        # Replays are one batch. A step's gradient shows in the next replay, within the eps of both.
        bounds = [b for bound in bounds for b in [bound] * 3]
        bounds = [0.0, *(min(a, b) for a, b in itertools.pairwise(bounds))]
    # Steps add up to more than eps: some record of the batch reaches the edge.
    assert sizes == pytest.approx(bounds, abs=1e-9)


def test_a_step_leaves_the_same_number_of_records_clean():
    seen, (x, y) = Seen(), batches(1)[0]
    loop = loop_of(net(), loss=seen, clean_fraction=0.25)
    for _ in range(8):
        loop.step((x, y))
    clean = torch.stack([(adv == x).all(1) for adv in seen.inputs])
    assert clean.sum(1).tolist() == [4] * 8
    assert len({tuple(row) for row in clean.tolist()}) > 4  # not always the same ones


def test_the_seed_says_all_and_the_global_rng_nothing():
    x, y = batches(1)[0]
    made = []
    for seed, state in [(1, 0), (1, 7), (2, 0)]:
        loop = loop_of(net(), seed=seed)
        torch.manual_seed(state)
        made.append([loop.attacked((x, y))[0] for _ in range(2)])
    assert torch.equal(made[0][0], made[1][0])
    assert not torch.equal(made[0][0], made[0][1])  # new at each batch
    assert not torch.equal(made[0][0], made[2][0])
    torch.manual_seed(0)
    before = torch.get_rng_state()
    unseeded = [loop_of(net(), seed=None) for _ in range(2)]
    torch.manual_seed(0)
    starts = [loop.attacked((x, y))[0] for loop in unseeded]
    assert not torch.equal(*starts)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("case", ["pgd", "trades", "free"])
def test_a_resumed_loop_goes_on_as_if_it_had_not_stopped(case):
    attack = FREE if case == "free" else ATTACK
    settings = {"objective": TRADES()} if case == "trades" else {"warmup_batches": 5}
    settings |= {"clean_fraction": 0.25} if case == "pgd" else {}
    straight, model = net(), net()
    loop = loop_of(straight, attack, seed=None, **settings)
    first = loop_of(model, attack, seed=None, state=loop.state_dict(), **settings)
    torch.manual_seed(1)
    for batch in batches(4):
        loop.step(batch)
    torch.manual_seed(1)
    optimizer = sgd(model)
    first = loop_of(model, attack, optimizer, state=first.state_dict(), **settings)
    for batch in batches(4)[:2]:
        first.step(batch)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = loop_of(model, attack, optimizer, seed=99, state=torch.load(file), **settings)
    for batch in batches(4)[2:]:
        second.step(batch)
    assert torch.equal(state_of(model), state_of(straight))


def test_the_alarm_beside_a_loop():
    """The recipe of the docstring; looking changes nothing."""
    attack, models = fgsm_rs(EPS), []
    for looks in (0, 2):
        model = net()
        watch, loop = OverfittingAlarm(every_n_steps=2).watch(attack), loop_of(model, attack)
        torch.manual_seed(1)
        readings = []
        for step, (x, y) in enumerate(batches(4)):
            if looks and watch.is_due(step):
                readings.append(watch.look(model, x, y))
                assert not readings[-1].alarm
            loop.step((x, y))
        assert len(readings) == looks
        models.append(state_of(model))
    assert torch.equal(*models)


# --- no traces ------------------------------------------------------------------------------------


class StopHereError(Exception):
    pass


def stop_in_the_loss(model, batch):
    model(batch[0])
    raise StopHereError


def stop_in_the_backward(model, batch):
    loss = mean_loss(model, batch)
    loss.register_hook(lambda grad: (_ for _ in ()).throw(StopHereError))
    return loss


class Stopping(nn.Sequential):
    """Its third training forward fails: that of the penalty, after AWP's and the user's."""

    calls = 0

    def forward(self, x):
        self.calls += self.training
        if self.calls == 4:
            raise StopHereError
        return super().forward(x)


@pytest.mark.parametrize("where", ["loss", "backward", "penalty"])
def test_after_an_exception_weights_and_hooks_are_as_before(where):
    losses = {"loss": stop_in_the_loss, "backward": stop_in_the_backward, "penalty": mean_loss}
    model = Stopping(*net()) if where == "penalty" else net()
    modes = [m.training for m in model.modules()]
    before = flat(model)
    loop = loop_of(model, objective=AWP(TRADES(), 0.1), loss=losses[where])
    with pytest.raises(StopHereError):
        loop.step(batches(1)[0])
    assert torch.equal(flat(model), before)
    assert not any(m._forward_hooks for m in model.modules())
    assert [m.training for m in model.modules()] == modes
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("objective", OBJECTIVES[3:], ids=NAMES[3:])
def test_weights_are_back_before_the_optimizers_step(objective):
    model = net()
    optimizer, seen = sgd(model, lr=0.0), []
    before = flat(model)
    optimizer.register_step_pre_hook(lambda *_: seen.append(flat(model)))
    moved = []

    def loss(module, batch):
        moved.append(flat(module))
        return mean_loss(module, batch)

    loop_of(model, ATTACK, optimizer, objective=objective, loss=loss).step(batches(1)[0])
    assert torch.equal(seen[0], before)
    assert not torch.equal(moved[0], before)


def test_the_attack_neither_fills_nor_erases_gradients():
    model = net()
    loop = loop_of(model)
    batch = batches(1)[0]
    loop.attacked(batch)
    assert all(p.grad is None for p in model.parameters())
    loop.backward(batch)
    kept = [p.grad.clone() for p in model.parameters()]
    loop.attacked(batch)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), kept, strict=True))
    assert all(m.training for m in model.modules())


def test_autocast_of_the_users_own_holds_for_attack_and_objective():
    model, seen = net(torch.float32), set()
    model.register_forward_hook(lambda m, x, out: seen.add((m.training, out.dtype)))
    loop = loop_of(model, objective=TRADES())
    with torch.autocast("cpu", torch.bfloat16):
        first = [float(loop.step(batch)) for batch in batches(3, dtype=torch.float32)]
    assert seen == {(True, torch.bfloat16), (False, torch.bfloat16)}
    # One region over all steps, or one for each: the weights of the last step are not kept.
    model = net(torch.float32)
    loop = loop_of(model, objective=TRADES())
    second = []
    for batch in batches(3, dtype=torch.float32):
        with torch.autocast("cpu", torch.bfloat16):
            second.append(float(loop.step(batch)))
    assert first == second
