"""Rows of an attack's chunk, found from measured bytes: once for a model and a kind of batch."""

import gc
import weakref

import pytest
import torch
from torch import nn

from defend import PGD, Linf
from defend.attacks import sizing
from defend.attacks.sizing import ChunkSize
from tests.attacks.cases import Watched, model_for, seeded
from tests.attacks.test_sizing import ATTACKS, Tight, run

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def memory(monkeypatch):
    """A GPU of 10,000 bytes on which a step takes 1,000, and 100 a row; the first one 700 more."""
    asked = []

    def peak(run, device):
        assert device == CUDA
        run()
        return 1000 + 100 * asked[-1] + (700 if len(asked) == 1 else 0)

    monkeypatch.setattr(sizing, "peak_bytes", peak)
    monkeypatch.setattr(sizing, "free_bytes", lambda device: 10_000)
    return asked


@pytest.mark.parametrize(("share", "rows"), [(0.8, 70), (0.4, 30)])
def test_what_fits_is_measured_once(memory, share, rows):
    model = Tight()
    size = ChunkSize(model, "key", CUDA, share)
    assert size.rows("auto", 512, memory.append) == rows
    assert max(memory) <= 12
    measured = len(memory)
    again = ChunkSize(model, "key", CUDA, share)
    assert again.rows("auto", 512, memory.append) == rows
    assert again.rows("auto", 20, memory.append) == 20
    assert len(memory) == measured
    ChunkSize(model, "another key", CUDA, share).rows("auto", 512, memory.append)
    assert len(memory) == 2 * measured


def test_what_was_found_bounds_what_is_asked(memory):
    size = ChunkSize(Tight(), "key", CUDA, 0.8)
    size.rows("auto", 512, memory.append)
    assert size.rows(None, 512, memory.append) == 70
    assert size.rows(100, 512, memory.append) == 70
    assert size.rows(50, 512, memory.append) == 50
    size.remember(70, 70)
    assert size.rows("auto", 512, memory.append) == 70
    size.remember(70, 35)
    assert size.rows("auto", 512, memory.append) == 35
    size.remember(20, 20)  # a small batch that fitted says nothing
    assert size.rows("auto", 512, memory.append) == 35


@pytest.mark.parametrize("asked", [None, 8, 100])
def test_nothing_is_measured_where_the_user_says_how_many(memory, asked):
    size = ChunkSize(Tight(), "key", CUDA, 0.8)
    assert size.rows(asked, 64, memory.append) == (asked or 64)
    assert memory == []


def test_small_batches_are_not_measured(memory):
    assert ChunkSize(Tight(), "key", CUDA, 0.8).rows("auto", 11, memory.append) == 11
    assert ChunkSize(Tight(), "key", CPU, 0.8).rows("auto", 32, memory.append) == 32
    assert memory == []


def keeping(bytes_of_a_row):
    """A step whose backward needs so many bytes of each row, and a megabyte for weights."""
    weights = torch.rand(250_000)

    def step(rows):
        kept = torch.rand(rows, bytes_of_a_row // 4, requires_grad=True)
        (kept * kept).sum() + (weights * kept.flatten()[:1]).sum()

    return step


@pytest.mark.parametrize(("each", "rows"), [(400_000, 100), (2_000_000, 32), (4_000, 512)])
def test_on_a_cpu_rows_stay_warm(each, rows):
    """40 MB of what the backward needs, at least 32 rows; and only where nobody says otherwise."""
    size = ChunkSize(Tight(), "key", CPU, 0.8)
    assert size.rows("auto", 512, keeping(each)) == pytest.approx(rows, abs=1)
    assert size.rows(None, 512, keeping(each)) == 512
    assert size.rows(300, 512, keeping(each)) == 300
    size.remember(64, 16)
    assert size.rows("auto", 512, keeping(each)) == 16  # what fits comes first


def test_a_measurement_that_does_not_fit_starts_small(monkeypatch):
    def full(run, device):
        raise torch.OutOfMemoryError("simulated")

    monkeypatch.setattr(sizing, "peak_bytes", full)
    monkeypatch.setattr(sizing, "free_bytes", lambda device: 10_000)
    assert ChunkSize(Tight(), "key", CUDA, 0.8).rows("auto", 512, lambda rows: None) == 6


def test_no_model_is_kept_alive_and_none_is_needed():
    model = Tight(7)
    run(ATTACKS["plain"], model)
    dead = weakref.ref(model)
    del model
    gc.collect()
    assert dead() is None
    size = ChunkSize(lambda x: x, "key", CPU, 0.8)
    size.remember(10, 5)
    assert size.rows(None, 10, lambda rows: None) == 5


def test_a_measurement_runs_few_rows_once_in_the_life_of_a_module():
    """And never of a plain callable: there would be one at every call."""
    x, y = torch.rand(64, 12), torch.zeros(64).long()
    attack, module = PGD(Linf(0.1), steps=4), Watched(model_for(x.shape))
    for model, extra in ((module, 6 + 12), (module, 0), (lambda v: module(v), 0)):
        module.inputs.clear()
        attack(model, x, y, generator=seeded())
        assert sum(module.rows) == 4 * 64 + extra


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr], ids=str)
def test_a_model_with_sparse_weights_is_measured_too(layout):
    """Sparse tensors have no storage to ask for its size."""

    class Sparse(nn.Module):
        def __init__(self):
            super().__init__()
            self.mixing, self.net = (
                torch.eye(12).flip(0).to_sparse(layout=layout),
                model_for((1, 12)),
            )

        def forward(self, x):
            return self.net((self.mixing @ x.T).T)

    x, y = torch.rand(64, 12, generator=seeded(1)), torch.zeros(64).long()
    attack, model = PGD(Linf(0.1), steps=3), Sparse()
    adv = attack(model, x, y, generator=seeded())
    assert model in sizing._KNOWN_ROWS
    assert sizing._KNOWN_ROWS[model]
    dense = attack(lambda v: model.net(v.flip(1)), x, y, generator=seeded())
    torch.testing.assert_close(adv, dense)


def test_what_a_measurement_saw_is_gone_after_it():
    """Autograd's own outputs, such as tanh's, hold the graph that they were saved for."""
    seen = []

    class Sees(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = model_for((1, 12))

        def forward(self, x):
            hidden = self.net(x).tanh()
            seen.append(weakref.ref(hidden))
            return hidden

    x, y = torch.rand(64, 12), torch.zeros(64).long()
    PGD(Linf(0.1), loss="kl", steps=2)(Sees(), x, y)
    gc.collect()
    assert len(seen) == 2 * 2 + 3
    assert all(tensor() is None for tensor in seen)
