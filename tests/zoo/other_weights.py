"""Where weights live: in the step, shared, reparametrized, sparse, scalar, beside buffers."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from tests.zoo.attention import pad_texts
from tests.zoo.records import images, points, regression, texts
from tests.zoo.setup import Plain, setup


@setup("scale and temperature used in the step", "other", points)
class Temperature(Plain):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(6, 8)
        self.prototypes = nn.Parameter(torch.randn(3, 8))
        self.log_temperature = nn.Parameter(torch.tensor(1.0))
        self.scale = nn.Parameter(torch.ones(8))

    def training_step(self, batch, batch_idx):
        x, y = batch
        z = F.normalize(self.net(x) * self.scale, dim=-1)
        logits = z @ F.normalize(self.prototypes, dim=-1).T * self.log_temperature.exp()
        return F.cross_entropy(logits, y)


@setup("logistic regression written with parameters only", "other", points)
class Logistic(Plain):
    """No submodule at all, and a penalty on the weights, the same for each record."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(6, 3))
        self.b = nn.Parameter(torch.zeros(3))

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(torch.addmm(self.b, x, self.w), y)
        return loss + 0.01 * (self.w - 0.1).pow(2).sum()


@setup("ParameterList and ParameterDict", "other", points)
class Collections(Plain):
    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList([torch.randn(6, 8) * 0.4, torch.randn(8, 3) * 0.4])
        self.extras = nn.ParameterDict({"shift": torch.zeros(8), "power": torch.tensor(1.5)})

    def training_step(self, batch, batch_idx):
        x, y = batch
        h = F.softplus(x @ self.weights[0] + self.extras["shift"]) + 0.1
        return F.cross_entropy(h.pow(self.extras["power"]) @ self.weights[1], y)


@setup("autoencoder with tied weights", "other", points)
class TiedAutoencoder(Plain):
    """The decoder is the encoder's weight, transposed, by F.linear."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(6, 4)
        self.decoder_bias = nn.Parameter(torch.zeros(6))

    def training_step(self, batch, batch_idx):
        x, _ = batch
        h = self.encoder(x).sigmoid()
        return F.mse_loss(F.linear(h, self.encoder.weight.t(), self.decoder_bias), x)


@setup("tied embeddings, CBOW", "other", texts, pad_texts)
class TiedEmbedding(Plain):
    """The first word from the mean of the others; one table for both."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(60, 8, padding_idx=0)
        self.out = nn.Linear(8, 60)
        self.out.weight = self.table.weight

    def training_step(self, batch, batch_idx):
        ids, _ = batch
        context = ids[:, 1:]
        mean = self.table(context).sum(1) / (context != 0).sum(1, keepdim=True)
        return F.cross_entropy(self.out(mean), ids[:, 0])


@setup("sparse embedding", "other", texts, pad_texts)
class Sparse(Plain):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(60, 8, sparse=True)
        self.head = nn.Linear(8, 3)

    def training_step(self, batch, batch_idx):
        ids, y = batch
        there = (ids != 0).unsqueeze(-1)
        return F.cross_entropy(self.head((self.table(ids) * there).sum(1) / there.sum(1)), y)


@setup("one layer used three times, once by its weight alone", "other", points)
class Reused(Plain):
    def __init__(self):
        super().__init__()
        self.inputs = nn.Linear(6, 8)
        self.shared = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def training_step(self, batch, batch_idx):
        x, y = batch
        h = self.inputs(x).tanh()
        h = h + self.shared(h).tanh()
        h = h + self.shared(h).tanh()
        return F.cross_entropy(self.head(h @ self.shared.weight), y)


@setup("spectral norm, old style", "other", points)
class OldSpectral(Plain):
    """A power iteration in each forward in train mode: it moves buffers, whatever the records."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.utils.spectral_norm(nn.Linear(6, 12)), nn.LeakyReLU(0.2), nn.Linear(12, 3)
        )

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.multi_margin_loss(self.net(x), y)


@setup("spectral norm as a parametrization", "other", images)
class NewSpectral(Plain):
    def __init__(self):
        super().__init__()
        self.conv = parametrizations.spectral_norm(nn.Conv2d(3, 8, 4, 4))
        self.head = parametrizations.spectral_norm(nn.Linear(128, 3))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.head(F.relu(self.conv(x)).flatten(1)), y)


@setup("weight_norm, old style", "other", regression)
class OldWeightNorm(Plain):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.utils.weight_norm(nn.Linear(6, 12)), nn.ELU(), nn.utils.weight_norm(nn.Linear(12, 1))
        )

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.smooth_l1_loss(self.net(x), y)


@setup("orthogonal weights as a parametrization", "other", points)
class Orthogonal(Plain):
    def __init__(self):
        super().__init__()
        self.rotate = parametrizations.orthogonal(nn.Linear(6, 6, bias=False))
        self.head = nn.Linear(6, 3)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.head(F.relu(self.rotate(x))), y)


class RMSNorm(nn.Module):
    def __init__(self, width, eps=1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class Stochastic(nn.Module):
    """Stochastic depth with a probability called `p`."""

    def __init__(self, branch, p=0.2):
        super().__init__()
        self.branch = branch
        self.survival = DropBranch(p)
        self.alpha = nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        return x + self.alpha * self.survival(self.branch(x))


class DropBranch(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        if not self.training or self.p == 0:
            return x
        kept = torch.rand(x.shape[0], *[1] * (x.dim() - 1), device=x.device) >= self.p
        return x * kept / (1 - self.p)


@setup("RMSNorm by hand, stochastic depth and a scalar for each branch", "other", points)
class ReZero(Plain):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(6, 8),
            *(Stochastic(nn.Sequential(RMSNorm(8), nn.Linear(8, 8), nn.GELU())) for _ in range(3)),
            RMSNorm(8), nn.Linear(8, 3),
        )  # fmt: skip

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x), y)


class Quantized(nn.Module):
    """Buffers of integers, floats and booleans beside a weight and a scalar."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 8) * 0.4)
        self.gain = nn.Parameter(torch.tensor(1.0))
        self.register_buffer("order", torch.tensor([2, 0, 1, 5, 4, 3]))
        self.register_buffer("mask", torch.rand(6, 8) > 0.3)
        self.register_buffer("offset", torch.linspace(-1, 1, 8))
        self.register_buffer("steps", torch.tensor(3), persistent=False)

    def forward(self, x):
        return (x[:, self.order] @ (self.weight * self.mask) + self.offset) * self.gain / self.steps


@setup("constant buffers beside a module's own parameters", "other", points)
class Buffers(Plain):
    def __init__(self):
        super().__init__()
        self.layer, self.head = Quantized(), nn.Linear(8, 3)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.head(torch.sin(self.layer(x))), y)


@setup("frozen body, a head and a bias trained", "other", images)
class FrozenBody(Plain):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.Flatten(), nn.Linear(128, 8))
        self.body.requires_grad_(False)
        self.body[0].bias.requires_grad_(True)
        self.head = nn.Linear(8, 3)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.head(self.body(x)), y)


@setup("a scripted MLP and activations with weights", "other", points)
class ScriptedMLP(Plain):
    def __init__(self):
        super().__init__()
        self.net = torch.jit.script(nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 8)))
        self.slope = nn.PReLU(8)
        self.beta = nn.Parameter(torch.ones(()))
        self.head = nn.Linear(8, 3)

    def training_step(self, batch, batch_idx):
        x, y = batch
        h = self.slope(self.net(x))
        return F.cross_entropy(self.head(h * torch.sigmoid(self.beta * h)), y)
