"""The tools: a small private training with Opacus, and how far one record moves it.

The yardstick for most breaks is the sensitivity: how far the clipped sum, before noise, moves when
one record is left out. In units of C it is at most 1 where the mechanism holds. It is the worst
over each record of a small batch and, in `of_a_step`, over three clipping norms: some breaks show
only where gradients are shorter than C, and others only where they are longer. It bounds the true
sensitivity from below: "accepts" is a proof, "safe" means that nothing was found with this model
and batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from opacus import PrivacyEngine
from opacus.accountants import PRVAccountant
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests.contracts.outcomes import Outcome, Table, first_words
from tests.contracts.small import (
    DELTA,
    NORMS,
    TOLERANCE,
    batch,
    flat,
    loss,
    off_reference,
    same_weights,
    sensitivity,
)


def breaks() -> Table:
    """An empty table. An error of Opacus' is a refusal."""
    return Table(lambda e: Outcome("refuses", f"{type(e).__name__}: {first_words(e)}"))


@dataclass
class Private:
    """What `make_private` gave, and the engine that gave it."""

    engine: PrivacyEngine
    module: nn.Module
    optimizer: Any
    loader: Any


def private(
    module: nn.Module,
    *,
    optimizer: Any = None,
    loader: Any = None,
    norm: float = 0.1,
    sigma: float = 1.0,
    **settings: Any,
) -> Private:
    """Opacus, set up as its manual says."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    engine = PrivacyEngine()
    made = engine.make_private(
        module=module,
        optimizer=optimizer or torch.optim.SGD(trainable, lr=1.0),
        data_loader=DataLoader(TensorDataset(*batch(64)), 4) if loader is None else loader,
        noise_multiplier=sigma,
        max_grad_norm=norm,
        **settings,
    )
    return Private(engine, *made)


def train(p: Private, x: Tensor, y: Tensor, loss: Callable[..., Tensor] = loss) -> None:
    """One step of an ordinary loop."""
    p.optimizer.zero_grad()
    loss(p.module, x, y).backward()
    p.optimizer.step()


def clipped(p: Private) -> Tensor:
    """The clipped sum that Opacus would now add noise to."""
    p.optimizer.clip_and_accumulate()
    return flat(q.summed_grad for q in p.optimizer.params)


def added_noise(p: Private) -> Tensor:
    """The noise in the step that was just taken."""
    size = p.optimizer.expected_batch_size
    return flat(q.grad * size - q.summed_grad for q in p.optimizer.params)


def of_a_step(
    make: Callable[[], nn.Module],
    loss: Callable[..., Tensor] = loss,
    data: tuple[Tensor, Tensor] | None = None,
    norms: tuple[float, ...] = NORMS,
    **settings: Any,
) -> float:
    """Sensitivity of one step in units of C: the worst over the records and over `norms`."""
    x, y = data or batch()

    def total(x: Tensor, y: Tensor) -> Tensor:
        with same_weights():
            module = make()
        p = private(module, norm=norm, **settings)
        torch.manual_seed(1)  # the step's own random numbers: the same with and without a record
        loss(p.module, x, y).backward()
        return clipped(p)

    worst = 0.0
    for norm in norms:
        worst = max(worst, sensitivity(total, x, y) / norm)
    return worst


def judge(value: float, note: str = "") -> Outcome:
    """A sensitivity above C is a break."""
    verdict = "accepts" if value > 1 + TOLERANCE else "safe"
    return Outcome(verdict, f"sensitivity {value:.3f} C{note}")


def equals_reference(make: Callable[[], nn.Module], x: Tensor, y: Tensor) -> Outcome:
    """Sensitivity, and whether the clipped sum is that of a loop over records."""
    with same_weights():
        p = private(make(), norm=1.0)
    loss(p.module, x, y).backward()
    got = clipped(p)
    with same_weights():
        off = off_reference(got, make(), x, y)
    outcome = judge(of_a_step(make, data=(x, y)))
    if off < TOLERANCE:
        return outcome
    return Outcome("accepts", f"{outcome.detail}, and the gradient is {off:.0%} off")


def epsilon(*history: tuple[float, float, int]) -> float:
    """ε of (σ, q, steps), by Opacus' own accountant."""
    accountant = PRVAccountant()
    accountant.history = list(history)
    return accountant.get_epsilon(DELTA)


def charged(p: Private) -> int:
    """Steps that the accountant knows of."""
    return sum(steps for _, _, steps in p.engine.accountant.history)


def loader_of(rows: int = 64, size: int = 4, **settings: Any) -> DataLoader:
    return DataLoader(TensorDataset(*batch(rows)), size, **settings)


def same_noise(first: Tensor, second: Tensor, how: str) -> Outcome:
    same = torch.allclose(first, second, atol=1e-5)
    return Outcome(
        "accepts" if same else "safe", f"{how}: {'equal' if same else 'different'} noise"
    )
