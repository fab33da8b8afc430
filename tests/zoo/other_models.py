"""Models that are neither nets of layers nor any of the other families."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.zoo.records import Records, images, numbers, points, regression
from tests.zoo.setup import Plain, setup

UNSOUND = [
    ("mixture of experts with a capacity", "tokens of the batch push each other out"),
    ("mixture of experts with a balancing loss", "the balance is taken over the batch"),
    ("VQ-VAE with a codebook by moving averages", "the codebook is moved by the batch in forward"),
    ("Glow's ActNorm", "initialized by the first batch"),
]


class SpectralConv1d(nn.Module):
    """Complex weights on the lowest frequencies."""

    def __init__(self, width, modes):
        super().__init__()
        self.modes = modes
        scale = 1 / width
        self.weight = nn.Parameter(scale * torch.randn(width, width, modes, dtype=torch.cfloat))

    def forward(self, x):
        z = torch.fft.rfft(x)
        low = torch.einsum("nim,iom->nom", z[..., : self.modes], self.weight)
        return torch.fft.irfft(F.pad(low, (0, z.shape[-1] - self.modes)), n=x.shape[-1])


def fields():
    g = numbers(1)

    def wave():
        a, b = torch.rand(2, 1, generator=g)
        x = torch.linspace(0, 6.28, 16)
        return (a * (x + b).sin() + (2 * x).cos() * b)[None], (a * (x + b).cos())[None]

    return Records(wave() for _ in range(10))


@setup("Fourier neural operator, complex weights", "other", fields)
class FNO(Plain):
    def __init__(self, width=6):
        super().__init__()
        self.lift, self.project = nn.Conv1d(1, width, 1), nn.Conv1d(width, 1, 1)
        self.spectral = nn.ModuleList(SpectralConv1d(width, 4) for _ in range(2))
        self.pointwise = nn.ModuleList(nn.Conv1d(width, width, 1) for _ in range(2))

    def forward(self, x):
        x = self.lift(x)
        for spectral, pointwise in zip(self.spectral, self.pointwise, strict=True):
            x = F.gelu(spectral(x) + pointwise(x))
        return self.project(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        error = (self(x) - y).flatten(1).norm(dim=1) / y.flatten(1).norm(dim=1)
        return error.mean()


@setup("two-dimensional FNO, real and imaginary parts apart", "other", images)
class FNO2d(Plain):
    """As global filters: one [2, C, H, W/2] parameter, seen as complex."""

    def __init__(self):
        super().__init__()
        self.filter = nn.Parameter(torch.randn(3, 16, 9, 2) * 0.1)
        self.head = nn.Conv2d(3, 3, 16)

    def training_step(self, batch, batch_idx):
        x, y = batch
        z = torch.fft.rfft2(x, norm="ortho") * torch.view_as_complex(self.filter)
        x = F.gelu(x + torch.fft.irfft2(z, s=x.shape[-2:], norm="ortho"))
        return F.cross_entropy(self.head(x).flatten(1), y)


@setup("mixture of experts with soft gates", "other", points)
class SoftExperts(Plain):
    def __init__(self, experts=4):
        super().__init__()
        self.gate = nn.Linear(6, experts)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)) for _ in range(experts)
        )

    def training_step(self, batch, batch_idx):
        x, y = batch
        outputs = torch.stack([expert(x) for expert in self.experts], dim=1)
        mixed = (self.gate(x).softmax(-1).unsqueeze(-1) * outputs).sum(dim=1)
        return F.cross_entropy(mixed, y)


@setup("mixture of experts, each sees only its records", "other", points)
class HardExperts(Plain):
    """The two best of four; an expert is called with a part of the batch, or not at all."""

    def __init__(self, experts=4):
        super().__init__()
        self.router = nn.Linear(6, experts, bias=False)
        self.experts = nn.ModuleList(nn.Linear(6, 8) for _ in range(experts))
        self.head = nn.Linear(8, 3)

    def training_step(self, batch, batch_idx):
        x, y = batch
        weights, chosen = self.router(x).softmax(-1).topk(2, dim=-1)
        h = x.new_zeros(len(x), 8)
        for i, expert in enumerate(self.experts):
            row, place = torch.where(chosen == i)
            if len(row):
                h = h.index_add(0, row, expert(x[row]) * weights[row, place].unsqueeze(1))
        return F.cross_entropy(self.head(h.relu()), y)


@setup("hypernetwork: each record makes its own weights", "other", regression)
class HyperNetwork(Plain):
    def __init__(self):
        super().__init__()
        self.hyper = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 3 * 4 + 4 + 4))

    def training_step(self, batch, batch_idx):
        x, y = batch
        context, inputs = x[:, :3], x[:, 3:]
        w1, b1, w2 = self.hyper(context).split([12, 4, 4], dim=1)
        h = torch.tanh(torch.bmm(w1.view(-1, 4, 3), inputs.unsqueeze(2)).squeeze(2) + b1)
        return F.mse_loss((h * w2).sum(1, keepdim=True), y)


@setup("hypernetwork: weights from an embedding, one for all records", "other", points)
class LayerCodes(Plain):
    """The weights of three layers come from three codes; no record goes through the hypernet."""

    def __init__(self):
        super().__init__()
        self.codes = nn.Parameter(torch.randn(3, 4))
        self.make = nn.Linear(4, 36)
        self.head = nn.Linear(6, 3)

    def training_step(self, batch, batch_idx):
        x, y = batch
        for weight in self.make(self.codes).view(3, 6, 6):
            x = F.elu(F.linear(x, weight)) + x
        return F.cross_entropy(self.head(x), y)


class Coupling(nn.Module):
    def __init__(self, mask, width=12):
        super().__init__()
        self.register_buffer("mask", mask)
        self.scale = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 6), nn.Tanh())
        self.shift = nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 6))

    def forward(self, x):
        kept = x * self.mask
        s, t = self.scale(kept) * (1 - self.mask), self.shift(kept) * (1 - self.mask)
        return kept + (1 - self.mask) * (x * s.exp() + t), s.sum(1)


@setup("normalizing flow, masks and permutations in buffers", "other", points)
class Flow(Plain):
    def __init__(self):
        super().__init__()
        mask = torch.tensor([1.0, 0, 1, 0, 1, 0])
        self.layers = nn.ModuleList([Coupling(mask), Coupling(1 - mask), Coupling(mask)])
        self.register_buffer("order", torch.randperm(6))
        self.prior_mean = nn.Parameter(torch.zeros(6))

    def training_step(self, batch, batch_idx):
        x, _ = batch
        log_det = torch.zeros(len(x), device=x.device)
        for layer in self.layers:
            x, more = layer(x)
            x, log_det = x[:, self.order], log_det + more
        log_prob = -0.5 * ((x - self.prior_mean) ** 2 + 1.8379).sum(1)
        return -(log_prob + log_det).mean()


@setup("neural ODE by Euler steps", "other", points)
class NeuralODE(Plain):
    """The same net at each step, with the time as one more input."""

    def __init__(self, steps=5):
        super().__init__()
        self.steps = steps
        self.field = nn.Sequential(nn.Linear(7, 12), nn.Tanh(), nn.Linear(12, 6))
        self.head = nn.Linear(6, 3)

    def training_step(self, batch, batch_idx):
        x, y = batch
        for i in range(self.steps):
            time = torch.full_like(x[:, :1], i / self.steps)
            x = x + self.field(torch.cat([x, time], dim=1)) / self.steps
        return F.cross_entropy(self.head(x), y)


@setup("deep equilibrium by a fixed number of iterations", "other", points)
class Equilibrium(Plain):
    """The iterations run without a graph, and the last step with one."""

    def __init__(self):
        super().__init__()
        self.inputs, self.state = nn.Linear(6, 8), nn.Linear(8, 8, bias=False)
        self.head = nn.Linear(8, 3)

    def training_step(self, batch, batch_idx):
        x, y = batch
        injected = self.inputs(x)
        z = torch.zeros_like(injected)
        with torch.no_grad():
            for _ in range(8):
                z = torch.tanh(0.5 * self.state(z) + injected)
        z = torch.tanh(0.5 * self.state(z) + injected)
        return F.cross_entropy(self.head(z), y)


@setup("Kolmogorov-Arnold network, radial bases", "other", points)
class KAN(Plain):
    """A curve on each edge: coefficients [in, bases, out] in one einsum."""

    def __init__(self):
        super().__init__()
        self.register_buffer("centers", torch.linspace(-2, 2, 5))
        self.first = nn.Parameter(torch.randn(6, 5, 4) * 0.2)
        self.second = nn.Parameter(torch.randn(4, 5, 3) * 0.2)

    def curves(self, x, coefficients):
        return torch.einsum("nib,ibo->no", (-((x.unsqueeze(-1) - self.centers) ** 2)).exp(),
                            coefficients)  # fmt: skip

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.curves(self.curves(x, self.first), self.second), y)


@setup("radial basis functions with trained centers", "other", regression)
class RadialBasis(Plain):
    def __init__(self, centers=8):
        super().__init__()
        self.centers = nn.Parameter(torch.randn(centers, 6))
        self.log_width = nn.Parameter(torch.zeros(centers))
        self.out = nn.Linear(centers, 1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        squared = (x[:, None] - self.centers).square().sum(-1)
        return F.mse_loss(self.out(torch.exp(-squared / 12 * self.log_width.exp())), y)


@setup("a bilinear layer and a tensor product", "other", points)
class Bilinear(Plain):
    def __init__(self):
        super().__init__()
        self.bilinear = nn.Bilinear(3, 3, 5)
        self.core = nn.Parameter(torch.randn(3, 3, 4) * 0.3)
        self.head = nn.Linear(9, 3)

    def training_step(self, batch, batch_idx):
        x, y = batch
        a, b = x.tensor_split(2, dim=1)
        product = torch.einsum("ni,nj,ijk->nk", a, b, self.core)
        return F.cross_entropy(self.head(torch.cat([self.bilinear(a, b), product], 1)), y)


@setup("variational weights: a Bayesian linear layer", "other", points)
class Bayesian(Plain):
    """Local reparameterization: each record has its own noise; the prior's term is a constant."""

    def __init__(self):
        super().__init__()
        self.mean = nn.Parameter(torch.randn(6, 3) * 0.3)
        self.rho = nn.Parameter(torch.full((6, 3), -2.0))

    def noise(self, shape):
        return torch.randn(shape, device=self.device)

    def training_step(self, batch, batch_idx):
        x, y = batch
        variance = F.softplus(self.rho) ** 2
        mean, deviation = x @ self.mean, (x**2 @ variance + 1e-8).sqrt()
        logits = mean + deviation * self.noise(mean.shape)
        prior = 0.5 * (variance + self.mean**2 - variance.log() - 1).sum()
        return F.cross_entropy(logits, y) + 0.01 * prior
