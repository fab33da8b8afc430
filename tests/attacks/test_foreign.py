"""Attacks from elsewhere leave no trace, whatever they do to the module."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from defend import Linf, evaluate
from defend.attacks.attack import Attack, as_attack
from defend.attacks.result import AttackResult
from defend.objectives import TRADES
from tests.training.adversarial_cases import batches, loop_of, net, state_of


def careful(model, x, y, *, generator=None, chunk_size=None):
    adv = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(F.cross_entropy(model(adv), y), adv)
    return (x + 0.1 * grad.sign()).clamp(0, 1)


def in_eval_mode(model, x, y, **_):
    model.eval()
    adv = x.clone().requires_grad_()
    F.cross_entropy(model(adv), y).backward()
    return (x + 0.1 * adv.grad.sign()).clamp(0, 1).detach()


def with_zero_grad(model, x, y, **_):
    model.zero_grad(set_to_none=False)
    adv = in_eval_mode(model, x, y)
    model.zero_grad()
    return adv


def with_gradients_of_weights(model, x, y, **_):
    model.requires_grad_(True)
    return in_eval_mode(model, x, y)


def that_writes_to_x(model, x, y, **_):
    return x.copy_(careful(model, x.clone(), y))


def that_ends_in_train_mode(model, x, y, **_):
    adv = careful(model, x, y)
    model.train()
    model(x)  # moves BatchNorm's statistics, draws dropout masks
    torch.rand(3)
    return adv


CARELESS = [in_eval_mode, with_zero_grad, with_gradients_of_weights]
CARELESS += [that_writes_to_x, that_ends_in_train_mode]


def train(attack, objective):
    """Two accumulated batches to a step; one layer stays in eval mode, another is frozen."""
    model = net()
    model[1].eval()
    model[0].bias.requires_grad_(False)
    loop = loop_of(model, attack, **({"objective": objective} if objective else {}))
    torch.manual_seed(1)
    for i, batch in enumerate(batches(4)):
        loop.backward(batch, 0.5)
        if i % 2:
            loop._optimizer.step()
            loop._optimizer.zero_grad()
    modes = [m.training for m in model.modules()]
    return state_of(model), modes, [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize("objective", [None, TRADES()], ids=["madry", "trades"])
@pytest.mark.parametrize("attack", CARELESS)
def test_training_goes_as_with_a_careful_attack(attack, objective):
    weights, modes, trained = train(attack, objective)
    expected, expected_modes, expected_trained = train(careful, objective)
    assert torch.equal(weights, expected)
    assert (modes, trained) == (expected_modes, expected_trained)


class StopError(Exception):
    pass


def test_an_attack_that_fails_leaves_all_as_it_was_too():
    def failing(model, x, y, **_):
        model.zero_grad(set_to_none=False)
        model.eval()
        model[1].running_mean.fill_(7)
        raise StopError

    model, (x, y) = net(), batches(1)[0]
    F.cross_entropy(model(x), y).backward()
    gradients = [(p, p.grad, p.grad.clone()) for p in model.parameters()]
    before = state_of(model)
    with pytest.raises(StopError):
        as_attack(failing).perturb(model, x, y, generator=torch.Generator(), chunk_size=None)
    assert torch.equal(state_of(model), before)
    assert all(p.grad is g and torch.equal(g, kept) for p, g, kept in gradients)
    assert all(m.training for m in model.modules())


def test_it_is_given_what_an_attack_is_given():
    generator, given = torch.Generator(), {}

    def noting(model, x, y, **settings):
        given.update(settings, x=x, y=y, modes=[m.training for m in model.modules()])
        return x

    x, y = torch.rand(4, 3, 2, 2).to(memory_format=torch.channels_last), torch.arange(4)
    model = nn.Sequential(nn.Flatten(), nn.Dropout())
    x_adv = as_attack(noting)(model, x, y, generator=generator, chunk_size=2)
    assert (given["generator"], given["chunk_size"]) == (generator, 2)
    assert torch.equal(given["x"], x)
    assert given["x"].data_ptr() != x.data_ptr()
    assert x_adv.is_contiguous(memory_format=torch.channels_last)
    assert not any(given["modes"])


class Careless(Attack):
    """An attack of somebody's own in the form of ours."""

    ball, steps = Linf(0.1), 1

    def __init__(self, function):
        self.function = function

    def _perturb(self, model, x, y, *, generator, chunk_size, eps):
        return AttackResult(self.function(model, x, y))


@pytest.mark.parametrize("function", CARELESS, ids=lambda f: f.__name__)
def test_a_subclass_leaves_no_trace_either(function):
    model = net()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    x, y = batches(1)[0]
    kept, state, rng = x.clone(), state_of(model), torch.get_rng_state()
    report = evaluate(model, [(x, y)], {"own": Careless(function)}, progress=False)
    assert report.records == len(x)
    assert model.training
    assert torch.equal(state_of(model), state)
    assert torch.equal(x, kept)
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())


def test_a_radius_that_cannot_be_changed_is_none():
    assert Careless(careful).radius is None
    assert as_attack(careful).radius is None
