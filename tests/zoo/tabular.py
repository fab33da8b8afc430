"""Tables: numbers and categories, alone and together."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.zoo.records import Records, numbers, points, regression
from tests.zoo.setup import Plain, setup

UNSOUND = [
    ("TabNet", "BatchNorm, ghost or not"),
    ("SAINT, with attention between rows", "each record reads the others"),
    ("TabR, with neighbours from the batch", "each record reads the others"),
]


def rows(records=12, seed=0):
    """Four numbers, three categories of 5, 7 and 3 values, a yes or no."""
    g = numbers(seed)
    sizes = torch.tensor([5, 7, 3])
    return Records(
        {
            "numbers": torch.randn(4, generator=g),
            "categories": (torch.rand(3, generator=g) * sizes).long(),
            "target": torch.randint(2, (), generator=g).float(),
        }
        for _ in range(records)
    )


class NumericTokens(nn.Module):
    """Each number times a vector of its own, plus another one."""

    def __init__(self, features, width):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(features, width) * 0.3)
        self.bias = nn.Parameter(torch.randn(features, width) * 0.3)

    def forward(self, x):
        return x.unsqueeze(-1) * self.weight + self.bias


class CategoryTokens(nn.Module):
    """One table for all categories; a buffer says where each of them begins."""

    def __init__(self, sizes, width):
        super().__init__()
        starts = torch.tensor([0, *sizes[:-1]]).cumsum(0)
        self.register_buffer("starts", starts, persistent=False)
        self.table = nn.Embedding(sum(sizes), width)
        self.bias = nn.Parameter(torch.zeros(len(sizes), width))

    def forward(self, x):
        return self.table(x + self.starts) + self.bias[None]


@setup("FT-Transformer", "tabular", rows)
class FTTransformer(Plain):
    def __init__(self, width=8):
        super().__init__()
        self.numeric = NumericTokens(4, width)
        self.category = CategoryTokens([5, 7, 3], width)
        self.cls = nn.Parameter(torch.rand(width) - 0.5)
        layer = nn.TransformerEncoderLayer(width, 2, 16, 0.1, norm_first=True, batch_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, 1))

    def forward(self, numeric, categories):
        cls = self.cls.expand(len(numeric), 1, -1)
        tokens = torch.cat([cls, self.numeric(numeric), self.category(categories)], dim=1)
        return self.head(self.blocks(tokens)[:, 0]).squeeze(-1)

    def training_step(self, batch, batch_idx):
        logits = self(batch["numbers"], batch["categories"])
        return F.binary_cross_entropy_with_logits(logits, batch["target"])


@setup("neural additive model, a net for each feature", "tabular", regression)
class NAM(Plain):
    def __init__(self, features=6):
        super().__init__()
        self.nets = nn.ModuleList(
            nn.Sequential(nn.Linear(1, 8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 1, bias=False))
            for _ in range(features)
        )
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        parts = torch.cat([net(x[:, [i]]) for i, net in enumerate(self.nets)], dim=-1)
        return parts.sum(dim=-1, keepdim=True) + self.bias, parts

    def training_step(self, batch, batch_idx):
        x, y = batch
        y_hat, parts = self(x)
        return F.mse_loss(y_hat, y) + 0.01 * parts.square().mean()


@setup("neural additive model, batched weights by einsum", "tabular", regression)
class BatchedNAM(Plain):
    """Weights [features, in, out]; ExU units in the first layer."""

    def __init__(self, features=6, width=8):
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(features, width) * 0.3)
        self.b1 = nn.Parameter(torch.randn(features, width) * 0.3)
        self.w2 = nn.Parameter(torch.randn(features, width, width) * 0.3)
        self.w3 = nn.Parameter(torch.randn(features, width) * 0.3)
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        h = F.relu((x[..., None] - self.b1) * self.w1.exp()).clamp(max=6)
        h = F.relu(torch.einsum("nfi,fio->nfo", h, self.w2))
        return torch.einsum("nfo,fo->n", h, self.w3) + self.bias

    def training_step(self, batch, batch_idx):
        x, y = batch
        return {"loss": F.mse_loss(self(x), y[:, 0]), "x": x.detach()}


def baskets():
    """Bags of different sizes, and dense features."""
    g = numbers(3)
    return Records(
        (
            torch.randint(20, (1 + i % 5,), generator=g),
            torch.randn(4, generator=g),
            float(i % 2),
        )
        for i in range(12)
    )


def bag(records):
    """One long vector of items, and where each record begins."""
    items, dense, clicks = zip(*records, strict=True)
    offsets = torch.tensor([0] + [len(i) for i in items[:-1]]).cumsum(0)
    return (torch.cat(items), offsets), torch.stack(dense), torch.tensor(clicks)


@setup("wide & deep with nn.EmbeddingBag", "tabular", baskets, bag)
class WideAndDeep(Plain):
    """The bags are concatenated, with offsets: their first dimension is not the batch's."""

    def __init__(self):
        super().__init__()
        self.wide = nn.EmbeddingBag(20, 1, mode="sum")
        self.bag = nn.EmbeddingBag(20, 6, mode="mean")
        self.deep = nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 1))

    def training_step(self, batch, batch_idx):
        (items, offsets), dense, clicks = batch
        deep = self.deep(torch.cat([self.bag(items, offsets), dense], dim=1))
        logits = (self.wide(items, offsets) + deep).squeeze(1)
        return F.binary_cross_entropy_with_logits(logits, clicks)


def two_inputs():
    return Records(((r["numbers"], r["categories"]), r["target"].long()) for r in rows(seed=4))


@setup("numbers and categories, a table for each category", "tabular", two_inputs)
class TwoInputs(Plain):
    """The batch is ((numbers, categories), target)."""

    def __init__(self):
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(n, 4) for n in (5, 7, 3))
        self.net = nn.Sequential(
            nn.Linear(16, 16), nn.LayerNorm(16), nn.GELU(), nn.Dropout(0.1), nn.Linear(16, 2)
        )

    def forward(self, inputs):
        x, categories = inputs
        embedded = [table(categories[:, i]) for i, table in enumerate(self.embeddings)]
        return self.net(torch.cat([x, *embedded], dim=1))

    def training_step(self, batch, batch_idx):
        inputs, target = batch
        return F.cross_entropy(self(inputs), target)


@setup("factorization machine", "tabular", rows)
class FactorizationMachine(Plain):
    def __init__(self):
        super().__init__()
        self.register_buffer("starts", torch.tensor([0, 5, 12]))
        self.linear = nn.Embedding(15, 1)
        self.factors = nn.Embedding(15, 4)
        self.bias = nn.Parameter(torch.zeros(1))

    def training_step(self, batch, batch_idx):
        ids = batch["categories"] + self.starts
        v = self.factors(ids)
        pairs = 0.5 * (v.sum(1).pow(2) - v.pow(2).sum(1)).sum(1)
        logits = self.bias + self.linear(ids).sum((1, 2)) + pairs
        return nn.BCEWithLogitsLoss()(logits, batch["target"])


@setup("deep & cross network", "tabular", points)
class CrossNetwork(Plain):
    """x_(l+1) = x_0 (w_l · x_l) + b_l + x_l, weights in lists of parameters."""

    def __init__(self, features=6, layers=3):
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(features) * 0.3 for _ in range(layers))
        self.biases = nn.ParameterList(torch.zeros(features) for _ in range(layers))
        self.deep = nn.Sequential(nn.Linear(features, 8), nn.ReLU(), nn.Linear(8, 8))
        self.head = nn.Linear(features + 8, 3)

    def training_step(self, batch, batch_idx):
        x0, y = batch
        x = x0
        for w, b in zip(self.weights, self.biases, strict=True):
            x = x0 * (x @ w).unsqueeze(1) + b + x
        return F.cross_entropy(self.head(torch.cat([x, self.deep(x0)], 1)), y)


@setup("residual MLP with alpha dropout and SELU", "tabular", points)
class ResidualMLP(Plain):
    def __init__(self):
        super().__init__()
        self.inputs = nn.Linear(6, 16)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 16), nn.SELU(), nn.AlphaDropout(0.1)) for _ in range(2)
        )
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        x = self.inputs(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x), y)


@setup("periodic embeddings of numbers, several quantiles", "tabular", regression)
class Quantiles(Plain):
    """Frequencies are trained; pinball losses at three levels, in a buffer."""

    def __init__(self):
        super().__init__()
        self.frequencies = nn.Parameter(torch.randn(6, 4))
        self.net = nn.Sequential(nn.Linear(48, 16), nn.SiLU(), nn.Linear(16, 3))
        self.register_buffer("levels", torch.tensor([0.1, 0.5, 0.9]))

    def training_step(self, batch, batch_idx):
        x, y = batch
        angle = 2 * torch.pi * self.frequencies * x.unsqueeze(-1)
        error = y - self.net(torch.cat([angle.sin(), angle.cos()], -1).flatten(1))
        return torch.maximum(self.levels * error, (self.levels - 1) * error).sum(1).mean()


@setup("soft decision tree", "tabular", points)
class SoftTree(Plain):
    """All paths at once: the product of the gates to each leaf."""

    def __init__(self, depth=3):
        super().__init__()
        self.depth = depth
        self.gates = nn.Linear(6, 2**depth - 1)
        self.leaves = nn.Parameter(torch.randn(2**depth, 3))

    def training_step(self, batch, batch_idx):
        x, y = batch
        gates = self.gates(x).sigmoid()
        reach = torch.ones(len(x), 1, device=x.device)
        for level in range(self.depth):
            right = gates[:, 2**level - 1 : 2 ** (level + 1) - 1]
            reach = torch.stack([reach * (1 - right), reach * right], dim=-1).flatten(1)
        return F.nll_loss((reach @ self.leaves.softmax(-1)).log(), y)
