"""Norms and weighted sums of gradients of any size and shape, to the digits that are promised."""

import itertools
import math

import pytest
import torch

from defend.privacy import AdaptiveClipping, FlatClipping, PerLayerClipping
from defend.privacy.gradients import sums
from defend.privacy.gradients.sums import per_record_norms, weighted_sum

NORM = 8.4e-7  # what a norm may be off by, and
RECORD = 1e-6  # how far beyond C the sum of a clipped record may be: relative
DTYPES = [torch.bfloat16, torch.float32, torch.float64]
RULES = [FlatClipping(), PerLayerClipping(), AdaptiveClipping()]


def true_norms(*gradients):
    """Slow and obvious: squares added without rounding, number by number."""
    rows = zip(*(g.reshape(len(g), -1).double().tolist() for g in gradients), strict=True)
    return [math.sqrt(math.fsum(v * v for part in row for v in part)) for row in rows]


def off(found, expected):
    """The largest relative error."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    return float(((found.double() - expected) / expected).abs().max())


def one_sum(gradients):
    """The planted wrong answer: all squares of a parameter added up in float32."""
    rows = torch.stack([torch.linalg.vector_norm(g.flatten(1), dim=1) for g in gradients], dim=1)
    return torch.linalg.vector_norm(rows, dim=1)


# --- what a gradient may hold ---------------------------------------------------------------------


def equal(count):
    return torch.full((2, count), 0.1)


def random(count):
    return torch.randn(2, count, generator=torch.Generator().manual_seed(count))


def one_large(count, block=sums._BLOCK):
    """The first of each block is 1, and the square of no other is half a unit in its last place."""
    row = torch.full((2, count), 0.9999 * 2.0**-12)
    row[:, ::block] = 1.0
    return row


def some_large(count):
    """The same, of as many sums as may be added side by side, in a block of the other size."""
    row = torch.full((2, count), 0.9999 * 2.0**-12)
    for first in range(16):
        row[:, first :: sums._BLOCK_SIDE_BY_SIDE] = 1.0
    return row


def wide(count):
    """Twelve orders of magnitude."""
    return 10.0 ** torch.linspace(-6, 6, count).repeat(2, 1)


def last(count):
    """All but the last are nearly nothing."""
    row = torch.full((2, count), 1e-12)
    row[:, -1] = 3.0
    return row


def one_large_side_by_side(count):
    return one_large(count, sums._BLOCK_SIDE_BY_SIDE)


KINDS = [equal, random, one_large, one_large_side_by_side, some_large, wide, last]
LAYOUTS = {
    "rows": lambda g: g,
    "every other": lambda g: torch.stack([g, g + 1], dim=2)[:, :, 0],  # summed one by one
    "records last": lambda g: g.T.contiguous().T,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_norms_of_any_numbers_in_any_layout(kind, dtype, layout):
    for count in (1, 2, 49, 512, 513, 575, 576, 577, 1000, 4801):
        g = LAYOUTS[layout](kind(count).to(dtype))
        found = per_record_norms([g])
        assert found.dtype == torch.promote_types(dtype, torch.float32)
        assert off(found, true_norms(g)) < (NORM if dtype != torch.float64 else 1e-14)


@pytest.mark.parametrize("grouped", [False, True])
def test_norms_of_parameters_of_any_shape(grouped):
    shapes = [(), (1,), (7,), (5, 5), (2, 3, 4), (1, 1, 600), (0,), (3, 0), ()]
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(4, *shape, generator=generator) for shape in shapes]
    found = per_record_norms(gradients, grouped=grouped)
    if not grouped:
        assert found.shape == (4,)
        assert off(found, true_norms(*gradients)) < NORM
        return
    assert found.shape == (4, len(shapes))
    for column, g in zip(found.T, gradients, strict=True):
        if g.numel():
            assert off(column, true_norms(g)) < NORM
        else:
            assert torch.equal(column, torch.zeros(4))


def test_blocks_may_be_summed_one_by_one_and_larger_ones_may_not(monkeypatch):
    """What lies apart is summed one after another: there is no worse order."""
    g = LAYOUTS["every other"](one_large(9600))
    assert 4e-7 < off(per_record_norms([g]), true_norms(g)) < NORM
    monkeypatch.setattr(sums, "_BLOCK", 64)
    g = LAYOUTS["every other"](one_large(9600, 64))
    assert off(per_record_norms([g]), true_norms(g)) > 1.5e-6


def test_blocks_side_by_side_are_summed_several_at_a_time(monkeypatch):
    """So they may be larger, but not as large as one likes."""
    g = equal(2**22)
    assert off(per_record_norms([g]), [float(g[0, 0]) * 2**11] * 2) < NORM
    monkeypatch.setattr(sums, "_BLOCK_SIDE_BY_SIDE", 2**16)
    assert off(per_record_norms([g]), [float(g[0, 0]) * 2**11] * 2) > 2e-6


# --- how many there may be ------------------------------------------------------------------------


@pytest.mark.parametrize("power", [20, 23, 26])
def test_equal_weights_in_one_parameter(power):
    """In memory, as a layer's gradient is."""
    g = torch.full((1, 2**power), 0.1)
    expected = [float(g[0, 0]) * 2.0 ** (power / 2)]
    assert off(per_record_norms([g]), expected) < NORM
    if power == 26:
        assert off(one_sum([g]), expected) > 1e-3


def test_a_billion_weights():
    """2³⁰ of them, of four megabytes that are read again and again."""
    g = torch.full((1, 2**20), 0.1)
    found = per_record_norms([g] * 2**10)
    assert off(found, [float(g[0, 0]) * 2.0**15]) < NORM


def test_tens_of_millions_in_one_parameter_that_lie_nowhere():
    """Stride 0: no two of them are summed side by side."""
    g = torch.full((1, 1), 0.1).expand(1, 2**24)
    expected = [float(g[0, 0]) * 2.0**12]
    assert off(per_record_norms([g]), expected) < NORM
    assert off(one_sum([g]), expected) > 1e-3


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("count", "place"), [(1, 0), (49, 20), (601, 0), (601, 575), (601, 600)])
def test_a_broken_number_is_found_wherever_it_is(value, count, place):
    g = random(count)
    g[1, place] = value
    assert per_record_norms([g]).isfinite().tolist() == [True, False]


# --- a clipped record -----------------------------------------------------------------------------


def parameters_of(g):
    """Cut into a scalar, a vector and a matrix."""
    rest = g[:, 1:]
    half = rest.shape[1] // 2
    return [g[:, 0], rest[:, :half], rest[:, half:].unsqueeze(1)]


def entered(rule, gradients, bound):
    """The norm of what each record adds to the sum, by itself."""
    norms = per_record_norms(gradients, grouped=rule.grouped)
    factors = rule.factors(norms, bound)
    for i in range(len(norms)):
        alone = factors.clone()
        alone[torch.arange(len(norms)) != i] = 0
        total = weighted_sum(gradients, norms, alone)
        yield true_norms(*(t.unsqueeze(0) for t in total))[0]


@pytest.mark.parametrize("rule", RULES, ids=lambda r: type(r).__name__)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_no_record_enters_with_more_than_the_bound(kind, dtype, rule):
    generator = torch.Generator().manual_seed(0)
    for count, layout in itertools.product((3, 500, 1301, 5001), ("rows", "every other")):
        gradients = parameters_of(LAYOUTS[layout](kind(count).to(dtype)))
        true = min(true_norms(*gradients))
        for share in (10.0 ** torch.empty(4).uniform_(-6, 0, generator=generator)).tolist():
            bound = share * true
            moved = list(entered(rule, gradients, bound))
            assert max(moved) <= bound * (1 + RECORD)
            if not rule.grouped:
                assert min(moved) >= bound * (1 - RECORD)  # and nothing is given away


@pytest.mark.parametrize("rule", RULES, ids=lambda r: type(r).__name__)
def test_an_unclipped_record_enters_as_it_is(rule):
    gradients = parameters_of(random(1001))
    norms = per_record_norms(gradients, grouped=rule.grouped)
    bound = 2 * float(norms.max()) * math.sqrt(3)
    factors = rule.factors(norms, bound)
    assert torch.equal(factors, torch.ones_like(norms))
    for total, g in zip(weighted_sum(gradients, norms, factors), gradients, strict=True):
        torch.testing.assert_close(total, g.sum(0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rule", RULES, ids=lambda r: type(r).__name__)
def test_millions_of_weights_enter_with_the_bound_and_no_more(rule):
    """The planted norms, of one sum in float32, let more of them in."""
    g = torch.full((1, 2**24), 0.1)
    true, bound = float(g[0, 0]) * 2.0**12, 0.3
    for norms, beyond in ((per_record_norms([g]), False), (one_sum([g]), True)):
        shaped = norms.unsqueeze(1) if rule.grouped else norms
        moved = float(rule.factors(shaped, bound)) * true
        assert (moved > bound * (1 + 1e-3)) == beyond
        assert beyond or moved <= bound * (1 + RECORD)


def test_the_count_of_unclipped_records_follows_the_true_norm():
    for count in (1000, 2**22):
        g = torch.full((1, count), 0.1)
        true = float(g[0, 0]) * math.sqrt(count)
        norms = per_record_norms([g])
        for bound, counted in ((true * (1 + RECORD), 0.5), (true * (1 - RECORD), -0.5)):
            assert AdaptiveClipping().statistic(norms, bound).tolist() == [counted]


@pytest.mark.parametrize("rule", RULES, ids=lambda r: type(r).__name__)
@pytest.mark.parametrize("value", [1e10, 1e19, 1e30, 3.4e38])
def test_a_record_of_any_size_enters_with_the_bound_or_not_at_all(value, rule):
    """A square that float32 cannot hold is infinite; a number by itself is not squared."""
    for count, place in ((49, 0), (49, 48), (2001, 20), (2001, 1020), (2001, 2000), (1, 0)):
        g = random(count)
        g[1, place] = value
        gradients = parameters_of(g) if count > 1 else [g[:, 0]]
        for bound in (0.1, 1e-6, 1e-7):
            assert max(entered(rule, gradients, bound)) <= bound * (1 + RECORD)


def test_factors_are_rounded_down():
    generator = torch.Generator().manual_seed(0)
    norms = 10.0 ** torch.empty(20_000).uniform_(-12, 38.5, generator=generator)
    for bound in (1e-9, 1e-6, 0.1, 1 / 3, 1.0, math.pi, 1e6):
        factors = FlatClipping().factors(norms, bound)
        reached = factors.double() * norms.double()
        assert float(reached.max()) <= bound * (1 + 1e-15)
        assert torch.equal(factors == 1, norms.double() <= bound)
        ordinary = (norms > bound) & (factors > 1e-37)
        assert float(reached[ordinary].min()) >= bound * (1 - 2.0**-23)
        # The planted wrong answer: one expression in float32.
        careless = (bound / norms.clamp_min(bound)).double() * norms.double()
        assert float(careless.max()) > bound * (1 + 2.0**-24)
