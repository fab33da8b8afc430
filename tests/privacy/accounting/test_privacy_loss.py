import math

import numpy as np
import pytest
from scipy.fft import irfft
from scipy.optimize import brentq
from scipy.stats import norm

from defend import PrivacyError
from defend.privacy.accounting import privacy_loss as losses

DELTA = 1e-5


@pytest.mark.parametrize("sigma", [0.2, 0.8, 3.0, 20.0])
@pytest.mark.parametrize("rate", [1e-5, 0.1, 1.0])
def test_renyi_divergences_are_those_of_opacus(sigma, rate):
    from opacus.accountants.analysis.rdp import compute_rdp

    reference = compute_rdp(q=rate, noise_multiplier=sigma, steps=1, orders=list(losses.ORDERS))
    np.testing.assert_allclose(losses.renyi(sigma, rate), reference, rtol=1e-8, atol=3e-12)
    if rate > 1e-5 or sigma < 20:  # where more than rounding is left to compare
        assert not np.allclose(losses.renyi(sigma, 0.95 * rate), reference, rtol=1e-8, atol=3e-12)


def test_renyi_divergences_with_hardly_any_noise_are_bounds():
    from opacus.accountants.analysis.rdp import compute_rdp

    reference = compute_rdp(q=0.1, noise_multiplier=0.05, steps=1, orders=list(losses.ORDERS))
    whole = losses.ORDERS % 1 == 0
    ours = losses.renyi(0.05, 0.1)
    np.testing.assert_allclose(ours[whole], reference[whole], rtol=1e-10)
    assert (ours >= reference * (1 - 1e-12)).all()


SMALL_TO_LARGE = np.unique(
    np.concatenate(
        [np.logspace(-323, -150, 40), np.logspace(-150, -3, 60), np.linspace(0.005, 0.15, 60),
         np.logspace(-1, 9, 60), np.logspace(10, 308, 20)]
    )
)  # fmt: skip


@pytest.mark.parametrize("rate", [1e-6, 0.01, 0.5, 1.0])
@pytest.mark.filterwarnings("error")
def test_divergences_never_rise_with_the_noise_and_are_never_nan(rate):
    found = np.array([losses.renyi(float(sigma), rate) for sigma in SMALL_TO_LARGE])
    assert not np.isnan(found).any()
    assert np.isinf(found[SMALL_TO_LARGE <= 1e-150]).all()
    assert np.isfinite(found[SMALL_TO_LARGE > 1e-150]).all()
    # Up to rounding of the quadrature, which is absolute where little is left.
    rises = (found[1:] > found[:-1] * (1 + 1e-9) + 1e-13).any(1)
    assert not rises.any(), SMALL_TO_LARGE[:-1][rises]
    # The binomial sum alone fails the same two checks.
    with np.errstate(all="ignore"):
        assert rate == 1 or np.isnan(losses._log_moments_of_integers(1e-170, rate)).any()


@pytest.mark.parametrize("sigma", [1e-100, 1e-3, 0.0099])
def test_with_the_least_noise_the_unsampled_divergence_is_the_bound(sigma):
    for rate in (1e-3, 0.3):
        unsampled = [alpha / 2 / sigma / sigma for alpha in losses.ORDERS]
        np.testing.assert_allclose(losses.renyi(sigma, rate), unsampled, rtol=1e-12)
        # A slow sum in logarithms is below it, and not by much at the highest order.
        alpha = 63
        terms = [
            math.log(math.comb(alpha, k)) + k * math.log(rate) + (alpha - k) * math.log1p(-rate)
            + (k * k - k) / 2 / sigma / sigma
            for k in range(alpha + 1)
        ]  # fmt: skip
        exact = max(terms) / (alpha - 1)  # the others are nothing beside it
        assert unsampled[-1] * 0.99 < exact <= unsampled[-1]


def test_nan_is_not_mistaken_for_nothing_spent():
    divergences = losses.renyi(1.0, 0.1).copy()
    assert losses.epsilon_from_renyi(divergences, DELTA) > 0
    divergences[3] = math.nan
    with pytest.raises(PrivacyError, match="divergences that are numbers, got NaN"):
        losses.epsilon_from_renyi(divergences, DELTA)


def test_loss_and_its_inverse():
    x = np.linspace(-5, 9, 57)
    for sigma, rate in [(1.0, 0.1), (0.4, 1e-3), (3.0, 1.0)]:
        density = norm.pdf(x, 0, sigma)
        ratio = (1 - rate) + rate * norm.pdf(x, 1, sigma) / density
        t = losses._loss(x, sigma, rate)
        np.testing.assert_allclose(t, np.log(ratio), rtol=1e-9, atol=1e-12)
        clear = t > math.log1p(-rate) + 1e-3 if rate < 1 else t > -math.inf
        np.testing.assert_allclose(losses._inverse_loss(t, sigma, rate)[clear], x[clear], atol=1e-6)


def test_composition_on_the_ring_against_plain_convolution():
    sigma, rate, width, cells, steps = 1.0, 0.3, 0.01, 3000, 5
    spectrum, shift = losses.spectrum(sigma, rate, width, cells)
    one = np.roll(irfft(spectrum, cells), cells // 2)
    np.testing.assert_allclose(one.sum(), 1)
    t = (np.arange(cells) - cells // 2) * width
    # By definition, cell by cell, and n-fold.
    mass, start = one, t[0]
    for _ in range(steps - 1):
        mass, start = np.convolve(mass, one), start + t[0]
    t = start + np.arange(len(mass)) * width + steps * shift

    def excess(eps):
        return float((mass * np.maximum(0, 1 - np.exp(eps - t))).sum()) - DELTA

    truth = brentq(excess, 0, 14, xtol=1e-12)
    ring = (cells, width, steps * shift, DELTA)
    assert losses._from_cells(spectrum**steps, *ring, -1.0) == pytest.approx(truth, abs=1e-8)
    assert losses._from_band(spectrum**steps, *ring, -1.0, 14.0) == pytest.approx(truth, abs=1e-8)
    # Four steps are told from five, and the shift of the mean matters.
    assert abs(losses._from_cells(spectrum**4, *ring, -1.0) - truth) > 0.1
    unshifted = losses._from_cells(spectrum**steps, cells, width, 0.0, DELTA, -1.0)
    assert abs(unshifted - truth) == pytest.approx(abs(steps * shift), rel=0.1)
    # The ends: below `low`, and beyond the ring.
    assert losses._from_cells(spectrum, cells, width, 0.0, 0.9, -1.0) == -1.0
    assert losses._from_band(spectrum, cells, width, 0.0, 0.9, -1.0, 14.0) == -1.0
    assert losses._from_band(spectrum**steps, *ring, -1.0, truth - 0.1) == math.inf
