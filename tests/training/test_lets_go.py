"""After a fit defend holds no model of it: not what stays for a look at ε, nor any cache.

A DistributedDataParallel that outlives its process group can take the whole program with it.
"""

import copy
import gc
import os
import pickle
import types
import weakref
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.data import Dataset

from defend import PGD, Adversarial, AdversarialTraining, DifferentialPrivacy, Linf
from defend.errors import PrivacyError
from defend.objectives import AWP, TRADES
from defend.privacy import Budget, PrivateStep, Randomness
from tests.distributed import end_of_program
from tests.helpers import Net, loader, trainer
from tests.loops import adversarial_loop, private_loop
from tests.training.programs import SETTINGS, mean_loss, mlp, sum_loss

ATTACK = PGD(Linf(0.1), steps=2)


@pytest.fixture(autouse=True)
def _group(tmp_path, monkeypatch):
    """A process group of this process alone, and a place for ledgers."""
    monkeypatch.chdir(tmp_path)
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    with mock.patch.dict(os.environ):  # Lightning leaves LOCAL_RANK and more to all that follow
        yield
    end_of_program()


def wrapped_and_optimizer():
    model = DistributedDataParallel(mlp())
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def private_fit(loss=mean_loss, adversarial=None):
    """A private fit; the loop if it is kept, and a weak reference to the model that it wrapped."""
    model, optimizer = wrapped_and_optimizer()
    private = private_loop(
        model, optimizer, loader(64, 16), loss=loss, epochs=1, adversarial=adversarial, **SETTINGS
    )
    with private:
        for batch in private.loader:
            private.step(batch)
    return private, weakref.ref(model)


def is_gone(reference):
    gc.collect()
    return reference() is None


ADVERSARIAL = [None, Adversarial(ATTACK, objective=AWP(TRADES(), 0.05))]


@pytest.mark.parametrize("adversarial", ADVERSARIAL, ids=["private", "and adversarial"])
def test_a_private_loop_that_was_dropped(adversarial):
    model = private_fit(adversarial=adversarial)[1]
    assert is_gone(model)


@pytest.mark.parametrize("adversarial", ADVERSARIAL, ids=["private", "and adversarial"])
def test_a_closed_private_loop_that_is_kept_for_its_epsilon(adversarial):
    private, model = private_fit(adversarial=adversarial)
    assert is_gone(model)
    assert private.epsilon > 0
    assert private.state_dict()["taken"] == 4


def test_a_private_loop_that_was_refused():
    """The error is kept, its traceback is not."""
    model, optimizer = wrapped_and_optimizer()
    with pytest.raises(PrivacyError, match="not the plain mean") as caught:
        private_loop(model, optimizer, loader(64, 16), loss=sum_loss, epochs=1, **SETTINGS)
    error, reference = caught.value.with_traceback(None), weakref.ref(model)
    del caught, model, optimizer
    assert is_gone(reference)
    assert "mean" in str(error)


def test_an_adversarial_loop_that_was_dropped():
    model, optimizer = wrapped_and_optimizer()
    loop = adversarial_loop(model, optimizer, ATTACK, loss=mean_loss, objective=TRADES(), seed=0)
    for batch in loader(64, 16):
        loop.step(batch)
    reference = weakref.ref(model)
    del model, optimizer, loop, batch
    assert is_gone(reference)


CALLBACKS = {
    "private": lambda: [DifferentialPrivacy(**SETTINGS)],
    "adversarial": lambda: [AdversarialTraining(ATTACK, objective=TRADES())],
    "both": lambda: [DifferentialPrivacy(**SETTINGS), AdversarialTraining(ATTACK)],
}


class Wrapped(Callback):
    """Remembers, weakly, what the strategy made of the module."""

    def on_train_start(self, trainer, pl_module):
        assert isinstance(trainer.strategy.model, DistributedDataParallel)
        self.model = weakref.ref(trainer.strategy.model)


def fit(callbacks, module, look):
    """A fit under DDP in this process; nobody but the callbacks is kept."""
    strategy = DDPStrategy(process_group_backend="gloo")
    run = trainer(callbacks=[*callbacks, look], strategy=strategy, default_root_dir=".")
    run.fit(module, loader(64, 16))


@pytest.mark.parametrize("name", CALLBACKS)
def test_callbacks_that_are_kept(name):
    callbacks, look = CALLBACKS[name](), Wrapped()
    fit(callbacks, Net(), look)
    assert is_gone(look.model)
    assert all(callback.state_dict() for callback in callbacks)


class Failing(Net):
    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == 2:
            raise RuntimeError("out of luck")
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("name", CALLBACKS)
def test_callbacks_of_a_fit_that_failed(name):
    callbacks, look = CALLBACKS[name](), Wrapped()
    with pytest.raises(RuntimeError, match="out of luck"):
        fit(callbacks, Failing(), look)
    assert is_gone(look.model)
    assert all(callback.state_dict() for callback in callbacks)


def reachable(start):
    """Everything that can be reached from an object, but for modules, classes and data sets."""
    seen, queue = {}, [start]
    skipped = type, types.ModuleType, types.FrameType, types.CodeType, Dataset
    while queue:
        item = queue.pop()
        if id(item) not in seen and not isinstance(item, skipped):
            seen[id(item)] = item
            function = isinstance(item, types.FunctionType)  # whose globals are everybody's
            queue += item.__closure__ or () if function else gc.get_referents(item)
    return seen.values()


def test_a_closed_private_loop_reaches_no_secret():
    private, _ = private_fit()
    held = list(reachable(private))
    assert any(isinstance(item, Budget) for item in held)
    assert not any(isinstance(item, Randomness | Optimizer | PrivateStep) for item in held)


def test_an_open_one_does():
    model, optimizer = wrapped_and_optimizer()
    with private_loop(
        model, optimizer, loader(64, 16), loss=mean_loss, epochs=1, **SETTINGS
    ) as private:
        held = list(reachable(private))
        for kind in (Randomness, Optimizer, PrivateStep):
            assert any(isinstance(item, kind) for item in held), kind


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda loop: pickle.loads(pickle.dumps(loop))],
                         ids=["copy", "pickle"])  # fmt: skip
def test_a_copy_of_an_open_loop_is_closed_and_knows_what_was_spent(copied):
    model, optimizer = wrapped_and_optimizer()
    with private_loop(
        model, optimizer, loader(64, 16), loss=mean_loss, epochs=1, **SETTINGS
    ) as private:
        batches = iter(private.loader)
        private.step(next(batches))
        twin = copied(private)
        private.step(next(batches))  # goes on
    assert (twin.steps, private.steps) == (1, 2)
    assert not any(isinstance(item, Randomness) for item in reachable(twin))
    with pytest.raises(PrivacyError, match="Expected an open loop"):
        twin.step(next(iter(loader(64, 16))))
    with pytest.raises(PrivacyError, match="Expected an open loop"):
        next(iter(twin.loader))
