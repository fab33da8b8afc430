"""What hooks do to a released gradient: a multiple of it passes, what is added does not."""

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from defend import DifferentialPrivacy, PrivacyError
from defend.privacy.mechanism.release_mark import ReleaseMark
from tests.helpers import data, trainer


def parameters():
    torch.manual_seed(0)
    found = [nn.Parameter(torch.zeros(size)) for size in ((100, 80), (7,), ())]
    for p in found:
        p.grad = torch.randn_like(p)
    return found


def times(factor):
    return lambda p: p.grad.mul_(factor)


def without_the_first(p):
    if p.ndim == 2:
        p.grad = None


def centralized(p):
    if p.ndim == 2:
        p.grad.sub_(p.grad.mean(1, keepdim=True))


def one_of_many(p):
    if p.ndim == 2:
        p.grad[50] += 1


def a_scalar(p):
    if p.ndim == 0:
        p.grad += 1


KEPT = {
    "nothing": lambda p: None,
    "a part": times(0.1),
    "zero": times(0.0),
    "out": without_the_first,
}
CHANGED = {
    "centralized": centralized,
    "a row": one_of_many,
    "a scalar": a_scalar,
    "another": lambda p: p.grad.copy_(torch.randn_like(p)),
    "turned": times(-1.0),
    "rounded": lambda p: p.grad.clamp_(-0.5, 0.5),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_little_that_is_added_to_a_large_one_shows(dtype):
    """As a raw mean gradient would be, beside the noise of 3 million weights; any number may be it.

    A multiple passes, with the rounding of half precision too.
    """
    torch.manual_seed(0)
    p = nn.Parameter(torch.zeros(4096, 784, dtype=dtype))
    noise = torch.randn(p.shape, dtype=torch.float64) / 256
    p.grad = noise.to(dtype)
    mark = ReleaseMark([p])
    p.grad = p.grad * 0.37
    assert mark.is_kept()
    raw = torch.zeros_like(noise)
    raw[:, 5:] = torch.randn(4096, 1, dtype=torch.float64) @ torch.rand(1, 779, dtype=torch.float64)
    raw *= 0.02 * noise.norm() / raw.norm()
    p.grad = (p.grad.double() + raw).to(dtype)
    assert not mark.is_kept()


def test_what_is_no_number_is_no_multiple():
    some = parameters()
    mark = ReleaseMark(some)
    some[0].grad[0, 0] = torch.nan
    assert not mark.is_kept()
    assert ReleaseMark(some).is_kept()


@pytest.mark.parametrize("name", [*KEPT, *CHANGED])
def test_a_multiple_is_told_from_all_else(name):
    some = parameters()
    mark = ReleaseMark(some)
    for p in some:
        {**KEPT, **CHANGED}[name](p)
    assert mark.is_kept() == (name in KEPT)


class Net(pl.LightningModule):
    def __init__(self, change=None):
        super().__init__()
        self.net, self.change = nn.Linear(8, 3), change

    def training_step(self, batch, batch_idx):
        self.seen = batch[0]
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return Centralizes(self.parameters(), lr=0.1)


class Centralizes(torch.optim.SGD):
    """The cure: what is done in the optimizer sees only what was released."""

    def step(self, closure=None):
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = p.grad - p.grad.mean()
        super().step()
        return loss


class InTheHook(Net):
    def on_before_optimizer_step(self, optimizer):
        self.change(self)


class InClipping(Net):
    def configure_gradient_clipping(
        self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None
    ):
        self.change(self)


class InACallback(pl.Callback):
    def __init__(self, change):
        self.change = change

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.change(pl_module)


PLACES = {
    "hook": lambda change: (InTheHook(change), []),
    "clipping": lambda change: (InClipping(change), []),
    "callback": lambda change: (Net(), [InACallback(change)]),
}


def fitted(module, callbacks):
    dp = DifferentialPrivacy(noise_multiplier=1.0, delta=1e-3, max_grad_norm=1.0, ledger=False)
    fit = trainer(callbacks=[*callbacks, dp], max_epochs=2)
    fit.fit(module, DataLoader(data(24), batch_size=12))
    return dp


def raw(module):
    with torch.no_grad():
        module.net.weight.grad.copy_(module.seen.mean(0).expand(3, 8))


def added(module):
    with torch.no_grad():
        module.net.weight.grad += module.seen.mean(0)


@pytest.mark.parametrize("change", [raw, added])
@pytest.mark.parametrize("place", PLACES)
def test_records_do_not_reach_the_weights_behind_the_noise(place, change):
    module, callbacks = PLACES[place](change)
    before = module.net.weight.detach().clone()
    with pytest.raises(PrivacyError, match="changed after the noise was added"):
        fitted(module, callbacks)
    assert torch.equal(module.net.weight, before)


@pytest.mark.parametrize("place", PLACES)
def test_clipping_once_more_trains(place):
    module, callbacks = PLACES[place](lambda m: nn.utils.clip_grad_norm_(m.parameters(), 1e-3))
    assert fitted(module, callbacks).steps == 4
