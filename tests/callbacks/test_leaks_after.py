"""A fit, ended in whatever way, leaves the module as it was, and no gradient in it."""

import pickle
import signal

import cloudpickle
import pytest
from lightning.pytorch.callbacks import Callback
from torch import nn

from tests.callbacks.leaks import (
    WIDTH,
    Planted,
    Spy,
    batches,
    has_pattern,
    held_by,
    planted_in,
    private,
    tensors_within,
    watched_fit,
)
from tests.helpers import trainer


def as_it_was(module, run, before):
    """Keys, attributes, hooks, modes and flags of a module are those that it came with."""
    keys, attributes, modes, flags = before
    assert list(module.state_dict()) == keys
    assert {name: set(vars(m)) for name, m in module.named_modules()} == attributes
    assert [m.training for m in module.modules()] == modes
    assert [p.requires_grad for p in module.parameters()] == flags
    assert all(vars(p) == {} and p.grad is None for p in module.parameters())
    for m in module.modules():
        for hooks in [name for name in vars(m) if name.endswith("_hooks")]:
            assert not getattr(m, hooks), (type(m), hooks)
    assert all(not p._backward_hooks for p in module.parameters())
    assert not {"training_step", "backward", "process_dataloader"} & set(vars(run.strategy))
    assert "log" not in vars(run.fit_loop.epoch_loop._results)
    for optimizer in run.optimizers:
        assert not optimizer._optimizer_step_pre_hooks
    assert planted_in(tensors_within(module, *run.optimizers)) == []
    assert not has_pattern(pickle.dumps(module))


def looks(module):
    _ = module.hparams  # Lightning makes this attribute on first use
    return (
        list(module.state_dict()),
        {name: set(vars(m)) for name, m in module.named_modules()},
        [m.training for m in module.modules()],
        [p.requires_grad for p in module.parameters()],
    )


class Planned(Planted):
    """With a part that is frozen and in eval mode."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)

    def train(self, mode=True):
        super().train(mode)
        if "frozen" in self._modules:
            self.frozen.eval()
        return self


def test_after_the_fit_the_module_is_as_it_was():
    module = Planned().train()
    before = looks(module)
    module, run, callback, _ = watched_fit(module)
    as_it_was(module, run, before)
    assert not has_pattern(cloudpickle.dumps(callback.state_dict()))
    assert planted_in(tensors_within(held_by(callback))) == []


@pytest.mark.parametrize("fails", ["in_chunk", "in_validation"])
def test_after_an_exception_too(fails):
    module = Planned(fails=fails).train()
    before, callback = looks(module), private()
    spies = [Spy(callback), type("Second", (Spy,), {})(callback)]
    run = trainer(callbacks=[spies[0], callback, spies[1]], max_epochs=1, num_sanity_val_steps=0)
    with pytest.raises(RuntimeError, match="planted failure"):
        run.fit(module, batches(), batches())
    module.train()  # Lightning leaves a failed validation in eval mode
    as_it_was(module, run, before)
    for spy in spies:
        assert spy.leaks == []
        assert "on_exception" in spy.looked
    assert callback._fit is None
    assert planted_in(tensors_within(held_by(callback))) == []


class Interrupting(Callback):
    """Ctrl-C in the middle of a chunk."""

    def on_before_backward(self, trainer, pl_module, loss):
        if trainer.global_step == 1:
            raise KeyboardInterrupt


def test_after_ctrl_c_too():
    module, callback = Planned().train(), private()
    before = looks(module)
    spy = Spy(callback)
    run = trainer(callbacks=[callback, Interrupting(), spy], max_epochs=1)
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit):  # what Lightning makes of it
            run.fit(module, batches())
    finally:
        signal.signal(signal.SIGINT, handler)
    as_it_was(module, run, before)
    assert spy.leaks == []
    assert spy.looked[-1] == "on_exception"
    assert callback.steps == 1
    assert planted_in(tensors_within(held_by(callback))) == []
