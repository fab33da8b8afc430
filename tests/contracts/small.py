"""A small classifier, a batch of records, and how far one record moves a sum."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.reference.dpsgd import clipped_sum as reference_sum

ROWS, FEATURES, CLASSES = 8, 6, 3
DELTA = 1e-5
NORMS = (0.1, 1.0, 10.0)
TOLERANCE = 1e-3  # of C; rounding in float32 stays below 1e-5


@contextmanager
def same_weights() -> Iterator[None]:
    """Modules made in here have the same weights each time. The RNG outside does not notice."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def net() -> nn.Sequential:
    """A small classifier."""
    with same_weights():
        return nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, CLASSES))


def batch(rows: int = ROWS) -> tuple[Tensor, Tensor]:
    """Records of different sizes; the last is ten times as long as most."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, FEATURES, generator=generator)
    x[-1] *= 10
    return x, torch.arange(rows) % CLASSES


def sure() -> nn.Sequential:
    """`net`, with large logits."""
    module = net()
    module[2].weight.data.mul_(10)
    return module


def one_hard_record() -> tuple[Tensor, Tensor]:
    """Records that `sure` gets right, all but the first."""
    x, _ = batch()
    y = sure()(x).argmax(1)
    y[0] = (y[0] + 1) % CLASSES
    return x, y


def too_long(factor: float) -> tuple[Tensor, Tensor]:
    """Records, the first of which is huge, and wrong by the layer `net()[0]`."""
    x, y = batch()
    x[0] *= factor
    y[0] = net()[0](x[:1]).argmin()
    return x, y


def loss(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(module(x), y)


def raw_gradient(x: Tensor, y: Tensor) -> Tensor:
    module = net()
    return flat(torch.autograd.grad(loss(module, x, y), list(module.parameters())))


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.detach().flatten().float() for t in tensors])


def sensitivity(total: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> float:
    """max_i ‖total(all) − total(all but i)‖₂."""
    whole = total(x, y)
    keep = [torch.arange(len(x)) != i for i in range(len(x))]
    return max(float((whole - total(x[k], y[k])).norm()) for k in keep)


def off_reference(got: Tensor, module: nn.Module, x: Tensor, y: Tensor) -> float:
    """‖got − Σ_i clip(g_i)‖ / ‖Σ_i clip(g_i)‖ at C = 1, by a loop over records."""
    rows = [(x[i : i + 1], y[i : i + 1]) for i in range(len(x))]
    expected = flat(reference_sum(module, functools.partial(loss, module), rows, 1.0))
    return float((got - expected).norm() / expected.norm())


class Wrap(nn.Module):
    """`net` with something done in its middle."""

    def __init__(self, change: Callable[[Tensor], Tensor] | nn.Module) -> None:
        super().__init__()
        self.net, self.change = net(), change

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.change(self.net[0](x).tanh()))
