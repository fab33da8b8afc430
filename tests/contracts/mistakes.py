"""Models, losses and data that break DP-SGD, as users write them: for both halves of the table."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import default_collate

from tests.contracts.small import CLASSES, FEATURES, ROWS, batch, loss, net, same_weights

# --- models --------------------------------------------------------------------------------------


class HandWrittenNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()


class RemembersItsInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, h: Tensor) -> Tensor:
        self.mean.copy_(h.detach().mean(0))
        return h


class RemembersInAWeight(nn.Module):
    """Centres that follow the data, as some losses and codebooks have them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, h: Tensor) -> Tensor:
        self.inner.bias.data.lerp_(h.detach().mean(0), 0.1)
        return self.inner(h)


class ComplexScale(nn.Module):
    """Complex numbers as weights, more of them than the result shows."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(FEATURES, CLASSES)
        self.scale = nn.Parameter(torch.ones(4000, dtype=torch.cfloat))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + (x[:, :1] * self.scale).real[:, :CLASSES]


class Words(nn.Module):
    """Embedding in, the same table out, and small weights in it: as in language models."""

    def __init__(self, out: str) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(CLASSES, 8), out
        self.inner = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
        nn.init.normal_(self.table.weight, std=0.02)
        if out == "layer":
            self.head = nn.Linear(8, CLASSES, bias=False)
            self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(self.table(x))
        return self.head(h) if self.out == "layer" else F.linear(h, self.table.weight)


def words() -> tuple[Tensor, Tensor]:
    return torch.arange(ROWS) % CLASSES, torch.arange(ROWS) // 2 % CLASSES


class Positions(nn.Module):
    """Sequences of `length` tokens, with one learned vector for each place."""

    def __init__(self, length: int) -> None:
        super().__init__()
        with same_weights():
            self.places, self.head = nn.Embedding(length, FEATURES), nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        place = self.places(torch.arange(self.places.num_embeddings))
        return self.head((x[:, None] + place).tanh().sum(1))


def mix(x: Tensor) -> Tensor:
    """Each record with its neighbour. Random pairs are no better; these change least."""
    return 0.6 * x + 0.4 * x.roll(1, 0)


def twice(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    loss(module, x, y).backward()
    return loss(module, x + 0.1, y)


def fgsm(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    start = x.clone().requires_grad_()
    return x + 0.1 * torch.autograd.grad(loss(module, start, y), start)[0].sign()


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.LSTM(FEATURES, CLASSES, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x[:, None])[0][:, 0]


class Direct(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.scale = net(), nn.Parameter(torch.ones(FEATURES))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x * self.scale)


def positions_before_records(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(module(x.transpose(0, 1)).mean(0), y)


def tokens_as_rows(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(module(x.flatten(0, 1)), y.repeat_interleave(5))


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.net, x, use_reentrant=False)


def divided_by_batch_mean(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    losses = F.cross_entropy(module(x), y, reduction="none")
    return (losses / losses.detach().mean()).mean()


def contrastive(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    h = F.normalize(module(x), dim=1)
    return F.cross_entropy(h @ F.normalize(x[:, :CLASSES], dim=1).T * 5, torch.arange(len(x)))


def padded(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    longest = int((x.abs().sum(2) > 0).sum(1).max())
    return F.cross_entropy(module(x[:, :longest]).mean(1), y)


def concatenated(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return loss(module, torch.cat([x, x + 0.1]), torch.cat([y, y]))


def permuted(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return loss(module, x, y) + loss(module, x.flip(0), y.flip(0))


def selected(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return loss(module, x, y) + loss(module, x[y == 2], y[y == 2])


def summed(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(module(x), y, reduction="sum")


def class_weighted(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(module(x), y, weight=torch.tensor([1.0, 50.0, 1.0]))


def attacked(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return loss(module, fgsm(module, x, y), y)


def attacked_in_eval_mode(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    adversarial = fgsm(module.eval(), x, y)
    return loss(module.train(), adversarial, y)


def mixed(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return loss(module, mix(x), y)


def mixing_collate(rows: list) -> tuple[Tensor, Tensor]:
    x, y = default_collate(rows)
    return mix(x), y


def one_rare_class() -> tuple[Tensor, Tensor]:
    """All but the first record are of one class."""
    x, _ = batch()
    y = torch.zeros(ROWS, dtype=torch.long)
    y[0] = 1
    return x, y


def sequences() -> tuple[Tensor, Tensor]:
    """Records of five tokens each."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(ROWS, 5, FEATURES, generator=generator), batch()[1]


def sentences() -> tuple[Tensor, Tensor]:
    """Records of two or three tokens, and one of sixteen; zeros follow."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([2, 3, 2, 3, 2, 3, 2, 16])
    x = torch.randn(ROWS, 16, FEATURES, generator=generator)
    return x * (torch.arange(16) < lengths[:, None])[..., None], batch()[1]
