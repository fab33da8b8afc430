"""Layers without per-record gradients are refused, or known to need the self-test."""

import pytest
import torch
import torch.nn.functional as F
from opacus.layers import DPGRU, DPMultiheadAttention
from torch import nn
from torch.nn.utils import parametrizations

from defend import PrivacyError
from defend.privacy.gradients.per_record import PerRecordGradients

from .alone import T, check_equal, each_alone, inputs, loss, targets, together
from .layer_modules import Apply, Shift, packed
from .layer_table import EQUAL


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


class Counting(Mixing):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count += 1
        return x * self.scale / self.count


class Replacing(Mixing):
    def __init__(self):
        super().__init__()
        self.register_buffer("last", torch.ones(6))

    def forward(self, x):
        y = x * self.scale * self.last
        self.last = 2 * self.last
        return y


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
    "a recurrent cell": (
        "vector",
        lambda: Apply(lambda m, x: m.b(m.a(x)), a=nn.GRUCell(6, 4), b=nn.Linear(4, 3)),
        "Expected GRUCell, which has parameters of its own, to run on one record",
    ),
    "complex weights": (
        "vector",
        lambda: Apply(
            lambda m, x: (m.a(x.cfloat())).real, a=nn.Linear(6, 3, dtype=torch.cfloat)
        ),
        "weights that are real numbers, got complex ones",
    ),
    "a buffer that is written to": ("vector", Counting, "got a changed `count`"),
    "a buffer that is another one in backward": ("vector", Replacing, "got a changed `last`"),
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
        "got a changed `num_batches_tracked`",
    ),
    "batch norm without statistics": (
        "vector",
        lambda: nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6, track_running_stats=False)),
        "Expected BatchNorm1d, which has parameters of its own, to run on one record|that add up",
    ),
    "spectral norm": (
        "vector",
        lambda: parametrizations.spectral_norm(nn.Linear(6, 3)),
        r"buffers of ParametrizedLinear, .* got a changed `parametrizations.weight.0._u`",
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
        "inputs of OnlyShift unchanged until backward, got some that an operation in place",
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


# --- what only a comparison with each record alone finds ------------------------------------------


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
    """The reason for `defend.privacy.checks.selftest`; and that `each_alone` above would tell."""
    kind, make = UNSEEN[name]
    torch.manual_seed(0)
    module, x, y = make(), inputs(kind, T), targets(T)
    found, alone = together(module, x, y), each_alone(module, x, y)
    assert any((f - a).norm() > 0.1 * a.norm() for f, a in zip(found, alone, strict=True))
