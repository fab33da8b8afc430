"""Graphs and sets: records of different sizes, concatenated or padded."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.attention import pad_series, padding
from tests.zoo.records import Records, numbers, series
from tests.zoo.setup import Plain, setup

UNSOUND = [
    ("node classification on one big graph", "there is one record only, or nodes read others"),
    ("BatchNorm or PairNorm over all nodes", "each graph is normalized by the others"),
]


def graphs():
    """x [nodes, 4], edges [2, m] in both directions, y."""
    g = numbers(1)

    def graph(i):
        nodes = 3 + i % 4
        ring = torch.arange(nodes)
        edges = torch.stack([ring, (ring + 1) % nodes])
        return {
            "x": torch.randn(nodes, 4, generator=g),
            "edges": torch.cat([edges, edges.flip(0)], dim=1),
            "y": torch.randint(3, (), generator=g),
        }

    return Records(graph(i) for i in range(12))


@dataclass
class Graphs:
    """Nodes of all graphs one after another; `batch` tells each node's graph."""

    x: Tensor
    edges: Tensor
    batch: Tensor
    y: Tensor

    def __len__(self):
        return len(self.y)


def concatenated(records):
    sizes = torch.tensor([len(r["x"]) for r in records])
    begins = sizes.cumsum(0) - sizes
    return Graphs(
        x=torch.cat([r["x"] for r in records]),
        edges=torch.cat([r["edges"] + b for r, b in zip(records, begins, strict=True)], dim=1),
        batch=torch.arange(len(records)).repeat_interleave(sizes),
        y=torch.stack([r["y"] for r in records]),
    )


def as_dict(records):
    return vars(concatenated(records))


def mean_of_graphs(x, batch, count):
    total = x.new_zeros(count, x.shape[1]).index_add(0, batch, x)
    return total / torch.bincount(batch, minlength=count).unsqueeze(1)


class GCNLayer(nn.Module):
    def __init__(self, inside, out):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inside, out) * 0.4)
        self.bias = nn.Parameter(torch.zeros(out))

    def forward(self, x, edges):
        source, target = edges
        degree = torch.bincount(target, minlength=len(x)) + 1.0
        scale = (degree[source] * degree[target]).rsqrt().unsqueeze(1)
        h = x @ self.weight
        return (h / degree[:, None]).index_add(0, target, h[source] * scale) + self.bias


@setup("GCN, graphs concatenated with a batch vector", "other", graphs, concatenated)
class GCN(Plain):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([GCNLayer(4, 8), GCNLayer(8, 8)])
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(8, 3)

    def training_step(self, batch, batch_idx):
        x = batch.x
        for layer in self.layers:
            x = self.dropout(layer(x, batch.edges).relu())
        return F.cross_entropy(self.head(mean_of_graphs(x, batch.batch, len(batch.y))), batch.y)


@setup("GAT, attention over edges, the batch a dict", "other", graphs, as_dict)
class GAT(Plain):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 8, bias=False)
        self.a_source = nn.Parameter(torch.randn(8) * 0.3)
        self.a_target = nn.Parameter(torch.randn(8) * 0.3)
        self.head = nn.Linear(8, 3)

    def training_step(self, batch, batch_idx):
        source, target = batch["edges"]
        h = self.lin(batch["x"])
        score = F.leaky_relu(h[source] @ self.a_source + h[target] @ self.a_target, 0.2).exp()
        total = score.new_zeros(len(h)).index_add(0, target, score)
        h = torch.zeros_like(h).index_add(0, target, h[source] * (score / total[target])[:, None])
        pooled = mean_of_graphs(F.elu(h), batch["batch"], len(batch["y"]))
        return F.cross_entropy(self.head(pooled), batch["y"])


@setup("GIN with edges' messages, a sum over each graph", "other", graphs, concatenated)
class GIN(Plain):
    """A trained ε as a scalar; the sum of a graph instead of its mean."""

    def __init__(self):
        super().__init__()
        self.eps = nn.Parameter(torch.zeros(()))
        self.message = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        self.update = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 8))
        self.embed, self.head = nn.Linear(4, 8), nn.Linear(8, 3)

    def training_step(self, batch, batch_idx):
        x = self.embed(batch.x)
        source, target = batch.edges
        received = torch.zeros_like(x).index_add_(0, target, self.message(x[source]))
        x = self.update((1 + self.eps) * x + received)
        pooled = x.new_zeros(len(batch.y), 8).index_add(0, batch.batch, x)
        return {"loss": F.cross_entropy(self.head(pooled), batch.y)}


def lists(records):
    return [r["x"] for r in records], [r["edges"] for r in records], [r["y"] for r in records]


@setup("message passing, a loop over a list of graphs", "other", graphs, lists)
class LoopedGraphs(Plain):
    """Dense adjacency of each graph; the layers are called once for each record."""

    def __init__(self):
        super().__init__()
        self.own, self.others = nn.Linear(4, 8), nn.Linear(4, 8, bias=False)
        self.head = nn.Linear(8, 3)

    def training_step(self, batch, batch_idx):
        losses = []
        for x, edges, y in zip(*batch, strict=True):
            adjacency = x.new_zeros(len(x), len(x)).index_put(tuple(edges), x.new_ones(()))
            h = torch.relu(self.own(x) + self.others(adjacency @ x))
            losses.append(F.cross_entropy(self.head(h.mean(0)), y))
        return sum(losses) / len(losses)


@setup("deep sets, padded and masked", "other", series, pad_series)
class DeepSets(Plain):
    def __init__(self):
        super().__init__()
        self.phi = nn.Sequential(nn.Linear(4, 12), nn.Tanh(), nn.Linear(12, 8))
        self.rho = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3))

    def training_step(self, batch, batch_idx):
        x, lengths, y = batch
        keep = ~padding(lengths, x.shape[1])
        pooled = (self.phi(x) * keep.unsqueeze(-1)).sum(dim=1)
        return F.cross_entropy(self.rho(pooled / 4), y)


@setup("PointNet, the largest over each set's points", "other", series, pad_series)
class PointNet(Plain):
    """Pointwise convolutions and an alignment matrix that each record makes for itself."""

    def __init__(self):
        super().__init__()
        self.align = nn.Linear(4, 16)
        self.conv1, self.conv2 = nn.Conv1d(4, 8, 1), nn.Conv1d(8, 16, 1)
        self.head = nn.Linear(16, 3)

    def training_step(self, batch, batch_idx):
        x, lengths, y = batch
        absent = padding(lengths, x.shape[1])
        center = x.sum(1) / lengths.unsqueeze(1)
        x = x @ self.align(center).view(-1, 4, 4)
        h = self.conv2(F.relu(self.conv1(x.mT)))
        h = h.masked_fill(absent.unsqueeze(1), float("-inf")).amax(-1)
        return F.cross_entropy(self.head(h), y)
