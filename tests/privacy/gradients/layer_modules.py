"""Modules as users write them, small."""

import torch
from opacus.layers import DPMultiheadAttention
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from .alone import T


class Apply(nn.Module):
    """Submodules, and a function of them and the input."""

    def __init__(self, function, **modules):
        super().__init__()
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.function(self, x)


class Shift(nn.Module):
    """A parameter, and a child, of its own."""

    def __init__(self, inner=None):
        super().__init__()
        self.shift = nn.Parameter(torch.randn(6))
        self.inner = nn.Linear(6, 6) if inner is None else inner

    def forward(self, x, scale=1.0, *, mask=None):
        shifted = torch.tanh(self.inner(x) * scale + self.shift)
        return shifted if mask is None else shifted * mask


class Token(nn.Module):
    """A learned token before each sequence, and learned positions."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 6))
        self.positions = nn.Parameter(torch.randn(1, T + 1, 6))
        self.project = nn.Linear(6, 6)

    def forward(self, x):
        x = torch.cat([self.token.expand(len(x), -1, -1), self.project(x)], 1)
        return x + self.positions


class RMS(nn.Module):
    """As language models write it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6))

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class Temperature(nn.Module):
    """One number of no dimensions, and another."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.shift = nn.Parameter(torch.tensor(-0.3))

    def forward(self, x):
        return torch.tanh(x * self.scale + self.shift)


class Spectrum(nn.Module):
    """Multiplies by complex numbers, kept as two real parameters; the result is complex."""

    def __init__(self):
        super().__init__()
        self.real, self.imag = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(6))

    def forward(self, x):
        return x * torch.complex(self.real, self.imag)


class LowRank(nn.Module):
    """An adapter around a frozen layer."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(2, 6))
        self.up = nn.Parameter(torch.randn(6, 2))

    def forward(self, x):
        return self.base(x) + x @ self.down.T @ self.up.T


def positions(m, x):
    return m.words(x) + m.positions(torch.arange(x.shape[1])[None])


def tied(m, x):
    return m.out(m.words(x).tanh().mean(1))


def tie(words):
    out = nn.Linear(6, 5, bias=False)
    out.weight = words.weight
    return Apply(tied, words=words, out=out)


def packed(rnn, enforce_sorted=False):
    def run(m, x):
        lengths = (x[:, :, 0] > 0).sum(1).clamp_min(1)
        if enforce_sorted:
            lengths = lengths.sort(descending=True).values
        sequence = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=enforce_sorted)
        output, hidden = m.rnn(sequence)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        output, _ = pad_packed_sequence(output, batch_first=True)
        return m.out(output.sum(1) + hidden.sum(0).repeat(1, output.shape[2] // 4))

    return Apply(run, rnn=rnn, out=nn.Linear(4 * (1 + rnn.bidirectional), 3))


def recurrent(rnn):
    return Apply(lambda m, x: m.out(m.rnn(m.first(x))[0]), first=nn.Linear(6, 6), rnn=rnn,
                 out=nn.Linear(4 * (1 + rnn.bidirectional), 2))  # fmt: skip


def attention(**settings):
    mha = DPMultiheadAttention(6, 2, batch_first=True, **settings)
    return Apply(lambda m, x: m.mha(m.first(x), x, x)[0], first=nn.Linear(6, 6), mha=mha)


def transformer():
    layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True)
    layer.self_attn = DPMultiheadAttention(6, 2, batch_first=True)
    return nn.Sequential(
        nn.Linear(6, 6), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    )


def through(m, block, h, reentrant):
    """A checkpoint; none in the reference, which is in eval mode (autograd.grad knows no such)."""
    return checkpoint(block, h, use_reentrant=reentrant) if m.training else block(h)


def checkpointed(reentrant):
    block = nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True), nn.LayerNorm(6), Shift())

    def run(m, x):
        h = m.first(x)
        for _ in range(2):  # the same layers twice, each time under a checkpoint
            h = through(m, m.block, h, reentrant)
        return m.out(m.block(h))

    return Apply(run, first=nn.Linear(6, 6), block=block, out=nn.Linear(6, 3))


def nested(outer, inner):
    def part(m, h):
        return m.b(through(m, m.a, h.tanh(), inner).tanh())

    def run(m, x):
        return m.a(through(m, lambda h: part(m, h), m.a(x), outer))

    return Apply(run, a=nn.Linear(6, 6), b=nn.Linear(6, 6))


def loop(times, inner):
    def run(m, x):
        for _ in range(times):
            x = m.inner(x).tanh()
        return x

    return Apply(run, inner=inner)


def keywords(m, x):
    return m.block(x=m.block(x, 0.5), scale=2.0, mask=x.sigmoid())


def own_forward(layer):
    plain = layer.forward
    layer.forward = lambda x: 2 * plain(x) + x
    return layer


def hooked(layer):
    layer.register_forward_hook(lambda m, args, output: 2 * output)
    layer.register_forward_pre_hook(lambda m, args: (args[0] + 1,))
    return layer


def flat_bags(m, x):
    offsets = torch.arange(0, x.numel() + 1, T)
    offsets = offsets if m.bags.include_last_offset else offsets[:-1]
    return m.bags(x.flatten(), offsets)


def in_place(m, x):
    h = m.a(x)
    h += x
    h.relu_()
    return m.b(h)


def frozen_statistics():
    norm = nn.BatchNorm1d(6).requires_grad_(False)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    return nn.Sequential(nn.Linear(6, 6), norm.eval(), nn.Linear(6, 3))


def freeze(module):
    return module.requires_grad_(False)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(6))

    def forward(self, x):
        return x * self.scale, x + self.scale


def two_outputs():
    return {"a": Pair(), "b": nn.Linear(6, 3)}


class Permuted(nn.Module):
    """Constant buffers beside a parameter of its own, whole numbers and others."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(6))
        self.register_buffer("order", torch.arange(5, -1, -1), persistent=False)
        self.register_buffer("mean", torch.rand(6))

    def forward(self, x):
        return (x[:, self.order] - self.mean) * self.weight


class Listed(nn.Module):
    """Parameters in containers that are never called."""

    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList(torch.rand(6, 6) for _ in range(2))
        self.named = nn.ModuleDict({"shift": nn.ParameterDict({"b": nn.Parameter(torch.rand(6))})})
        self.first = nn.Linear(6, 6)

    def forward(self, x):
        x = self.first(x)
        return x @ self.weights[0] + x**2 @ self.weights[1] + self.named["shift"]["b"]
