"""Optimizers, parameters, and steps behind the mechanism."""

from typing import Any

import torch
from torch import nn

from defend import PrivacyError
from defend.training import PrivateLoop
from tests.contracts.defend_does.yardstick import (
    Plain,
    Released,
    breaks,
    dp,
    fit,
    holds,
    loader,
)
from tests.contracts.outcomes import Outcome
from tests.contracts.small import DELTA, batch, flat, loss, net
from tests.loops import private_loop

BREAKS = breaks()


def in_a_loop(
    model: nn.Module, optimizer: Any = None, data: Any = None, **settings: Any
) -> PrivateLoop:
    """`make_private` as a user of a plain loop sets it up, without a file."""
    defaults = {"epochs": 1, "delta": DELTA, "max_grad_norm": 0.1, "noise_multiplier": 1.0}
    return private_loop(
        model,
        optimizer or torch.optim.SGD(model.parameters(), lr=0.1),
        loader() if data is None else data,
        loss=lambda module, pair: loss(module, *pair),
        **{**defaults, "ledger": False, **settings},
    )


def _accepted(module: Plain, **settings: Any) -> Outcome:
    fit(module, **settings)
    return Outcome("open", "it went on")


@BREAKS.add
def optimizer_over_a_subset() -> Outcome:
    class Half(Plain):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.network[2].parameters(), lr=0.1)

    return _accepted(Half())


@BREAKS.add
def optimizer_over_a_subset_without_poisson() -> Outcome:
    return optimizer_over_a_subset()


@BREAKS.add
def two_optimizers() -> Outcome:
    class Two(Plain):
        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(self.network[i].parameters(), lr=0.1) for i in (0, 2)]

        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.manual_backward(loss(self, *batch))
            for optimizer in self.optimizers():
                optimizer.step()

    return _accepted(Two())


@BREAKS.add
def foreign_parameter_in_optimizer() -> Outcome:
    class Foreign(Plain):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([*self.parameters(), *nn.Linear(2, 2).parameters()], lr=0.1)

    return _accepted(Foreign())


@BREAKS.add
def foreign_parameter_added_later() -> Outcome:
    class Later(Plain):
        def on_train_start(self) -> None:
            self.temperature = [nn.Parameter(torch.ones(()))]  # a list hides it from the module
            self.trainer.optimizers[0].add_param_group({"params": self.temperature})

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            temperature = self.temperature[0] if hasattr(self, "temperature") else 1.0
            return nn.functional.cross_entropy(self(batch[0]) * temperature, batch[1])

    return _accepted(Later())


@BREAKS.add
def unfrozen_later() -> Outcome:
    class Unfreezing(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.network[0].requires_grad_(False)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.network[0].requires_grad_(batch_idx == 1)

    module = Unfreezing()
    frozen = flat(module.network[0].parameters())
    try:
        return _accepted(module, max_epochs=1)
    finally:
        assert torch.equal(flat(module.network[0].parameters()), frozen)


@BREAKS.add
def several_closures() -> Outcome:
    class Newton(Plain):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters())

    return _accepted(Newton())


def _raw_step(*, own: bool) -> Outcome:
    """A step on raw gradients between two private ones, perhaps by an optimizer of its own."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    other = torch.optim.SGD(model.parameters(), lr=0.1) if own else optimizer
    with in_a_loop(model, optimizer) as private:
        batches = iter(private.loader)
        private.step(next(batches))
        before = flat(model.parameters())
        loss(model, *batch()).backward()
        try:
            other.step()
        except PrivacyError:
            assert torch.equal(flat(model.parameters()), before)
            raise
        private.step(next(batches))
    return Outcome("open", f"1 raw step, {private.steps - 2} charged")


@BREAKS.add
def step_without_noise() -> Outcome:
    return _raw_step(own=False)


@BREAKS.add
def second_plain_optimizer() -> Outcome:
    return _raw_step(own=True)


@BREAKS.add
def lr_finder() -> Outcome:
    """Raw steps in search of a learning rate, before `make_private`."""
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        loss(model, *batch()).backward()
        optimizer.step()
    with in_a_loop(model, optimizer) as private:
        kept = sum("exp_avg" in state for state in optimizer.state.values())
        return Outcome("open", f"5 raw steps, {private.steps} charged; {kept} optimizer states")


@BREAKS.add
def parameter_hook_sees_raw_gradient() -> Outcome:
    module, seen = Plain(), []
    for q in module.parameters():
        q.register_hook(seen.append)
    return _accepted(module)


@BREAKS.add
def parameter_hook_added_later() -> Outcome:
    class Late(Plain):
        def on_train_start(self) -> None:
            next(self.parameters()).register_hook(lambda g: None)

    return _accepted(Late())


@BREAKS.add
def gradient_clip_after() -> Outcome:
    """A module that clips by itself, in the last hook before the step."""

    class Clips(Plain):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            self.found = flat(p.grad for p in self.parameters())
            nn.utils.clip_grad_norm_(self.parameters(), 1e-6)

    found = []
    for sigma in (0.0, 1.0):
        module = Clips()
        data = loader(8, 8)
        fit(module, data, dp(noise_multiplier=sigma, insecure_seed=7, ledger=False), (Released(),))
        found.append(module.found * 8)
    deviation = float((found[1] - found[0]).std()) / 0.1
    return holds(abs(deviation - 1) < 0.4, "the clip comes after the noise")
