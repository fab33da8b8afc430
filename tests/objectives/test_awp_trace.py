"""Computing a weight perturbation leaves the model as it was."""

import pytest
import torch

from defend.objectives import TRADES, Madry
from defend.objectives.awp import weight_perturbation
from tests.helpers import ConvNet, Net
from tests.objectives.test_awp import GAMMA, batches, normalized, same


def everything(module):
    """All that a pass over the module might move."""
    return {
        "state": {name: value.clone() for name, value in module.state_dict().items()},
        "gradients": [None if p.grad is None else p.grad.clone() for p in module.parameters()],
        "requires_grad": [p.requires_grad for p in module.parameters()],
        "graphs": [p.grad_fn for p in module.parameters()],
        "modes": [m.training for m in module.modules()],
        "random state": torch.get_rng_state(),
        "grad mode": torch.is_grad_enabled(),
    }


def identical(before, after):
    def alike(a, b):
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(alike(a[k], b[k]) for k in a)
        if isinstance(a, list):
            return len(a) == len(b) and all(map(alike, a, b))
        return torch.equal(a, b) if isinstance(a, torch.Tensor) else a is b

    return alike(before, after)


@pytest.mark.parametrize("objective", [Madry(), TRADES()])
@pytest.mark.parametrize("ready", [False, True], ids=["no gradients", "gradients"])
def test_it_leaves_no_trace(objective, ready):
    module = normalized(dropout=0.5)
    module[0].bias.requires_grad_(False)
    if ready:
        module(batches()[0]).sum().backward()
    before = everything(module)
    weight_perturbation(module, objective, *batches(), GAMMA)
    assert identical(before, everything(module))
    # Each part of the check can fail: a plain forward moves statistics and random numbers.
    module(batches()[0])
    after = everything(module)
    assert not torch.equal(before["state"]["1.running_mean"], after["state"]["1.running_mean"])
    assert not torch.equal(before["random state"], after["random state"])


def test_hooks_on_gradients_are_not_called():
    """A user's, to log or clip them: this gradient is none of theirs."""
    module, calls = normalized(), []
    module[0].weight.register_hook(lambda gradient: calls.append(gradient))
    weight_perturbation(module, TRADES(), *batches(), GAMMA)
    assert not calls
    module(batches()[0]).sum().backward()
    assert len(calls) == 1


def test_it_leaves_no_trace_after_an_exception():
    module = normalized(dropout=0.5)
    before = everything(module)

    def broken(output):
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        weight_perturbation(module, Madry(), *batches(), GAMMA, logits=broken)
    assert identical(before, everything(module))


def test_dropout_is_drawn_from_where_the_generator_stands():
    module = normalized(dropout=0.5)
    torch.manual_seed(3)
    first = weight_perturbation(module, Madry(), *batches(), GAMMA)
    again = weight_perturbation(module, Madry(), *batches(), GAMMA)
    torch.manual_seed(4)
    other = weight_perturbation(module, Madry(), *batches(), GAMMA)
    assert same(first, again)
    assert not same(first, other)


@pytest.mark.parametrize("module", [Net(features=36, classes=4), ConvNet(classes=4)])
def test_lightning_modules(module):
    x, x_adv, y = batches(dtype=torch.float32)
    before = everything(module)
    step = weight_perturbation(module, TRADES(), x, x_adv, y, GAMMA)
    assert identical(before, everything(module))
    assert step.keys() == {k for k, p in module.named_parameters() if p.ndim > 1}


@pytest.mark.cuda
def test_on_cuda_the_generator_and_the_statistics_stand_still():
    module = normalized(dropout=0.5).cuda()
    x, x_adv, y = (t.cuda() for t in batches())
    before, state = everything(module), torch.cuda.get_rng_state()
    step = weight_perturbation(module, TRADES(), x, x_adv, y, GAMMA)
    assert identical(before, everything(module))
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert all(v.is_cuda and v.any() for v in step.values())
