"""Per-record gradients of every layer that users bring, against each record on its own.

Either the gradients equal those of a loop over records, or the layer is refused. What neither
shapes nor sums can tell is written down at the end.
"""

import copy
import gc
import math
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from opacus.layers import DPGRU, DPLSTM, DPRNN, DPMultiheadAttention
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from defend import PrivacyError
from defend.privacy.layers import trainable_layers
from defend.privacy.per_record import PerRecordGradients
from tests.reference.dpsgd import clipped_sum

T = 4  # positions; also one of the batch sizes, so that the two may be mixed up
ROWS = (1, 2, T, 7)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def loss(module, x, y):
    return F.cross_entropy(module(x).flatten(1), y)


def each_alone(module, x, y):
    """gᵢ from record i in a batch of its own, `[rows, *shape]` for each parameter."""
    alone = [
        clipped_sum(
            module, lambda a, b: loss(module, a, b), [(x[i : i + 1], y[i : i + 1])], math.inf
        )
        for i in range(len(x))
    ]
    return [torch.stack(g) for g in zip(*alone, strict=True)]


def together(module, x, y, expect=True):
    per_record = PerRecordGradients(module)
    try:
        if expect:
            per_record.expect(len(x))
        loss(module, x, y).backward()
        return per_record.read(len(x))
    finally:
        per_record.remove()


def inputs(kind, rows):
    generator = torch.Generator().manual_seed(rows)
    if kind == "ids":
        return torch.randint(0, 5, (rows, T), generator=generator)
    shape = {
        "vector": (6,),
        "sequence": (T, 6),
        "signal": (4, 9),
        "image": (4, 7, 6),
        "volume": (2, 4, 4, 3),
    }
    return torch.randn(rows, *shape[kind], generator=generator)


def targets(rows):
    return torch.arange(rows) % 3


def check_equal(module, x, **settings):
    y = targets(len(x))
    expected = each_alone(module, x, y)
    for found, wanted in zip(together(module, x, y, **settings), expected, strict=True):
        torch.testing.assert_close(found, wanted, **CLOSE)
    assert sum(float(g.norm()) for g in expected) > 0


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


EQUAL = {
    # name: (kind of input, module)
    "linear": ("vector", lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))),
    "linear on a sequence": ("sequence", lambda: nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))),
    "linear by keyword": ("vector", lambda: Apply(lambda m, x: m.a(input=x), a=nn.Linear(6, 3))),
    "bilinear": (
        "vector",
        lambda: Apply(lambda m, x: m.b(m.a(x), x), a=nn.Linear(6, 4), b=nn.Bilinear(4, 6, 3)),
    ),
    "prelu": ("signal", lambda: nn.Sequential(nn.Conv1d(4, 4, 3), nn.PReLU(4))),
    "prelu, one weight": ("vector", lambda: nn.Sequential(nn.Linear(6, 6), nn.PReLU())),
    "conv1d": ("signal", lambda: nn.Conv1d(4, 6, 3, 2, 2, 2, groups=2)),
    "conv1d same": ("signal", lambda: nn.Conv1d(4, 6, 4, padding="same")),
    "conv1d circular": ("signal", lambda: nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular")),
    "conv2d": ("image", lambda: nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 2), (1, 2), groups=2)),
    "conv2d same": ("image", lambda: nn.Conv2d(4, 6, (4, 3), padding="same", dilation=2)),
    "conv2d valid": ("image", lambda: nn.Conv2d(4, 4, 3, padding="valid", groups=4, bias=False)),
    "conv2d cut": ("image", lambda: nn.Conv2d(4, 4, 2, stride=4)),
    "conv2d reflect": ("image", lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect")),
    "conv3d": ("volume", lambda: nn.Conv3d(2, 4, (2, 3, 2), (1, 2, 1), 1, groups=2)),
    "conv3d dilated": ("volume", lambda: nn.Conv3d(2, 4, 2, dilation=(2, 1, 1), padding=(0, 1, 0))),
    "conv3d replicate": ("volume", lambda: nn.Conv3d(2, 3, 2, padding=1, padding_mode="replicate")),
    "transposed conv1d": ("signal", lambda: nn.ConvTranspose1d(4, 6, 3, 2, groups=2)),
    "transposed conv2d": (
        "image",
        lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.ConvTranspose2d(4, 6, 3, 2, 1, 1)),
    ),
    "transposed conv, output size": (
        "image",
        lambda: Apply(lambda m, x: m.a(x, [14, 12]), a=nn.ConvTranspose2d(4, 2, 3, 2, 1)),
    ),
    "layer norm": ("sequence", lambda: nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6))),
    "layer norm, two axes": (
        "sequence",
        lambda: nn.Sequential(nn.Linear(6, 6), nn.LayerNorm([T, 6])),
    ),
    "layer norm without bias": (
        "sequence",
        lambda: nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6, bias=False)),
    ),
    "rms norm": ("sequence", lambda: nn.Sequential(nn.Linear(6, 6), nn.RMSNorm(6))),
    "rms norm by hand": ("sequence", lambda: nn.Sequential(nn.Linear(6, 6), RMS())),
    "group norm": ("image", lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4))),
    "instance norm": (
        "signal",
        lambda: nn.Sequential(nn.Conv1d(4, 4, 1), nn.InstanceNorm1d(4, affine=True)),
    ),
    "instance norm 2d": (
        "image",
        lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.InstanceNorm2d(4, affine=True)),
    ),
    "frozen batch statistics": ("vector", frozen_statistics),
    "embedding": ("ids", lambda: nn.Sequential(nn.Embedding(5, 6, padding_idx=0), nn.Linear(6, 3))),
    "sparse embedding": ("ids", lambda: nn.Embedding(5, 6, sparse=True)),
    "positions": (
        "ids",
        lambda: Apply(positions, words=nn.Embedding(5, 6), positions=nn.Embedding(T, 6)),
    ),
    "embedding bag": ("ids", lambda: nn.EmbeddingBag(5, 6, mode="mean")),
    "embedding bag, sum, padding": (
        "ids",
        lambda: nn.EmbeddingBag(5, 6, mode="sum", padding_idx=1),
    ),
    "embedding bag, mean, padding": ("ids", lambda: nn.EmbeddingBag(5, 6, padding_idx=1)),
    "embedding bag, offsets": ("ids", lambda: Apply(flat_bags, bags=nn.EmbeddingBag(5, 6))),
    "embedding bag, last offset": (
        "ids",
        lambda: Apply(flat_bags, bags=nn.EmbeddingBag(5, 6, mode="sum", include_last_offset=True)),
    ),
    "embedding bag, weights": (
        "ids",
        lambda: Apply(
            lambda m, x: m.bags(x, per_sample_weights=x.float().cos()),
            bags=nn.EmbeddingBag(5, 6, mode="sum"),
        ),
    ),
    "tied weights": ("ids", lambda: tie(nn.Embedding(5, 6))),
    "tied weights, padding": ("ids", lambda: tie(nn.Embedding(5, 6, padding_idx=0))),
    "used in a loop": ("vector", lambda: loop(3, nn.Linear(6, 6))),
    "a block used in a loop": ("vector", lambda: loop(2, Shift())),
    "used for nothing too": (
        "vector",
        lambda: Apply(
            lambda m, x: (m.a(x), m.b(m.a(x)), m.a(x + 1))[1], a=nn.Linear(6, 6), b=nn.Linear(6, 3)
        ),
    ),
    "in-place operations": (
        "vector",
        lambda: Apply(in_place, a=nn.Linear(6, 6), b=nn.Linear(6, 3)),
    ),
    "rnn": ("sequence", lambda: recurrent(DPRNN(6, 4, batch_first=True))),
    "lstm": ("sequence", lambda: recurrent(DPLSTM(6, 4, num_layers=2, batch_first=True))),
    "lstm, both ways": (
        "sequence",
        lambda: recurrent(DPLSTM(6, 4, batch_first=True, bidirectional=True)),
    ),
    "gru": ("sequence", lambda: recurrent(DPGRU(6, 4, batch_first=True, bidirectional=True))),
    "lstm, positions first": (
        "sequence",
        lambda: Apply(lambda m, x: m.rnn(x.transpose(0, 1))[0][-1], rnn=DPLSTM(6, 4)),
    ),
    "packed rnn": ("sequence", lambda: packed(DPRNN(6, 4, batch_first=True))),
    "packed lstm": (
        "sequence",
        lambda: packed(DPLSTM(6, 4, 2, batch_first=True, bidirectional=True)),
    ),
    "packed gru": ("sequence", lambda: packed(DPGRU(6, 4, batch_first=True, bidirectional=True))),
    "attention": ("sequence", attention),
    "transformer": ("sequence", transformer),
    "fused attention": (
        "sequence",
        lambda: Apply(
            lambda m, x: m.a(x, x, x, need_weights=False)[0],
            a=nn.MultiheadAttention(6, 2, batch_first=True),
        ),
    ),
    "parameters and children": (
        "vector",
        lambda: nn.Sequential(nn.Linear(6, 6), Shift(), nn.Linear(6, 3)),
    ),
    "blocks in blocks": (
        "vector",
        lambda: Shift(nn.Sequential(Shift(), nn.Tanh(), freeze(nn.Linear(6, 6)))),
    ),
    "arguments by keyword": ("vector", lambda: Apply(keywords, block=Shift())),
    "token and positions": (
        "sequence",
        lambda: nn.Sequential(nn.Linear(6, 6), Token(), nn.Linear(6, 2)),
    ),
    "low rank": (
        "sequence",
        lambda: nn.Sequential(LowRank(nn.Linear(6, 6)), nn.Tanh(), LowRank(nn.Linear(6, 6))),
    ),
    "frozen backbone": ("vector", lambda: nn.Sequential(freeze(Shift()), nn.Linear(6, 3))),
    "frozen middle": (
        "vector",
        lambda: nn.Sequential(nn.Linear(6, 6), freeze(nn.Linear(6, 6)), nn.Linear(6, 3)),
    ),
    "frozen bias": (
        "vector",
        lambda: Apply(lambda m, x: m.a(x), a=(a := nn.Linear(6, 3), freeze(a.bias))[0]),
    ),
    "weight norm": (
        "vector",
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 4)), nn.Tanh()),
    ),
    "weight norm without bias": (
        "vector",
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 4, bias=False)), nn.Tanh()),
    ),
    "orthogonal": (
        "vector",
        lambda: parametrizations.orthogonal(nn.Linear(6, 6), use_trivialization=False),
    ),
    "replaced forward": (
        "vector",
        lambda: nn.Sequential(own_forward(nn.Linear(6, 6)), nn.Linear(6, 3)),
    ),
    "hooks of the user": (
        "vector",
        lambda: nn.Sequential(hooked(nn.Linear(6, 6)), hooked(Shift())),
    ),
}


@pytest.mark.parametrize("name", EQUAL)
def test_equals_each_record_alone(name):
    kind, make = EQUAL[name]
    for rows in ROWS:
        torch.manual_seed(0)
        check_equal(make(), inputs(kind, rows))


@pytest.mark.parametrize(
    "how", ["plain", "reentrant", "nested 00", "nested 01", "nested 10", "nested 11"]
)
def test_checkpoints_equal_each_record_alone(how):
    for rows in ROWS:
        torch.manual_seed(0)
        kind, flags = how.split(" ") if " " in how else (how, "")
        module = nested(*(f == "1" for f in flags)) if flags else checkpointed(kind == "reentrant")
        x, y = inputs("vector", rows), targets(rows)
        expected = each_alone(module.eval(), x, y)
        for found, wanted in zip(together(module.train(), x, y), expected, strict=True):
            torch.testing.assert_close(found, wanted, **CLOSE)


# --- refused ------------------------------------------------------------------------------------


class Mixing(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x):
        return (x - x.mean(0)) * self.scale


class Branch(Mixing):
    def forward(self, x):
        return x * self.scale if x.sum() > 0 else x - self.scale


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, T, 6))

    def forward(self):
        return self.table


class Shared(Mixing):
    def forward(self, x, table):
        return torch.tanh(x * self.scale + table)


class Pair(Mixing):
    def forward(self, x):
        return x * self.scale, x + self.scale


class OnlyShift(Mixing):
    def forward(self, x):
        return x + self.scale


def positions_first(m, x):
    return m.b(m.a(x.transpose(0, 1)).tanh()).transpose(0, 1)


def bare_positions(m, x):
    return m.words(x) + m.positions(torch.arange(x.shape[1]))


def overwritten(m, x):
    h = m.a(x)
    y = m.b(h)
    h.mul_(2)
    return y + h


def part_of_rows(m, x):
    return m.b(x) + m.a(x[:2]).sum(0)


def packed_part(m, x):
    return m.b(x[:, 0]) + m.a(x[:2])[:1]


def inside_and_outside():
    inner = nn.Linear(6, 6)
    return Apply(lambda m, x: m.a(x) + m.b(x), a=Shift(inner), b=inner)


ROWS_OF = r"Expected 3 rows, one a record, in the gradient of `.*`, got"
REFUSED = {
    # name: (kind of input, module, message)
    "positions first": (
        "sequence",
        lambda: Apply(positions_first, a=nn.Linear(6, 6), b=nn.Linear(6, 3)),
        f"{ROWS_OF} {T}",
    ),
    "attention, positions first": (
        "sequence",
        lambda: DPMultiheadAttention(6, 2),
        "records in the first dimension, got DPMultiheadAttention",
    ),
    "attention with extra bias": (
        "sequence",
        lambda: DPMultiheadAttention(6, 2, batch_first=True, add_bias_kv=True),
        "got DPMultiheadAttention with add_bias_kv=True",
    ),
    "fused attention, positions first": (
        "sequence",
        lambda: Apply(
            lambda m, x: m.a(*[x.transpose(0, 1)] * 3, need_weights=False)[0].transpose(0, 1),
            a=nn.MultiheadAttention(6, 2),
        ),
        f"{ROWS_OF} {T}",
    ),
    "fused recurrence": (
        "sequence",
        lambda: Apply(lambda m, x: m.a(x)[0], a=nn.LSTM(6, 4, batch_first=True)),
        "one output of LSTM, which has parameters of its own, got 3",
    ),
    "bare position ids": (
        "ids",
        lambda: Apply(bare_positions, words=nn.Embedding(5, 6), positions=nn.Embedding(T, 6)),
        rf"{ROWS_OF} {T}.*position ids the shape \[1, T\]",
    ),
    "a part of the rows": (
        "vector",
        lambda: Apply(part_of_rows, a=nn.Linear(6, 3), b=nn.Linear(6, 3)),
        f"{ROWS_OF} 2",
    ),
    "all rows and then a part": (
        "vector",
        lambda: Apply(lambda m, x: m.a(x) + m.a(x[1:]).sum(0), a=nn.Linear(6, 3)),
        f"{ROWS_OF} 2",
    ),
    "a packed part": (
        "sequence",
        lambda: Apply(packed_part, a=packed(DPGRU(6, 4, batch_first=True)), b=nn.Linear(6, 3)),
        f"{ROWS_OF} 2",
    ),
    "trainable batch norm": (
        "vector",
        lambda: nn.BatchNorm1d(6),
        "per-record gradients can be computed, got BatchNorm1d",
    ),
    "batch norm without statistics": (
        "vector",
        lambda: nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6, track_running_stats=False)),
        "Expected BatchNorm1d, which has parameters of its own, to run on one record|that add up",
    ),
    "spectral norm": (
        "vector",
        lambda: parametrizations.spectral_norm(nn.Linear(6, 3)),
        "got ParametrizedLinear, which has parameters of its own and buffers",
    ),
    "maximum of a bag": ("ids", lambda: nn.EmbeddingBag(5, 6, mode="max"), "'sum' or 'mean'"),
    "rows mixed in a layer": (
        "vector",
        lambda: nn.Sequential(nn.Linear(6, 6), Mixing()),
        "per-record gradients of `1.scale` that add up",
    ),
    "dropout beside parameters": (
        "vector",
        lambda: Shift(nn.Dropout(0.5)),
        "Expected Shift, which has parameters of its own, to run on one record at a time",
    ),
    "branches on the data": ("vector", Branch, "Expected Branch, .* to run on one record"),
    "two outputs": (
        "vector",
        lambda: Apply(lambda m, x: sum(m.a(x)), a=Pair()),
        "one output of Pair, which has parameters of its own, got 2",
    ),
    "no input": (
        "sequence",
        lambda: Apply(lambda m, x: m.a(x) + m.b(), a=nn.Linear(6, 6), b=Table()),
        "one row a record in every input of Table",
    ),
    "a table without a first dimension of 1": (
        "sequence",
        lambda: Apply(lambda m, x: m.a(x, x.new_ones(T, 6)), a=Shared()),
        "one row a record in every input of Shared",
    ),
    "overwritten input": (
        "vector",
        lambda: Apply(overwritten, a=nn.Linear(6, 6), b=OnlyShift()),
        "inputs of OnlyShift unchanged until backward, got .*modified by an inplace operation",
    ),
    "inside a layer and outside": (
        "vector",
        inside_and_outside,
        "per-record gradients of `a.inner.weight` that add up",
    ),
    "weights frozen too late": (
        "vector",
        lambda: Apply(lambda m, x: F.linear(x, m.a.weight), a=nn.Linear(6, 3)),
        "a gradient per record for `a.weight`, got only their sum",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_is_refused(name):
    kind, make, message = REFUSED[name]
    torch.manual_seed(0)
    with pytest.raises(PrivacyError, match=message):
        together(make(), inputs(kind, 3), targets(3))


def test_without_expect_nothing_is_expanded():
    torch.manual_seed(0)
    kind, make = EQUAL["positions"]
    with pytest.raises(PrivacyError, match="3 rows, one a record, in the gradient of `positions"):
        together(make(), inputs(kind, 3), targets(3), expect=False)
    kind, make = EQUAL["packed lstm"]
    check_equal(make(), inputs(kind, 3), expect=False)


def test_a_shared_table_as_long_as_the_batch_is_refused_at_that_size():
    """Where T = rows its positions are taken for rows; the sum tells, at each new batch size."""
    torch.manual_seed(0)
    table = torch.randn(T, 6)
    module = Apply(lambda m, x: m.a(x, table if len(x) == T else table[None]), a=Shared())
    per_record = PerRecordGradients(module)
    for rows in (3, T):
        per_record.clear()
        per_record.expect(rows)
        loss(module, inputs("sequence", rows), targets(rows)).backward()
        if rows == 3:
            per_record.read(rows)
    with pytest.raises(PrivacyError, match=r"gradients of `a\.scale` that add up"):
        per_record.read(T)


# --- what only a comparison with each record alone finds -----------------------------------------


def sorted_first(m, x):
    order = x[:, 0].argsort()
    return m.b(m.a(x[order])[order.argsort()])


UNSEEN = {
    "positions first, as many as rows": (
        "sequence",
        lambda: Apply(positions_first, a=nn.Linear(6, 6), b=nn.Linear(6, 3)),
    ),
    "bare position ids, as many as rows": (
        "ids",
        lambda: Apply(bare_positions, words=nn.Embedding(5, 6), positions=nn.Embedding(T, 6)),
    ),
    "rows sorted on the way": (
        "vector",
        lambda: Apply(sorted_first, a=nn.Linear(6, 6), b=nn.Linear(6, 3)),
    ),
    "the first row of expanded positions": (
        "ids",
        lambda: Apply(
            lambda m, x: m.words(x) + m.positions(torch.arange(T)[None])[0],
            words=nn.Embedding(5, 6),
            positions=nn.Embedding(T, 6),
        ),
    ),
    "rows mixed between layers": (
        "vector",
        lambda: Apply(
            lambda m, x: m.b(m.a(x) + m.a(x).mean(0)), a=nn.Linear(6, 6), b=nn.Linear(6, 3)
        ),
    ),
}


@pytest.mark.parametrize("name", UNSEEN)
def test_neither_shapes_nor_sums_tell(name):
    """The reason for `defend.privacy.selftest`; and that `each_alone` above would tell."""
    kind, make = UNSEEN[name]
    torch.manual_seed(0)
    module, x, y = make(), inputs(kind, T), targets(T)
    found, alone = together(module, x, y), each_alone(module, x, y)
    assert any((f - a).norm() > 0.1 * a.norm() for f, a in zip(found, alone, strict=True))


# --- nothing is left ------------------------------------------------------------------------------


def state(module):
    return [
        (
            sorted(vars(m)),
            {k: dict(v) for k, v in vars(m).items() if k.endswith("_hooks")},
            m.training,
        )
        for m in module.modules()
    ] + [(dict(vars(p)), p.grad, p._backward_hooks) for p in module.parameters()]


@pytest.mark.parametrize("name", [*EQUAL, "checkpoint", "reentrant checkpoint"])
@pytest.mark.parametrize("when", ["read", "forward", "exception", "backward"])
def test_the_module_is_as_it_was(name, when):
    torch.manual_seed(0)
    kind, make = EQUAL.get(name, ("vector", lambda: checkpointed(name.startswith("reentrant"))))
    module, x, y = make(), inputs(kind, 3), targets(3)
    before = state(module)
    per_record = PerRecordGradients(module)
    assert state(module) != before
    per_record.expect(3)
    if when == "exception":

        def fail(*args):
            raise KeyError("in the middle")

        handle = trainable_layers(module)[-1].register_forward_pre_hook(fail)
        with pytest.raises(KeyError, match="in the middle"):
            loss(module, x, y)
        handle.remove()
    else:
        value = loss(module, x, y)
        if when != "forward":
            value.backward()
        if when == "read":
            per_record.read(3)
    per_record.remove()
    assert state(module) == before
    if when == "forward" and name != "checkpoint":  # which would miss what the hooks kept
        # A gradient that comes late is dropped.
        value.backward()
        assert not per_record._gradients


def test_nothing_per_record_remains_in_memory():
    torch.manual_seed(0)
    module, x, y = checkpointed(False), inputs("vector", 3), targets(3)
    per_record = PerRecordGradients(module)
    seen = []
    module.first.register_forward_hook(lambda m, args, output: seen.append(weakref.ref(output)))
    per_record.expect(3)
    value = loss(module, x, y)
    assert seen[0]() is not None
    value.backward()
    gradients = [weakref.ref(g) for g in per_record.read(3)]
    per_record.clear()
    del value
    gc.collect()
    assert seen[0]() is None
    assert all(g() is None for g in gradients)
    per_record.remove()


@pytest.mark.parametrize("use", [True, False])
def test_a_checkpoint_still_saves_memory(use):
    """What goes into a layer under a checkpoint is not held from forward to backward."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(6, 6), nn.Sigmoid(), nn.Linear(6, 3))
    per_record = PerRecordGradients(block)
    held = []
    block[1].register_forward_hook(
        lambda m, args, output: held.append(output.untyped_storage()._weak_ref())
    )
    x = inputs("vector", 3).requires_grad_()
    output = checkpoint(block, x, use_reentrant=False) if use else block(x)
    gc.collect()
    gone = torch.UntypedStorage._expired(held[0])
    assert gone == use
    F.cross_entropy(output, targets(3)).backward()
    per_record.read(3)
    per_record.remove()


def test_a_copy_takes_no_gradients_along():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3))
    per_record = PerRecordGradients(module)
    loss(module, inputs("vector", 3), targets(3)).backward()
    assert len(per_record._gradients) == 4
    owner = next(iter(copy.deepcopy(module)[0]._forward_hooks.values())).__self__
    assert not owner._receive.__self__._gradients
    module.zero_grad()
    owner = next(iter(pickle.loads(pickle.dumps(module))[0]._forward_hooks.values())).__self__
    assert not owner._receive.__self__._gradients
    per_record.read(3)


# --- passes and pauses ----------------------------------------------------------------------------


def test_paused_leaves_nothing():
    module, x, y = nn.Linear(6, 3), inputs("vector", 3), targets(3)
    per_record = PerRecordGradients(module)
    with per_record.paused():
        loss(module, x, y).backward()
    assert not per_record.holds_any
    with pytest.raises(AttributeError, match="flatten"), per_record.paused():
        loss(lambda x: None, x, y)
    module.zero_grad()
    loss(module, x, y).backward()
    assert per_record.holds_any
    torch.testing.assert_close(per_record.read(3), each_alone(module, x, y))
    per_record.remove()
    assert not per_record.holds_any


@pytest.mark.parametrize("how", ["retained", "attack before", "again"])
@pytest.mark.parametrize("block", [nn.Linear, Shift])
def test_a_second_backward_is_refused(how, block):
    module = nn.Sequential(nn.Linear(6, 6), block() if block is Shift else block(6, 6))
    x, y = inputs("vector", 3).requires_grad_(), targets(3)
    per_record = PerRecordGradients(module)
    value = loss(module, x, y)
    if how == "attack before":
        torch.autograd.grad(value, x)
        value = loss(module, x, y)
    value.backward(retain_graph=how == "retained")
    if how != "attack before":
        (value if how == "retained" else loss(module, x, y)).backward()
    with pytest.raises(PrivacyError, match="one backward a batch, got 2 or more"):
        per_record.read(3)
    per_record.clear()
    loss(module, x, y).backward()
    per_record.read(3)
    per_record.remove()


def test_a_forward_for_another_purpose_does_no_harm():
    """With gradients on, before, between and after; and one more in eval mode."""
    torch.manual_seed(0)
    module, x, y = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3)), inputs("vector", 3), targets(3)
    expected = each_alone(module, x, y)
    per_record = PerRecordGradients(module)
    module(x[:2])
    value = loss(module, x, y)
    module.eval()(x + 1)
    value.backward()
    module.train()(x)
    torch.testing.assert_close(per_record.read(3), expected, **CLOSE)
    per_record.remove()


@pytest.mark.parametrize(
    "name", ["token and positions", "conv2d", "lstm", "embedding", "checkpoint"]
)
def test_half_precision(name):
    torch.manual_seed(0)
    kind, make = EQUAL.get(name, ("vector", lambda: checkpointed(False)))
    module, x, y = make(), inputs(kind, 5), targets(5)
    expected = each_alone(module, x, y)
    with torch.autocast("cpu", torch.bfloat16):
        per_record = PerRecordGradients(module)
        value = F.cross_entropy(module(x).flatten(1).float(), y)
    value.backward()
    whole = sum(float(e.square().sum()) for e in expected) ** 0.5
    for found, wanted in zip(per_record.read(5), expected, strict=True):
        assert (found - wanted).norm() < 0.05 * whole
    per_record.remove()


# --- Hugging Face ---------------------------------------------------------------------------------


def classifier(name):
    transformers = pytest.importorskip("transformers")
    small = {
        "vocab_size": 30, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 12, "num_labels": 3, "pad_token_id": 0, "max_position_embeddings": 8,
    }  # fmt: skip
    if name == "Llama":
        config = transformers.LlamaConfig(**small, num_key_value_heads=1)
        return transformers.LlamaForSequenceClassification(config)
    if name == "GPT2":
        config = transformers.GPT2Config(
            vocab_size=30, n_embd=8, n_layer=2, n_head=2, n_positions=8, num_labels=3,
            pad_token_id=0, bos_token_id=1, eos_token_id=1,
            resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        )  # fmt: skip
        return transformers.GPT2ForSequenceClassification(config)
    small |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    if name == "Bert":
        return transformers.BertForSequenceClassification(transformers.BertConfig(**small))
    for unknown in ("vocab_size", "pad_token_id", "max_position_embeddings"):
        del small[unknown]
    config = transformers.ViTConfig(**small, image_size=8, patch_size=4)
    return transformers.ViTForImageClassification(config)


@pytest.mark.parametrize("name", ["Bert", "Llama", "GPT2", "ViT"])
@pytest.mark.parametrize("memory", ["plain", "checkpoint"])
def test_hugging_face(name, memory, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.manual_seed(0)
    model = classifier(name).train()
    if memory == "checkpoint":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    module = Apply(lambda m, x: m.model(x).logits, model=model)
    for rows in (1, T, 5):
        x = torch.randn(rows, 3, 8, 8) if name == "ViT" else torch.randint(2, 30, (rows, T))
        check_equal(module, x)
