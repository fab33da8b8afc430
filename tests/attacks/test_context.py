"""The attack leaves no trace, also when the model raises in the middle."""

import contextlib
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from defend import L2, PGD, Linf
from defend.attacks import TorchAttack, no_trace
from defend.attacks.context import module_of


class Moody(nn.Module):
    """Raises at the n-th forward, draws from the global RNG, and keeps batch statistics."""

    def __init__(self, fail_at=None):
        super().__init__()
        self.norm = nn.BatchNorm2d(1)
        self.frozen_norm = nn.BatchNorm2d(1).eval()
        self.linear = nn.Linear(16, 3)
        self.linear.bias.requires_grad_(False)
        self.fail_at = fail_at
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        if self.calls == self.fail_at:
            raise RuntimeError("out of luck")
        x = self.frozen_norm(self.norm(x)) + 0.01 * torch.randn_like(x)
        return self.linear(x.flatten(1))


def snapshot(model):
    return {
        "training": [m.training for m in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grad": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "state": {k: v.clone() for k, v in model.state_dict().items()},
        "rng": torch.get_rng_state(),
        "grad_enabled": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "attributes": [sorted(vars(m)) for m in model.modules()],
        "parameter_attributes": [sorted(vars(p)) for p in model.parameters()],
    }


def assert_same(before, after):
    for key in before:
        left, right = before[key], after[key]
        if key == "rng":
            assert torch.equal(left, right), key
        elif key == "state":
            assert all(torch.equal(left[k], right[k]) for k in left), key
        elif key == "grad":
            for a, b in zip(left, right, strict=True):
                assert (a is None) == (b is None)
                assert a is None or torch.equal(a, b)
        else:
            assert left == right, key


@pytest.fixture
def case():
    torch.manual_seed(0)
    model = Moody().train()
    model.frozen_norm.eval()
    x, y = torch.rand(8, 1, 4, 4), torch.randint(0, 3, (8,))
    F.cross_entropy(model(x), y).backward()  # gradients to preserve
    model.calls = 0
    return model, x, y


@pytest.mark.parametrize("attack", [PGD(Linf(0.1)), PGD(L2(0.3), restarts=2)])
@pytest.mark.parametrize("fail_at", [None, 1, 4])
@pytest.mark.parametrize("mode", ["grad", "no_grad", "inference"])
def test_no_trace(case, attack, fail_at, mode):
    model, x, y = case
    model.fail_at = fail_at
    outer = {
        "grad": contextlib.nullcontext,
        "no_grad": torch.no_grad,
        "inference": torch.inference_mode,
    }[mode]
    with outer():
        if mode == "inference":
            x, y = x.clone(), y.clone()  # inference tensors, as in Lightning's validation
        before = snapshot(model)
        if fail_at is None:
            adv = attack(model, x, y)
            assert not torch.equal(adv, x)
        else:
            with pytest.raises(RuntimeError, match="out of luck"):
                attack(model, x, y)
        assert_same(before, snapshot(model))


def test_inside_the_model_is_in_eval_mode_and_frozen(case):
    model, _, _ = case
    with no_trace(model, torch.device("cpu")):
        assert not any(m.training for m in model.modules())
        assert not any(p.requires_grad for p in model.parameters())
        assert torch.is_grad_enabled()


WAYS_TO_CALL = {
    "module": lambda model: model,
    "method": lambda model: model.forward,
    "partial": lambda model: functools.partial(model),
    "partial of a method": lambda model: functools.partial(model.forward),
    "partial of a partial": lambda model: functools.partial(functools.partial(model.scaled, by=1)),
}


class Scales(Moody):
    def scaled(self, x, by):
        return by * self(x)


@pytest.mark.parametrize("call", WAYS_TO_CALL.values(), ids=WAYS_TO_CALL)
@pytest.mark.parametrize("attack", [PGD(Linf(0.1)), TorchAttack("PGD")], ids=["pgd", "torch"])
def test_a_method_or_partial_is_its_module(call, attack):
    torch.manual_seed(0)
    model = Scales().train()
    model.frozen_norm.eval()
    x, y = torch.rand(8, 1, 4, 4), torch.randint(0, 3, (8,))
    F.cross_entropy(model(x), y).backward()
    modes = []
    model.register_forward_hook(lambda module, args, out: modes.append(module.training))
    model.linear.register_forward_hook(lambda module, args, out: modes.append(module.training))
    before = snapshot(model)
    adv = attack(call(model), x, y)
    assert_same(before, snapshot(model))
    assert modes
    assert not any(modes)
    assert not torch.equal(adv, x)


def test_other_callables_have_no_module():
    model = Moody()
    assert [module_of(way(Scales())) is None for way in WAYS_TO_CALL.values()] == [False] * 5
    for other in (lambda x: model(x), F.relu, [model].append, functools.partial(F.relu)):
        assert module_of(other) is None


def per_record_state(model):
    return [
        (hasattr(p, "grad_sample"), getattr(p, "grad_sample", None) is None, p._forward_counter)
        for p in model.parameters()
    ]


@pytest.mark.parametrize("fail_at", [None, 3])
def test_per_record_hooks_are_off_during_the_attack_and_on_again_after(fail_at):
    from opacus.grad_sample import GradSampleHooks

    torch.manual_seed(0)
    layers = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    calls = []

    def model_call(module, args):
        calls.append(1)
        if len(calls) == fail_at:
            raise RuntimeError("out of luck")

    layers.register_forward_pre_hook(model_call)
    hooks = GradSampleHooks(layers)
    x, y = torch.rand(4, 1, 4, 4), torch.tensor([0, 1, 2, 0])
    before = per_record_state(layers)
    with contextlib.suppress(RuntimeError):
        PGD(Linf(0.1))(layers, x, y)
    assert len(calls) == (fail_at or 10)
    assert per_record_state(layers) == before
    assert hooks.hooks_enabled
    F.cross_entropy(layers(x), y).backward()
    assert layers[1].weight.grad_sample.shape == (4, 3, 16)  # once, not twice


def test_hooks_that_were_off_stay_off():
    from opacus.grad_sample import GradSampleHooks

    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    hooks = GradSampleHooks(model)
    hooks.disable_hooks()
    PGD(Linf(0.1))(model, torch.rand(2, 1, 4, 4), torch.tensor([0, 1]))
    assert not hooks.hooks_enabled


def test_users_own_forward_hooks_still_run():
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    seen = []
    model.register_forward_hook(lambda m, a, out: seen.append(out) or out * 2)
    PGD(Linf(0.1), steps=3)(model, torch.rand(2, 1, 4, 4), torch.tensor([0, 1]))
    assert len(seen) == 3


def test_a_mode_that_the_attack_itself_changed_goes_back_too():
    """As careless attacks do: `model.train()` at the end, whatever it was before."""
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2)).eval()
    with no_trace(model, torch.device("cpu")):
        model.train()
    assert not any(m.training for m in model.modules())
