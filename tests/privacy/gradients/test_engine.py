"""What every gradient engine promises: norms and weighted sums, as a loop over records has them."""

import math

import pytest
import torch
from torch import nn

from defend.errors import PrivacyError
from defend.privacy import FlatClipping, PerLayerClipping, clip_and_sum
from defend.privacy.gradients.one_record import OneRecord
from defend.privacy.gradients.per_record import PerRecordGradients

from .alone import each_alone, loss, targets

ROWS, C = 5, 0.3


class Chunked:
    """An engine that takes one record a chunk, over all chunks of a batch."""

    def __init__(self, module):
        self.engine, self.module = OneRecord(module), module
        self.parameters = self.engine.parameters

    def expect(self, rows):
        self.rows = rows

    def each(self, ask):
        """What `ask` gives for the engine after the backward of each record."""
        for i in range(self.rows):
            self.engine.clear()
            self.engine.expect(1)
            loss(self.module, self.x[i : i + 1], self.y[i : i + 1]).backward()
            yield ask(self.engine, i)

    def norms(self, rows, *, grouped):
        self.grouped = grouped
        return torch.cat([*self.each(lambda engine, _: engine.norms(1, grouped=grouped))])

    def weighted_sum(self, factors):
        def ask(engine, i):
            engine.norms(1, grouped=self.grouped)
            return engine.weighted_sum(factors[i : i + 1])

        return [sum(parts) for parts in zip(*self.each(ask), strict=True)]

    def clear(self):
        self.engine.clear()

    def remove(self):
        self.engine.remove()


ENGINES = {"materializing": PerRecordGradients, "one record": Chunked}


def watched(kind, spoil=None):
    """An engine after a backward, and the gradients of records, each from a batch of its own."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.randn(ROWS, 6), targets(ROWS)
    expected = each_alone(module, x, y)
    if spoil is not None:
        x[spoil] = math.nan
    engine = ENGINES[kind](module)
    engine.expect(ROWS)
    engine.x, engine.y = x, y
    loss(module, x, y).backward()
    return engine, expected


def squares(gradients):
    """‖gᵢₖ‖² of record i and parameter k, by the definition."""
    return torch.stack([g.flatten(1).square().sum(1) for g in gradients], dim=1)


@pytest.mark.parametrize("kind", ENGINES)
def test_norms_over_all_parameters_and_of_each(kind):
    engine, expected = watched(kind)
    torch.testing.assert_close(engine.norms(ROWS, grouped=True), squares(expected).sqrt())
    together = engine.norms(ROWS, grouped=False)
    torch.testing.assert_close(together, squares(expected).sum(1).sqrt())
    engine.remove()


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("kind", ENGINES)
def test_the_weighted_sum(kind, grouped):
    engine, expected = watched(kind)
    norms = engine.norms(ROWS, grouped=grouped)
    factors = torch.rand(norms.shape, generator=torch.Generator().manual_seed(1))
    columns = factors.T if grouped else [factors] * len(expected)
    for total, g, column in zip(engine.weighted_sum(factors), expected, columns, strict=True):
        torch.testing.assert_close(total, torch.einsum("n...,n->...", g, column))
    engine.remove()


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("kind", ENGINES)
def test_a_record_without_a_finite_norm_adds_nothing_whatever_its_factor(kind, grouped):
    engine, expected = watched(kind, spoil=2)
    norms = engine.norms(ROWS, grouped=grouped)
    keep = [0, 1, 3, 4]
    for total, g in zip(engine.weighted_sum(torch.ones_like(norms)), expected, strict=True):
        torch.testing.assert_close(total, g[keep].sum(0))
    engine.remove()


def test_the_sums_are_those_of_the_reference_bit_for_bit():
    engine, _ = watched("materializing")
    gradients = engine.read(ROWS)
    norms = engine.norms(ROWS, grouped=False)
    found = engine.weighted_sum(FlatClipping().factors(norms, C))
    assert all(map(torch.equal, found, clip_and_sum(gradients, C)))
    factors = PerLayerClipping().factors(engine.norms(ROWS, grouped=True), C)
    share = C / math.sqrt(len(gradients))
    one_by_one = [clip_and_sum([g], share)[0] for g in gradients]
    assert all(map(torch.equal, engine.weighted_sum(factors), one_by_one))
    engine.remove()


@pytest.mark.parametrize("kind", ENGINES)
def test_paused_cleared_and_removed(kind):
    engine, expected = watched(kind)
    first = engine.norms(ROWS, grouped=False)
    engine.clear()
    module = nn.ParameterList(engine.parameters.values())
    assert all(p.grad is None for p in module)
    torch.testing.assert_close(first, squares(expected).sum(1).sqrt())
    engine.remove()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_one_record_takes_the_mean_of_its_views_and_nothing_of_what_ran_while_paused(reduction):
    torch.manual_seed(0)
    module, x, y = nn.Linear(6, 3), torch.randn(3, 6), targets(3)
    engine = OneRecord(module, views=3, loss_reduction=reduction)
    with pytest.raises(PrivacyError, match="Expected 3 rows, those of one record, got 2"):
        engine.expect(2)
    engine.expect(3)
    (loss(module, x, y) * (3 if reduction == "sum" else 1)).backward()
    with engine.paused():
        loss(module, 5 * x, y).backward()
    assert engine.norms(3, grouped=True).shape == (1, 2)
    expected = torch.autograd.grad(loss(module, x, y), [*module.parameters()])
    for found, gradient in zip(engine.weighted_sum(torch.ones(1, 2)), expected, strict=True):
        torch.testing.assert_close(found, gradient)
    engine.remove()
    assert all(p.grad is None for p in module.parameters())
