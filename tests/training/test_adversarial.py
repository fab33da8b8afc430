"""The core of adversarial training: what is attacked, which forwards run, what is counted."""

import copy
import dataclasses
import pickle
from collections import namedtuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from defend import PGD, InputError, Linf
from defend.attacks.free import Free
from defend.attacks.result import GradientCounts, rates
from defend.batching.fields import get_field
from defend.objectives import AWP, MART, TRADES, Madry
from defend.training.adversarial import AdversarialSteps
from defend.training.config import Adversarial
from tests.helpers import flat
from tests.reference import objectives as reference
from tests.training.adversarial_cases import ATTACK, EPS, batches, loop_of, mean_loss, net, sgd

EXACT = PGD(Linf(EPS), steps=2, random_start=False, loss="margin")


def steps_with(attack=ATTACK, **settings):
    return AdversarialSteps(Adversarial(attack, **settings))


def attacked(steps, module, batch, *, seed=0, epochs=1.0, **settings):
    generator = torch.Generator().manual_seed(seed)
    return steps.attacked(module, batch, generator=generator, epochs=epochs, **settings)


# --- which forwards run ---------------------------------------------------------------------------


def seen_twice(model, batch):
    """The batch's own logits come second, after a look at something else and without a graph."""
    with torch.no_grad():
        model(batch[0])
    model(batch[0] * 0.5)
    loss = mean_loss(model, batch)
    model(batch[0])  # and another time, which does not count either
    return loss


def transformed(model, batch):
    return F.cross_entropy(model(batch[0] * 0.5), batch[1])


def by_another_way(model, batch):
    return F.cross_entropy(model[4](model[:4](batch[0])), batch[1])


def by_keyword(model, batch):
    return F.cross_entropy(model(input=batch[0]), batch[1])


def written_to(model, batch):
    """The logits that the hook saw are not what they were."""
    logits = model(batch[0])
    logits.mul_(0.5)
    return F.cross_entropy(logits, batch[1])


@pytest.mark.parametrize(
    ("objective", "loss", "own"),
    [
        (Madry(), mean_loss, 1),
        (TRADES(), mean_loss, 1),
        (MART(), mean_loss, 1),
        (MART(), seen_twice, 4),
        (TRADES(), seen_twice, 4),
        (Madry(), transformed, 1),
        (TRADES(), transformed, 1),
        (MART(), transformed, 1),
        (TRADES(), by_another_way, 0),
        (TRADES(), by_keyword, 1),
        (MART(), written_to, 1),
    ],
)
def test_one_more_forward_or_two(objective, loss, own):
    """In train mode; the attack's are in eval mode. `own` are those of the user's loss."""
    model, calls = net(), []
    model.register_forward_hook(lambda module, args, out: calls.append(module.training))
    loop_of(model, objective=objective, loss=loss).step(batches(1)[0])
    understood = loss in (mean_loss, seen_twice, by_keyword)
    more = 0 if objective == Madry() else 1 if understood else 2
    assert sum(calls) == own + more
    assert calls.count(False) == 3 + (
        objective == TRADES()
    )  # the divergence starts from clean logits


@pytest.mark.parametrize("loss", [transformed, seen_twice, by_another_way, by_keyword, written_to])
@pytest.mark.parametrize("objective", [TRADES(4.0), MART(3.0)], ids=["trades", "mart"])
def test_the_penalty_is_right_whatever_the_loss_does(objective, loss):
    torch.manual_seed(0)  # no dropout, no batch normalization: the order does not matter
    model = nn.Sequential(*(nn.Linear(8, 8), nn.Tanh(), nn.Identity(), nn.Tanh(), nn.Linear(8, 3)))
    model = model.double()
    x, y = batches(1)[0]
    x_adv = EXACT(model, x, y)
    slow = reference.trades if objective.name == "trades" else reference.mart
    seen = x if objective.name == "trades" else x_adv
    whole = reference.batch(slow, model(x), model(x_adv), y, beta=objective.beta).mean()
    expected = whole - F.cross_entropy(model(seen), y) + loss(model, (seen, y))
    gradient = torch.autograd.grad(expected, list(model.parameters()))
    found = loop_of(model, EXACT, objective=objective, loss=loss).backward((x, y))
    torch.testing.assert_close(found, expected.detach(), rtol=0, atol=1e-9)
    for p, g in zip(model.parameters(), gradient, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=0, atol=1e-9)


@pytest.mark.parametrize("compiled", ["in place", "wrapped"])
def test_a_compiled_module_does_not_mix_up_its_steps(compiled):
    """It may go on calling the hook of its first step, or never call one."""
    losses = []
    for compile_it in (False, True):
        model = net()[:3].append(nn.Linear(12, 3, dtype=torch.float64))
        run = model
        if compile_it and compiled == "in place":
            model.compile(backend="eager")
        elif compile_it:
            run = torch.compile(model, backend="eager")
        loop = loop_of(run, optimizer=sgd(model), objective=TRADES())
        losses.append(torch.stack([loop.step(batch) for batch in batches(4)]))
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=1e-12)


# --- batches --------------------------------------------------------------------------------------

Pair = namedtuple("Pair", ["x", "y"])


@dataclasses.dataclass
class Fields:
    x: torch.Tensor
    y: torch.Tensor
    name: str = "kept"


@pytest.mark.parametrize("make", [Pair, Fields, lambda x, y: {"x": x, "y": y, "name": "kept"}])
@pytest.mark.parametrize("objective", [Madry(), TRADES(), AWP()])
def test_any_kind_of_batch_stays_as_it_is(make, objective):
    def loss(model, batch):
        seen.append(batch)
        x, y = (batch["x"], batch["y"]) if isinstance(batch, dict) else (batch.x, batch.y)
        return F.cross_entropy(model(x), y)

    x, y = batches(1)[0]
    kept, seen, model = x.clone(), [], net()
    batch = make(x, y)
    loop_of(model, loss=loss, objective=objective, input_key="x", target_key="y").step(batch)
    expected = net()
    loop_of(expected, objective=objective).step((x, y))
    assert torch.equal(flat(model), flat(expected))
    assert torch.equal(x, kept)
    assert type(seen[0]) is type(batch)
    same = torch.equal(get_field(seen[0], "x"), x)
    assert same == (objective == TRADES())


def test_fields_that_are_not_there_or_hold_no_tensors():
    x, y = batches(1)[0]
    with pytest.raises(InputError, match=r"Expected the batch to have a field 'image', got a dict"):
        attacked(steps_with(input_key="image"), net(), {"x": x, "y": y})
    with pytest.raises(InputError, match=r"got list and Tensor. Name the fields that hold inputs"):
        attacked(steps_with(), net(), (x.tolist(), y))


def test_layout_and_dtype_stay_where_some_records_are_clean():
    images = torch.rand(8, 3, 4, 4, dtype=torch.float16).to(memory_format=torch.channels_last)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 3)).half()
    made = attacked(steps_with(clean_fraction=0.5), model, (images, torch.zeros(8).long()))
    assert made.x_adv.dtype == torch.float16
    assert made.x_adv.is_contiguous(memory_format=torch.channels_last)
    assert (made.x_adv != images).flatten(1).any(1).sum() == 4


# --- clean records, warm-up -----------------------------------------------------------------------


def clean_rows(private, tosses=2000, rows=6):
    """`[tosses, rows]`: 1 where a record stayed clean."""
    steps = steps_with(lambda model, x, y, **_: x + 1.0, clean_fraction=0.3)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.zeros(rows, 2), torch.zeros(rows)
    found = [
        steps.attacked(nn.Identity(), (x, y), generator=generator, epochs=1, private=private).x_adv
        for _ in range(tosses)
    ]
    return (torch.stack(found) == 0).all(2).double()


def test_beside_dp_each_record_tosses_a_coin_of_its_own():
    coins, exact = clean_rows(private=True), clean_rows(private=False)
    error = (0.3 * 0.7 / len(coins)) ** 0.5
    assert ((coins.mean(0) - 0.3).abs() < 4 * error).all()
    assert exact.sum(1).eq(2).all()  # round(0.3 · 6) of 6

    def largest_correlation(rows):
        found = torch.corrcoef(rows.T)
        return (found - torch.eye(len(found))).abs().max()

    assert largest_correlation(coins) < 4 / len(coins) ** 0.5
    # The same test rejects a fixed number: who stays clean then depends on the others.
    assert largest_correlation(exact) > 4 / len(coins) ** 0.5


def test_a_coin_does_not_depend_on_how_many_records_there_are():
    steps = steps_with(clean_fraction=0.5)
    x, y = batches(1)[0]
    few, many = (
        attacked(steps, net(), (x[:n], y[:n]), private=True, seed=3).x_adv for n in (15, 16)
    )
    assert torch.equal((few == x[:15]).all(1), (many == x).all(1)[:15])


def test_all_records_may_stay_clean():
    x, y = batches(1)[0]
    made = attacked(steps_with(clean_fraction=0.9), net(), (x[:1], y[:1]))
    assert torch.equal(made.x_adv, x[:1])
    assert made.x_adv.data_ptr() != x.data_ptr()


@dataclasses.dataclass(frozen=True)
class Shift:
    """An attack from elsewhere."""

    eps: float = 0.2

    def with_eps(self, eps):
        return dataclasses.replace(self, eps=eps)

    def __call__(self, model, x, y, *, generator=None, chunk_size=None):
        assert chunk_size is None
        return (x + self.eps).requires_grad_()


@pytest.mark.parametrize("attack", [Shift(), PGD(Linf(0.2), steps=1, random_start=False)])
def test_a_warmup_is_linear_and_ends(attack):
    steps = steps_with(attack, warmup_epochs=4)
    x, y = torch.full((4, 8), 0.5, dtype=torch.float64), torch.zeros(4).long()
    model = net().eval()
    sizes = [
        float((attacked(steps, model, (x, y), epochs=t).x_adv - x).abs().max())
        for t in (0, 0.5, 1, 3, 4, 100)
    ]
    assert sizes == pytest.approx([0, 0.025, 0.05, 0.15, 0.2, 0.2], abs=1e-12)
    assert [steps.eps_share(t) for t in (0, 1, 4, 9)] == [0, 0.25, 1, 1]
    assert steps_with(attack).eps_share(0) == 1


def test_what_an_attack_from_elsewhere_returns_is_checked():
    x, y = batches(1)[0]
    assert not attacked(steps_with(Shift()), net(), (x, y)).x_adv.requires_grad
    with pytest.raises(InputError, match=r"of shape \(16, 8\) and torch.float64, got \(15, 8\)"):
        attacked(steps_with(lambda model, x, y, **_: x[1:]), net(), (x, y))
    with pytest.raises(InputError, match=r"got \(16, 8\) and torch.float32. Return x_adv in"):
        attacked(steps_with(lambda model, x, y, **_: x.float()), net(), (x, y))


@pytest.mark.parametrize("taken", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
                         ids=["copy", "pickle"])  # fmt: skip
def test_a_copy_made_in_the_step_holds_no_batch(taken):
    steps, module = steps_with(objective=TRADES()), net()
    made = attacked(steps, module, batches(1)[0])
    with steps.around_forward(module, made):
        module(made.x)
        (own,) = module._forward_hooks.values()
        assert len(own.logits) == 1
        (hook,) = taken(module)._forward_hooks.values()
    assert hook.inputs is None
    assert not hook.logits
    assert own.inputs is None  # afterwards
    assert not module._forward_hooks


# --- counts, switching ----------------------------------------------------------------------------


def test_rates_of_useless_gradients():
    x, y = batches(1)[0]
    steps = steps_with(PGD(Linf(EPS), steps=3))
    dead = nn.Linear(8, 3, dtype=torch.float64)
    nn.init.zeros_(dead.weight)
    attacked(steps, dead, (x, y))
    attacked(steps, net(), (x, y))
    assert steps.counts.gradients == 2 * 3 * 16
    assert rates(GradientCounts(8, 2, 0))["attack/zero_grad_rate"] == 0.25  # of all processes
    assert rates(steps.take_counts()) == {
        "attack/zero_grad_rate": 0.5,
        "attack/nonfinite_grad_rate": 0.0,
    }
    assert rates(steps.take_counts()) == {}
    nn.init.constant_(dead.weight, float("nan"))
    attacked(steps, dead, (x[:4], y[:4]))
    with pytest.warns(UserWarning, match=r"12 of 12 input gradients were not finite"):
        assert rates(steps.take_counts())["attack/nonfinite_grad_rate"] == 1.0


def test_another_attack_takes_over():
    x, y = batches(1)[0]
    steps = steps_with(Free(Linf(EPS)))
    assert attacked(steps, net(), (x, y)).x_adv.requires_grad
    steps.switch(ATTACK)
    assert not attacked(steps, net(), (x, y)).x_adv.requires_grad
    steps.after_backward()  # nothing waits for a gradient any more
    assert steps.attack == ATTACK
    assert steps.state_dict() == {}


def test_a_step_that_starts_over_begins_from_the_weights_themselves():
    """After a backward that the loop gave up, without a word."""
    model, steps = net(), steps_with(objective=AWP(gamma=0.1))
    before = flat(model)
    for _ in range(2):
        with steps.around_forward(model, attacked(steps, model, batches(1)[0])):
            moved = flat(model)
    assert not torch.equal(moved, before)
    steps.restore_weights()
    assert torch.equal(flat(model), before)
