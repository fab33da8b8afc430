"""Optimizers and parameters."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests.contracts.opacus_alone.yardstick import (
    Private,
    breaks,
    charged,
    clipped,
    epsilon,
    judge,
    private,
    train,
)
from tests.contracts.outcomes import Outcome
from tests.contracts.small import DELTA, batch, flat, loss, net, raw_gradient, sensitivity

BREAKS = breaks()


@BREAKS.add
def optimizer_over_a_subset() -> Outcome:
    module = net()
    p = private(module, optimizer=torch.optim.SGD(module[2].parameters(), lr=1.0))
    for _ in range(2):
        train(p, *batch())
    return Outcome("accepts", "it went on")


@BREAKS.add
def optimizer_over_a_subset_without_poisson() -> Outcome:
    module, (x, y) = net(), batch()
    p = private(
        module,
        optimizer=torch.optim.SGD(module[2].parameters(), lr=0.0),
        poisson_sampling=False,
    )
    for _ in range(2):
        train(p, x, y)
    left = flat(q.grad for q in module[0].parameters())
    raw = torch.allclose(left, 2 * raw_gradient(x, y)[: len(left)], atol=1e-5)
    return Outcome(
        "accepts" if raw else "safe",
        f"two steps' raw gradients stay in p.grad of the other {len(left)} weights",
    )


@BREAKS.add
def two_optimizers() -> Outcome:
    """Each half of the module has its own, and each clips to C by itself."""

    def make() -> tuple[Private, Private]:
        module = net()
        first = private(module, optimizer=torch.optim.SGD(module[0].parameters(), lr=1.0))
        _, optimizer, loader = first.engine.make_private(
            module=first.module,
            optimizer=torch.optim.SGD(module[2].parameters(), lr=1.0),
            data_loader=DataLoader(TensorDataset(*batch(64)), 4),
            noise_multiplier=1.0,
            max_grad_norm=0.1,
        )
        return first, Private(first.engine, first.module, optimizer, loader)

    def total(x: Tensor, y: Tensor) -> Tensor:
        both = make()
        loss(both[0].module, x, y).backward()
        return torch.cat([clipped(p) for p in both])

    value = sensitivity(total, *batch()) / 0.1
    both = make()
    for _ in range(16):
        loss(both[0].module, *batch()).backward()
        for p in both:
            p.optimizer.step()
            p.optimizer.zero_grad()
    reported = both[0].engine.get_epsilon(DELTA)
    spent = epsilon((1 / value, 1 / 16, 16))
    return judge(value, f", ε {reported:.2f} reported, {spent:.2f} spent")


@BREAKS.add
def foreign_parameter_in_optimizer() -> Outcome:
    module, other = net(), nn.Linear(2, 2)
    optimizer = torch.optim.SGD([*module.parameters(), *other.parameters()], lr=1.0)
    train(private(module, optimizer=optimizer), *batch())
    return Outcome("accepts", "a step was taken")


@BREAKS.add
def foreign_parameter_added_later() -> Outcome:
    """A loss with a temperature of its own, added to the optimizer once that is private."""
    temperature = nn.Parameter(torch.ones(()))
    p = private(net())
    p.optimizer.add_param_group({"params": [temperature], "lr": 1.0})
    train(p, *batch(), lambda module, x, y: F.cross_entropy(module(x) * temperature, y))
    return Outcome("accepts", f"it moved by {float(temperature) - 1:.2f}, without noise")


@BREAKS.add
def unfrozen_later() -> Outcome:
    module = net()
    module[0].requires_grad_(False)
    p = private(module, optimizer=torch.optim.SGD(module.parameters(), lr=1.0))
    train(p, *batch())
    module[0].requires_grad_(True)
    train(p, *batch())
    return Outcome("accepts", "it went on")


@BREAKS.add
def several_closures() -> Outcome:
    module = net()
    p = private(module, optimizer=torch.optim.LBFGS(module.parameters()))
    x, y = batch()

    def closure() -> Tensor:
        p.optimizer.zero_grad()
        value = loss(p.module, x, y)
        value.backward()
        return value

    p.optimizer.step(closure)
    return Outcome("accepts", f"{p.engine.accountant.history} charged")


def _raw_step(p: Private, optimizer: Any) -> Outcome:
    """A step on p.grad as backward left it, and what the accountant knows of it."""
    x, y = batch()
    before = flat(p.module.parameters())
    p.optimizer.zero_grad()
    loss(p.module, x, y).backward()
    optimizer.step()
    moved = before - flat(p.module.parameters())
    if not torch.allclose(moved, raw_gradient(x, y), atol=1e-5):
        return Outcome("safe", "the step was not raw")
    return Outcome("accepts", f"1 raw step, {charged(p)} charged")


@BREAKS.add
def step_without_noise() -> Outcome:
    p = private(net())
    return _raw_step(p, p.optimizer.original_optimizer)


@BREAKS.add
def second_plain_optimizer() -> Outcome:
    p = private(net())
    return _raw_step(p, torch.optim.SGD(p.module.parameters(), lr=1.0))


@BREAKS.add
def lr_finder() -> Outcome:
    """Five raw steps in search of a learning rate, before `make_private`."""
    module = net()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        loss(module, *batch()).backward()
        optimizer.step()
    p = private(module, optimizer=optimizer)
    kept = sum("exp_avg" in state for state in p.optimizer.state.values())
    return Outcome(
        "accepts" if charged(p) == 0 else "safe",
        f"5 raw steps, {charged(p)} charged; raw gradients in {kept} optimizer states",
    )


@BREAKS.add
def parameter_hook_sees_raw_gradient() -> Outcome:
    p, (x, y), seen = private(net()), batch(), []
    for q in p.module.parameters():
        q.register_hook(seen.append)
    train(p, x, y)
    raw = sum(float(g.norm()) ** 2 for g in seen) ** 0.5
    true = float(raw_gradient(x, y).norm())
    verdict = "accepts" if abs(raw - true) < 1e-4 * true else "safe"
    return Outcome(verdict, f"a hook saw a gradient of norm {raw:.2f}; without privacy {true:.2f}")


@BREAKS.add
def gradient_clip_after() -> Outcome:
    """`clip_grad_norm_` between backward and step."""
    sums = []
    for clip in (False, True):
        p, (x, y) = private(net(), sigma=0.0), batch()
        p.optimizer.zero_grad()
        loss(p.module, x, y).backward()
        if clip:
            nn.utils.clip_grad_norm_(p.module.parameters(), 1e-6)
        p.optimizer.step()
        sums.append(flat(p.module.parameters()))
    if torch.equal(*sums):
        return Outcome("safe", "the clip has no effect: p.grad is overwritten")
    return Outcome("accepts", "the clip changes the step")
