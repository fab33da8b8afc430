"""What the hooks leave behind, and how they take more than one pass."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from defend import PrivacyError
from defend.privacy.gradients.layers import trainable_layers
from defend.privacy.gradients.per_record import PerRecordGradients

from .alone import CLOSE, each_alone, inputs, loss, targets
from .layer_modules import Shift, checkpointed
from .layer_table import EQUAL

# --- nothing is left ------------------------------------------------------------------------------


def state(module):
    return [
        (
            sorted(vars(m)),
            {k: dict(v) for k, v in vars(m).items() if k.endswith("_hooks")},
            m.training,
        )
        for m in module.modules()
    ] + [(dict(vars(p)), p.grad, p._backward_hooks) for p in module.parameters()]


@pytest.mark.parametrize("name", [*EQUAL, "checkpoint", "reentrant checkpoint"])
@pytest.mark.parametrize("when", ["read", "forward", "exception", "backward"])
def test_the_module_is_as_it_was(name, when):
    torch.manual_seed(0)
    kind, make = EQUAL.get(name, ("vector", lambda: checkpointed(name.startswith("reentrant"))))
    module, x, y = make(), inputs(kind, 3), targets(3)
    before = state(module)
    per_record = PerRecordGradients(module)
    assert state(module) != before
    per_record.expect(3)
    if when == "exception":

        def fail(*args):
            raise KeyError("in the middle")

        handle = trainable_layers(module)[-1].register_forward_pre_hook(fail)
        with pytest.raises(KeyError, match="in the middle"):
            loss(module, x, y)
        handle.remove()
    else:
        value = loss(module, x, y)
        if when != "forward":
            value.backward()
        if when == "read":
            per_record.read(3)
    per_record.remove()
    assert state(module) == before
    if when == "forward" and name != "checkpoint":  # which would miss what the hooks kept
        # A gradient that comes late is dropped.
        value.backward()
        assert not per_record._gradients


def test_nothing_per_record_remains_in_memory():
    torch.manual_seed(0)
    module, x, y = checkpointed(False), inputs("vector", 3), targets(3)
    per_record = PerRecordGradients(module)
    seen = []
    module.first.register_forward_hook(lambda m, args, output: seen.append(weakref.ref(output)))
    per_record.expect(3)
    value = loss(module, x, y)
    assert seen[0]() is not None
    value.backward()
    gradients = [weakref.ref(g) for g in per_record.read(3)]
    per_record.clear()
    del value
    gc.collect()
    assert seen[0]() is None
    assert all(g() is None for g in gradients)
    per_record.remove()


@pytest.mark.parametrize("use", [True, False])
def test_a_checkpoint_still_saves_memory(use):
    """What goes into a layer under a checkpoint is not held from forward to backward."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(6, 6), nn.Sigmoid(), nn.Linear(6, 3))
    per_record = PerRecordGradients(block)
    held = []
    block[1].register_forward_hook(
        lambda m, args, output: held.append(output.untyped_storage()._weak_ref())
    )
    x = inputs("vector", 3).requires_grad_()
    output = checkpoint(block, x, use_reentrant=False) if use else block(x)
    gc.collect()
    gone = torch.UntypedStorage._expired(held[0])
    assert gone == use
    F.cross_entropy(output, targets(3)).backward()
    per_record.read(3)
    per_record.remove()


def test_a_copy_takes_no_gradients_along():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3))
    per_record = PerRecordGradients(module)
    loss(module, inputs("vector", 3), targets(3)).backward()
    assert len(per_record._gradients) == 4
    owner = next(iter(copy.deepcopy(module)[0]._forward_hooks.values())).__self__
    assert not owner._receive.__self__._gradients
    module.zero_grad()
    owner = next(iter(pickle.loads(pickle.dumps(module))[0]._forward_hooks.values())).__self__
    assert not owner._receive.__self__._gradients
    per_record.read(3)


# --- passes and pauses ----------------------------------------------------------------------------


def test_paused_leaves_nothing():
    module, x, y = nn.Linear(6, 3), inputs("vector", 3), targets(3)
    per_record = PerRecordGradients(module)
    with per_record.paused():
        loss(module, x, y).backward()
    assert not per_record.holds_any
    with pytest.raises(AttributeError, match="flatten"), per_record.paused():
        loss(lambda x: None, x, y)
    module.zero_grad()
    loss(module, x, y).backward()
    assert per_record.holds_any
    torch.testing.assert_close(per_record.read(3), each_alone(module, x, y))
    per_record.remove()
    assert not per_record.holds_any


@pytest.mark.parametrize("how", ["retained", "attack before", "again"])
@pytest.mark.parametrize("block", [nn.Linear, Shift])
def test_a_second_backward_is_refused(how, block):
    module = nn.Sequential(nn.Linear(6, 6), block() if block is Shift else block(6, 6))
    x, y = inputs("vector", 3).requires_grad_(), targets(3)
    per_record = PerRecordGradients(module)
    value = loss(module, x, y)
    if how == "attack before":
        torch.autograd.grad(value, x)
        value = loss(module, x, y)
    value.backward(retain_graph=how == "retained")
    if how != "attack before":
        (value if how == "retained" else loss(module, x, y)).backward()
    with pytest.raises(PrivacyError, match="one backward a batch, got 2 or more"):
        per_record.read(3)
    per_record.clear()
    loss(module, x, y).backward()
    per_record.read(3)
    per_record.remove()


def test_a_forward_for_another_purpose_does_no_harm():
    """With gradients on, before, between and after; and one more in eval mode."""
    torch.manual_seed(0)
    module, x, y = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3)), inputs("vector", 3), targets(3)
    expected = each_alone(module, x, y)
    per_record = PerRecordGradients(module)
    module(x[:2])
    value = loss(module, x, y)
    module.eval()(x + 1)
    value.backward()
    module.train()(x)
    torch.testing.assert_close(per_record.read(3), expected, **CLOSE)
    per_record.remove()
