"""`PerturbedWeights`: moved, and put back bit for bit."""

import copy

import pytest
import torch
import torch.nn.functional as F

from defend.errors import InputError
from defend.objectives import AWP, MART, TRADES, Madry
from defend.objectives.awp import PerturbedWeights, weight_perturbation
from tests.helpers import ConvNet, Net, flat
from tests.objectives.test_awp import GAMMA, Tied, batches, by_proxy, normalized
from tests.reference import objectives as reference


def perturbed(module, objective=None, gamma=GAMMA):
    dtype = next(module.parameters()).dtype
    step = weight_perturbation(module, objective or Madry(), *batches(dtype=dtype), gamma)
    return PerturbedWeights(module, step), step


MODULES = [normalized, Tied, lambda: Net(features=36, classes=4), lambda: ConvNet(classes=4)]


@pytest.mark.parametrize("make", MODULES, ids=["batch norm", "tied", "lightning", "convolutions"])
def test_there_and_back(make):
    module = make()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    places = {name: p.data_ptr() for name, p in module.named_parameters()}
    weights, step = perturbed(module)
    assert not weights.applied
    weights.apply()
    assert weights.applied
    for name, p in module.named_parameters():
        assert torch.equal(p, before[name] + step.get(name, torch.zeros_like(p)))
        assert (name in step) == (not torch.equal(p, before[name]))
    weights.restore()
    assert not weights.applied
    for name, p in module.named_parameters():
        assert torch.equal(p, before[name])
        assert p.data_ptr() == places[name]  # in place: optimizers and captured graphs see it
        assert p.is_leaf
        assert p.grad is None


def test_taking_the_step_off_again_would_not_be_enough():
    """The planted wrong answer: rounding keeps θ + v − v from being θ."""
    module = Tied().float()
    before = flat(module)
    weights, step = perturbed(module)
    weights.apply()
    with torch.no_grad():
        off = [(p - step.get(name, 0.0)).flatten() for name, p in module.named_parameters()]
    weights.restore()
    assert not torch.equal(torch.cat(off), before)
    assert torch.equal(flat(module), before)


def test_restoring_twice_or_without_applying_does_nothing():
    module = normalized()
    weights, _ = perturbed(module)
    weights.restore()
    weights.apply()
    weights.restore()
    with torch.no_grad():
        module[0].weight.add_(1.0)  # the optimizer's step
    stepped = flat(module)
    weights.restore()
    assert torch.equal(flat(module), stepped)


def test_applying_twice_is_refused_and_can_still_be_restored():
    module = normalized()
    before = flat(module)
    weights, _ = perturbed(module)
    weights.apply()
    moved = flat(module)
    with pytest.raises(InputError, match=r"not perturbed, got a second `apply`\. Call `restore`"):
        weights.apply()
    assert torch.equal(flat(module), moved)
    weights.restore()
    assert torch.equal(flat(module), before)
    weights.apply()  # and used again
    assert torch.equal(flat(module), moved)


def test_as_a_context_manager_it_restores_after_an_exception():
    module = normalized()
    before = flat(module)
    weights, _ = perturbed(module)

    def fails():
        with weights as same:
            assert same is weights
            assert not torch.equal(flat(module), before)
            raise ValueError("out of memory")

    with pytest.raises(ValueError, match="out of memory"):
        fails()
    assert torch.equal(flat(module), before)


def test_an_exception_halfway_through_applying_leaves_the_weights():
    module = normalized()
    before = flat(module)
    step = {name: torch.ones_like(p) for name, p in module.named_parameters() if p.ndim > 1}
    step["5.weight"] = 1j * step["5.weight"]  # fails after the first layer has moved
    weights = PerturbedWeights(module, step)
    with pytest.raises(RuntimeError, match="can't be cast"):
        weights.apply()
    assert torch.equal(flat(module), before)
    assert not weights.applied


@pytest.mark.parametrize("objective", [Madry(), TRADES(), MART()])
def test_a_whole_training_step_is_the_paper_s(objective):
    """Gradient at θ + v, step from θ, against copies: legal between backward and step."""
    paper = {"madry": reference.madry, "trades": reference.trades, "mart": reference.mart}
    paper = paper[objective.name]
    module = normalized()
    module[1].momentum = 0.0  # the running statistics are not what is compared
    x, x_adv, y = batches()

    slow = copy.deepcopy(module)
    v = by_proxy(slow, paper)
    there = copy.deepcopy(slow)
    with torch.no_grad():
        for name, step in v.items():
            there.get_parameter(name).add_(step)
    reference.batch(paper, there(x), there(x_adv), y).mean().backward()
    with torch.no_grad():
        for p, q in zip(slow.parameters(), there.parameters(), strict=True):
            p.sub_(0.1 * q.grad)

    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    awp = AWP(objective)
    weights = PerturbedWeights(module, weight_perturbation(module, awp, x, x_adv, y, awp.gamma))
    weights.apply()
    awp.losses(module(x), module(x_adv), y).mean().backward()
    weights.restore()
    optimizer.step()
    torch.testing.assert_close(flat(module), flat(slow), rtol=1e-9, atol=1e-12)

    plain = normalized()
    objective.losses(plain(x), plain(x_adv), y).mean().backward()
    torch.optim.SGD(plain.parameters(), lr=0.1).step()
    assert not torch.allclose(flat(plain), flat(slow), rtol=1e-6)  # it does make a difference


def test_between_forward_and_backward_autograd_refuses():
    """Why it is applied before the forward and restored after the backward."""
    module = normalized()
    x, _, y = batches()
    weights, _ = perturbed(module)
    weights.apply()
    loss = F.cross_entropy(module(x), y)
    weights.restore()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_autocast_sees_the_weights_move():
    """Autocast keeps half-precision copies of weights, which would be those before the move."""
    module = Tied().float()
    x, _, _ = batches(dtype=torch.float32)
    weights, step = perturbed(module, gamma=0.2)
    with torch.autocast("cpu", torch.bfloat16):
        before = module(x)
        weights.apply()
        there = module(x)
        weights.restore()
        back = module(x)
        assert torch.equal(back, before)
        assert not torch.allclose(there, before, atol=1e-2)
        with torch.no_grad():  # the planted wrong answer
            module.head.weight.add_(step["head.weight"])
        assert torch.equal(module(x), before)


def test_a_perturbation_of_another_module():
    module = normalized()
    with pytest.raises(InputError, match=r"'9\.weight' of shape \(2, 2\) for no such param.*Comp"):
        PerturbedWeights(module, {"9.weight": torch.zeros(2, 2)})
    with pytest.raises(InputError, match=r"'5\.weight' of shape \(2, 2\) for \(4, 144\)"):
        PerturbedWeights(module, {"5.weight": torch.zeros(2, 2)})
