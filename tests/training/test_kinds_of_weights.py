"""Whole fits of weights that are no matrices: numbers without dimensions, and complex numbers."""

import math

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from defend import DifferentialPrivacy, PrivacyError
from defend.privacy import AdaptiveClipping, FlatClipping, PerLayerClipping
from defend.privacy.mechanism.shard import sum_over_processes
from tests.helpers import flat, trainer
from tests.privacy.gradients.layer_modules import Spectrum, Temperature
from tests.training.loops import SETTINGS, mean_loss, private, train

RECORDS, STEPS, LR, C = 12, 3, 0.5, 0.5
RULES = [FlatClipping(), PerLayerClipping(), AdaptiveClipping()]


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # for the ledgers


class Turns(Dataset):
    """Each record is handed out in two versions, in turn: its two views."""

    def __init__(self, views):
        generator = torch.Generator().manual_seed(0)
        self.versions = 3 * torch.randn(RECORDS, views, 6, generator=generator)
        self.asked = [0] * RECORDS

    def __len__(self):
        return RECORDS

    def __getitem__(self, index):
        self.asked[index] += 1
        return self.versions[index][self.asked[index] % self.versions.shape[1]], index % 3


class Lit(pl.LightningModule):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return mean_loss(self, batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=LR)


def networks():
    torch.manual_seed(0)
    return {
        "between layers": nn.Sequential(nn.Linear(6, 4), Temperature(), nn.Linear(4, 3)),
        "alone": Temperature(),
        "on the top module": Above(),
    }


class Above(Temperature):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 3)

    def forward(self, x):
        return self.inner(super().forward(x))


def fitted(how, net, batches, **settings):
    """The network after `STEPS` steps, each on all records."""
    module = Lit(net)
    settings = {**SETTINGS, "max_grad_norm": C, **settings}
    if how == "Trainer":
        trainer(callbacks=[DifferentialPrivacy(**settings)], max_epochs=STEPS).fit(module, batches)
    else:
        optimizer = module.configure_optimizers()
        train(private(module, optimizer, batches, epochs=STEPS, **settings), STEPS)
    return net


def expected(net, data, rule):
    """Slow and obvious: each record alone, its views averaged, clipped by the rule, and a step."""
    parameters, bound = list(net.parameters()), C
    longest = 0.0
    for _ in range(STEPS):
        total, below = [torch.zeros_like(p) for p in parameters], 0
        for i in range(RECORDS):
            x = data.versions[i]
            loss = F.cross_entropy(net(x), torch.full((len(x),), i % 3))
            gradient = torch.autograd.grad(loss, parameters)
            norm = math.sqrt(sum(float((g.double() ** 2).sum()) for g in gradient))
            below, longest = below + (norm <= bound), max(longest, norm)
            for t, g in zip(total, gradient, strict=True):
                if isinstance(rule, PerLayerClipping):
                    share = bound / math.sqrt(len(parameters))
                    t += g * min(1.0, share / max(float(g.norm()), 1e-30))
                else:
                    t += g * min(1.0, bound / norm)
        with torch.no_grad():
            for p, t in zip(parameters, total, strict=True):
                p -= LR * t / RECORDS
        if isinstance(rule, AdaptiveClipping):
            bound *= math.exp(-0.2 * (below / RECORDS - 0.5))
    assert longest > C  # or nothing was clipped
    return net


@pytest.mark.parametrize("how", ["loop", "Trainer"])
@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("rule", RULES, ids=lambda r: type(r).__name__)
@pytest.mark.parametrize("name", networks())
def test_scalars_train_like_any_other_weight(name, rule, views, how):
    net, data = networks()[name], Turns(views)
    before = flat(net)
    settings = {"noise_multiplier": 0.0, "insecure_seed": 1, "views": views, "clipping": rule}
    fitted(how, net, DataLoader(data, RECORDS), chunk_size=5 * views, **settings)
    torch.testing.assert_close(flat(net), flat(expected(networks()[name], data, rule)))
    assert all((flat(net) != before).tolist())


class Silent(nn.Module):
    """A loss that does not depend on the data: all that moves the weights is noise."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 0.0 * self.inner(x)


def noise(net, **settings):
    """What one step adds to the sum, in units of σC; weight by weight."""
    before = [p.detach().clone() for p in net.parameters()]
    module = Lit(Silent(net))
    batches = DataLoader(TensorDataset(torch.rand(4, 6), torch.arange(4) % 3), 4)
    train(private(module, module.configure_optimizers(), batches, **settings))
    scale = SETTINGS["noise_multiplier"] * SETTINGS["max_grad_norm"] * LR / 4
    return [(p.detach() - b) / scale for p, b in zip(net.parameters(), before, strict=True)]


def is_standard(numbers):
    """The deviation within five standard errors of 1: chance alone leaves them in 1e-6."""
    return abs(float(numbers.std()) - 1) < 5 / math.sqrt(2 * numbers.numel())


class Many(nn.Module):
    """Four hundred numbers."""

    def __init__(self):
        super().__init__()
        for i in range(400):
            self.register_parameter(f"scale_{i}", nn.Parameter(torch.tensor(0.0)))

    def forward(self, x):
        return x * sum(self.parameters())


@pytest.mark.parametrize("secure", [False, True])
def test_each_scalar_has_its_own_noise_of_the_promised_deviation(secure):
    found = torch.stack(noise(Many(), secure_noise=secure))
    assert found.shape == (400,)
    assert is_standard(found)
    assert len(found.unique()) > 395  # two may be equal by their rounding
    assert not is_standard(found / math.sqrt(2))


def test_scalars_are_summed_over_processes(monkeypatch):
    """Two processes with equal sums."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda flat: flat.mul_(2))
    sums = [torch.tensor(1.5), torch.ones(2, 3), torch.tensor(-2.0)]
    for total, part in zip(sum_over_processes(sums, None), sums, strict=True):
        assert torch.equal(total, 2 * part)


# --- complex numbers ------------------------------------------------------------------------------


class Complex(nn.Module):
    """What is refused; `Spectrum` is what the error tells to write instead."""

    def __init__(self, real, imag):
        super().__init__()
        self.weight = nn.Parameter(torch.complex(real, imag))

    def forward(self, x):
        return x * self.weight


class Around(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return torch.fft.ifft(self.inner(torch.fft.fft(x))).real


def two_of_a_kind():
    torch.manual_seed(0)
    parts = Spectrum()
    return Around(parts), Around(Complex(parts.real.detach(), parts.imag.detach()))


@pytest.mark.parametrize("how", ["loop", "Trainer"])
def test_complex_weights_and_their_parts_take_the_step_of_the_whole(how):
    parts, whole = two_of_a_kind()
    data = Turns(1)
    settings = {"noise_multiplier": 0.0, "insecure_seed": 1, "max_grad_norm": 1e6}
    with pytest.raises(PrivacyError, match=r"got `.*weight` in torch.complex64\. .*Keep the real"):
        fitted(how, whole, DataLoader(data, RECORDS), engine="hooks", **settings)
    assert torch.equal(whole.inner.weight, two_of_a_kind()[1].inner.weight)
    by_record = two_of_a_kind()[1]  # under engine="auto"
    fitted(how, by_record, DataLoader(data, RECORDS), **settings)
    fitted(how, parts, DataLoader(data, RECORDS), **settings)
    optimizer = torch.optim.SGD(whole.parameters(), lr=LR)
    for _ in range(STEPS):
        optimizer.zero_grad()
        F.cross_entropy(whole(data.versions[:, 0]), torch.arange(RECORDS) % 3).backward()
        optimizer.step()
    found = torch.complex(parts.inner.real, parts.inner.imag)
    torch.testing.assert_close(found, whole.inner.weight)
    torch.testing.assert_close(by_record.inner.weight, whole.inner.weight)


def test_both_parts_have_noise_of_the_promised_deviation():
    class Wide(Spectrum):
        def __init__(self):
            super().__init__()
            self.real, self.imag = (nn.Parameter(torch.ones(2000)) for _ in range(2))

        def forward(self, x):
            return (x[:, :1] * torch.complex(self.real, self.imag)).real[:, :3]

    for part in noise(Wide()):
        assert is_standard(part)
        assert not is_standard(part / math.sqrt(2))  # the deviation of torch's complex normals
    drawn = torch.empty(2000, dtype=torch.cfloat).normal_(generator=torch.Generator())
    assert not is_standard(drawn.real)
