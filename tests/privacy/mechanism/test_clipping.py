"""Clipping in its three kinds: against loops over records, and their sensitivity."""

import math

import pytest
import torch

from defend import InputError, PrivacyError
from defend.privacy.gradients.sums import per_record_norms, weighted_sum
from defend.privacy.mechanism.clipping import (
    AdaptiveClipping,
    FlatClipping,
    PerLayerClipping,
    check_clipping,
    checked_noise,
)

C = 0.7


def gradients(rows=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, *shape, generator=generator) for shape in ((4, 3), (4,), (2,))]


def clip(clipping, gradients, max_grad_norm, records=None):
    """The sums of factors · gradients and of the statistic, over the first `records` records."""
    norms = per_record_norms(gradients, grouped=clipping.grouped)
    factors = clipping.factors(norms, max_grad_norm)
    statistic = clipping.statistic(norms, max_grad_norm)
    if records is not None:
        factors[records:] = 0
    sums = weighted_sum(gradients, norms, factors)
    return sums, None if statistic is None else statistic[:records].sum()


def row_norm(row):
    return math.sqrt(sum(float((g**2).sum()) for g in row))


def rows_of(per_parameter):
    return list(zip(*per_parameter, strict=True))


def test_per_layer_equals_a_loop():
    found, count = clip(PerLayerClipping(), gradients(), C)
    assert count is None
    for k, g in enumerate(gradients()):
        expected = torch.zeros(g.shape[1:])
        for row in g:
            expected += row * min(1.0, C / math.sqrt(3) / float(row.norm()))
        torch.testing.assert_close(found[k], expected)


@pytest.mark.parametrize("clipping", [FlatClipping(), PerLayerClipping(), AdaptiveClipping()])
def test_one_record_moves_the_sum_by_at_most_the_norm(clipping):
    full = [g * 100 for g in gradients()]  # every part is clipped
    moves = []
    for i in range(9):
        without = [torch.cat([g[:i], g[i + 1 :]]) for g in full]
        both = (clip(clipping, full, C)[0], clip(clipping, without, C)[0])
        moves.append(row_norm([a - b for a, b in zip(*both, strict=True)]))
    assert max(moves) <= C * (1 + 1e-5)
    assert max(moves) >= C * 0.999  # and uses it: the bound is not loose


def test_clipping_each_layer_to_the_whole_norm_would_be_seen():
    """The planted wrong answer: without the √K a record moves the sum by √3 · C."""
    full = [g * 100 for g in gradients()]
    moves = [
        row_norm([p[0] * C / p[0].norm() for p in full]),
    ]
    assert max(moves) > C * 1.7


def test_adaptive_sums_are_flat_and_the_count_is_centred():
    full = gradients()
    sums, count = clip(AdaptiveClipping(), full, 3.5)
    expected, _ = clip(FlatClipping(), full, 3.5)
    for a, b in zip(sums, expected, strict=True):
        torch.testing.assert_close(a, b)
    below = sum(row_norm(row) <= 3.5 for row in rows_of(full))
    assert 0 < below < 9
    assert float(count) == below - 4.5


def test_padding_is_not_counted():
    full = gradients()
    for clipping in (FlatClipping(), PerLayerClipping(), AdaptiveClipping()):
        padded, count = clip(clipping, full, C, records=5)
        alone, expected = clip(clipping, [g[:5] for g in full], C)
        for a, b in zip(padded, alone, strict=True):
            torch.testing.assert_close(a, b)
        assert (count is None and expected is None) or float(count) == float(expected)


def test_a_broken_record_adds_nothing_and_counts_as_clipped():
    full = gradients()
    full[1][2] = torch.nan
    sums, count = clip(AdaptiveClipping(), full, 1e9)
    assert all(s.isfinite().all() for s in sums)
    assert float(count) == 8 - 4.5


@pytest.mark.parametrize("sigma", [0.5, 1.0, 3.0])
def test_gradient_and_count_together_cost_what_sigma_costs(sigma):
    clipping = AdaptiveClipping(count_noise=5.0)
    rest, deviation = clipping.noise(sigma, 100.0)
    assert rest > sigma
    assert deviation == 5.0
    # Gaussians on one record's change (C in the gradient, 1/2 in the count): 1/σ² adds up.
    assert rest**-2 + (0.5 / 5.0) ** 2 == pytest.approx(sigma**-2)


def test_the_default_count_noise_always_leaves_a_budget():
    for sigma in (0.1, 1.0, 50.0):
        for batch in (1.0, 64.0, 4096.0):
            assert math.isfinite(AdaptiveClipping().noise(sigma, batch)[0])
    assert AdaptiveClipping().noise(1.0, 4096.0)[1] == 4096 / 20


def test_the_norm_finds_the_quantile():
    """Without noise, on fixed norms, C goes to the asked quantile of them."""
    norms = torch.linspace(0.1, 10, 1000)
    for quantile in (0.2, 0.5, 0.9):
        clipping, norm = AdaptiveClipping(target_quantile=quantile), 0.01
        for _ in range(600):
            norm = clipping.update(norm, float((norms <= norm).float().sum() - 500), 1000.0)
        assert norm == pytest.approx(float(norms.quantile(quantile)), rel=0.02)


def test_the_norm_stays_within_its_bounds():
    clipping = AdaptiveClipping(smallest=0.5, largest=2.0)
    assert clipping.update(0.6, 1e6, 10.0) == pytest.approx(0.5)
    assert clipping.update(1.9, -1e6, 10.0) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_quantile": 1.0}, "`target_quantile` to be in"),
        ({"learning_rate": 0.0}, "`learning_rate` to be > 0, got 0.0"),
        ({"count_noise": -1.0}, "`count_noise` to be > 0, got -1.0"),
        ({"smallest": 2.0, "largest": 1.0}, "0 < `smallest` < `largest`"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(InputError, match=message):
        AdaptiveClipping(**settings)


def test_too_little_count_noise_is_refused():
    with pytest.raises(InputError, match=r"`count_noise` above noise_multiplier / 2 = 2"):
        AdaptiveClipping(count_noise=1.9).noise(4.0, 100.0)


def test_only_the_three_are_known():
    with pytest.raises(InputError, match=r"FlatClipping.*got 'flat'"):
        check_clipping("flat")


class Telling(FlatClipping):
    """Releases a statistic, and says nothing of its noise."""

    def statistic(self, norms, max_grad_norm):
        return norms.clamp(max=1.0)


def test_a_statistic_without_noise_is_refused():
    with pytest.raises(PrivacyError, match=r"Telling.noise to give its statistic a deviation > 0"):
        checked_noise(Telling(), 1.0, 16)
    assert checked_noise(Telling(), 0.0, 16) == (0.0, 0.0)  # a step without any
    assert checked_noise(FlatClipping(), 1.0, 16) == (1.0, 0.0)
    assert checked_noise(AdaptiveClipping(), 1.0, 16)[1] > 0


class Loose(FlatClipping):
    def factors(self, norms, max_grad_norm):
        return 10 * super().factors(norms, max_grad_norm)


class Relative(FlatClipping):
    def factors(self, norms, max_grad_norm):
        return (max_grad_norm / norms.max()).expand_as(norms)


class LooseByLayer(PerLayerClipping):
    """Each parameter to C: together they reach √K · C."""

    def factors(self, norms, max_grad_norm):
        return super().factors(norms, max_grad_norm * norms.shape[1] ** 0.5)


class Column(FlatClipping):
    def factors(self, norms, max_grad_norm):
        return super().factors(norms, max_grad_norm).unsqueeze(1)


@pytest.mark.parametrize("rule", [Loose(), Relative(), LooseByLayer()], ids=lambda r: str(type(r)))
def test_a_rule_that_does_not_bound_a_record_is_refused(rule):
    with pytest.raises(PrivacyError, match=f"{type(rule).__name__}.factors to bring each record"):
        check_clipping(rule)


def test_a_rule_of_another_shape_is_refused_and_a_sound_one_is_not():
    with pytest.raises(InputError, match=r"one factor for each norm, shape \(9,\), got \(9, 1\)"):
        check_clipping(Column())

    class Soft(FlatClipping):
        """g · C / (‖g‖ + 0.01) (automatic clipping, Bu et al. 2023, arXiv 2206.07136)."""

        def factors(self, norms, max_grad_norm):
            return max_grad_norm / (norms + 0.01)

    for rule in (Soft(), FlatClipping(), PerLayerClipping(), AdaptiveClipping()):
        check_clipping(rule)
