"""The privacy loss of one step of the Poisson-subsampled Gaussian mechanism, and ε from a loss.

One step with noise σ and rate q has the privacy loss

    t(x) = log(1 − q + q·exp((2x − 1) / 2σ²)),    x ~ (1 − q)·N(0, σ²) + q·N(1, σ²),

that of removing a record. For RDP, and so for its composition, this is proven to be the larger of
both directions (Mironov et al. 2019), and so it is for one step at every ε ≥ 0. For PRV under
composition it is taken as in Opacus and in Gopi et al. 2021, without a proof of our own: the tests
compare with an accountant that takes the larger of both. The loss is held in two forms, and each
gives an ε:

- RDP (Mironov et al. 2019, arXiv 1908.10530): log E[exp((α − 1)·t)] for some orders α.
- PRV (Gopi et al. 2021, arXiv 2106.02848): its law on a mesh, as a Fourier transform.

How losses compose is in `curve`.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np

from defend.errors import PrivacyError

Array = np.ndarray[Any, Any]

# Those of Opacus, so that its "rdp" gives the same numbers.
ORDERS = np.array([1 + i / 10 for i in range(1, 100)] + list(range(12, 64)))
NO_NOISE = 1e-150  # at and below it σ² is lost among the smallest floats: ε = ∞
MOST_NOISE = 1e9  # more is counted as this: σ² would overflow one day, and nothing is gained
_LEAST_NOISE_FOR_QUADRATURE = 0.1
_LEAST_NOISE_FOR_SAMPLING = 0.01  # ε is in the thousands: sampling no longer helps


def _loss(x: Array, sigma: float, rate: float) -> Array:
    """t(x), exact also where q is small or exp would overflow."""
    z = (2 * x - 1) / (2 * sigma**2)
    if rate == 1:
        return z
    small = np.log1p(rate * np.expm1(np.minimum(z, 30.0)))
    return np.where(z < 30, small, np.logaddexp(z + math.log(rate), math.log1p(-rate)))


def _inverse_loss(t: Array, sigma: float, rate: float) -> Array:
    """x(t); −∞ at and below log(1 − q), where there is no mass."""
    with np.errstate(all="ignore"):
        z = np.log1p(np.expm1(np.minimum(t, 30.0)) / rate)
    z[np.isnan(z)] = -np.inf
    far = t > 30
    z[far] = t[far] - math.log(rate) + np.log1p((rate - 1) * np.exp(-t[far]))
    return sigma**2 * z + 0.5


# --- Rényi divergences --------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def renyi(sigma: float, rate: float) -> Array:
    """The Rényi divergence D(α) = log E[exp((α − 1)·t)] / (α − 1) at each of `ORDERS`.

    As (α − 1)·D(α) is convex in α and 0 at 1, a straight line between integers bounds it from
    above: used for tiny σ, where the mesh of the fractional orders would have to be too fine. So
    does α / (2σ²), the divergence of q = 1: the only one for σ < 0.01, whose square underflows
    later. Both fall as σ grows, and so does what is returned.

    Args:
        sigma: noise multiplier σ ≥ 0.
        rate: sample rate q in [0, 1].

    Returns:
        One divergence ≥ 0 an order; 0 where q = 0, inf where σ ≤ 1e-150. σ above 1e9 counts as
        1e9.
    """
    if rate == 0 or sigma <= NO_NOISE:
        return np.full(len(ORDERS), 0.0 if rate == 0 else np.inf)
    sigma = min(sigma, MOST_NOISE)
    unsampled = ORDERS / (2 * sigma**2)
    if rate == 1 or sigma < _LEAST_NOISE_FOR_SAMPLING:
        return unsampled
    result = np.interp(ORDERS, np.arange(1, 64), _log_moments_of_integers(sigma, rate))
    if sigma >= _LEAST_NOISE_FOR_QUADRATURE:
        fractional = ORDERS % 1 != 0
        result[fractional] = _log_moments(ORDERS[fractional], sigma, rate)
    return np.minimum(result / (ORDERS - 1), unsampled)


def _log_moments_of_integers(sigma: float, rate: float) -> Array:
    """log E[exp((α − 1)·t)] for α = 1, …, 63 by the binomial sum."""
    from scipy.special import gammaln, logsumexp

    whole = np.arange(1, 64)[:, None]
    k = np.arange(64)[None, :]
    with np.errstate(over="ignore"):
        binomial = gammaln(whole + 1) - gammaln(k + 1) - gammaln(np.maximum(whole - k, 0) + 1)
        terms = binomial + k * math.log(rate) + (whole - k) * math.log1p(-rate)
        terms = terms + (k * k - k) / (2 * sigma**2)
    log_a = logsumexp(np.where(k <= whole, terms, -np.inf), axis=1)
    log_a[0] = 0.0
    return np.maximum(log_a, 0.0)


def _log_moments(orders: Array, sigma: float, rate: float) -> Array:
    """The same for any orders by the trapezoidal rule.

    It is exact to rounding for a smooth integrand that dies out on both sides.
    """
    from scipy.special import logsumexp

    # Poles of the integrand lie at a distance of πσ² from the axis.
    width = min(sigma / 4, 0.4 * sigma**2)
    x = np.arange(-13 * sigma, 11 + 13 * sigma, width)
    log_weights = -((x / sigma) ** 2) / 2 + math.log(width / sigma / math.sqrt(2 * math.pi))
    exponent = orders[:, None] * _loss(x, sigma, rate)
    if exponent.max() > 1:
        integral = logsumexp(log_weights + exponent, axis=1)
    else:  # E − 1 is tiny: do not lose it beside 1
        integral = np.log1p((np.exp(log_weights) * np.expm1(exponent)).sum(1))
    return np.maximum(integral, 0.0)


def epsilon_from_renyi(divergences: Array, delta: float) -> float:
    """The ε of a loss at δ: the least over the orders α of what D(α) certifies.

    Args:
        divergences: D(α) at each of `ORDERS`.
        delta: δ in (0, 1).

    Returns:
        ε ≥ 0, inf where all divergences are.

    Raises:
        PrivacyError: if a divergence is NaN.

    Source: Balle et al. 2020, arXiv 1905.09982, Thm. 21.
    """
    slack = np.log1p(-1 / ORDERS) - (math.log(delta) + np.log(ORDERS)) / (ORDERS - 1)
    least = float((divergences + slack).min())
    if math.isnan(least):  # max(0.0, NaN) is 0.0
        raise PrivacyError(
            "Expected Rényi divergences that are numbers, got NaN, which bounds no ε. Check σ and q"
            " of the history, and report them."
        )
    return max(0.0, least)


# --- the law on a mesh --------------------------------------------------------------------------


def spectrum(sigma: float, rate: float, width: float, cells: int) -> tuple[Array, float]:
    """Fourier transform of one step's loss, rounded to multiples of `width`, and its mean shift.

    Cell j of a ring of `cells` holds the mass of ((j ± ½)·width), the ring's second half being
    negative. The shift is what rounding took from the mean; adding it back is what makes the
    error of a sum of n losses grow with √n only.

    Args:
        sigma: noise multiplier σ > 0.
        rate: sample rate q in (0, 1].
        width: of a cell, in units of the loss, > 0.
        cells: of the ring; what lies beyond it is cut off.

    Returns:
        The transform, cells // 2 + 1 complex numbers; the shift, in units of the loss.
    """
    from scipy.fft import rfft
    from scipy.special import ndtr

    half = cells // 2
    x = _inverse_loss((np.arange(-half, cells - half + 1) - 0.5) * width, sigma, rate)
    # Differences of the smaller tail: 1 − (something tiny) would lose the tail that matters.
    middle = int(np.searchsorted(x, 0.5))
    low, high = x[: middle + 1], x[middle:]
    below = (1 - rate) * ndtr(low / sigma) + rate * ndtr((low - 1) / sigma)
    above = (1 - rate) * ndtr(-high / sigma) + rate * ndtr((1 - high) / sigma)
    mass = np.concatenate([np.diff(below), -np.diff(above)])
    mass /= mass.sum()
    centers = np.arange(-half, cells - half) * width
    shift = _mean(x[0], x[-1], sigma, rate) - float(centers @ mass)
    return rfft(np.roll(mass, -half)), shift


def _mean(low: float, high: float, sigma: float, rate: float) -> float:
    """The true mean of the loss between x = `low` and `high`, by the trapezoidal rule in x."""
    step = min(sigma / 8, 0.2 * sigma**2)
    x = np.arange(max(low, -14 * sigma), min(high, 1 + 14 * sigma) + step, step)
    weights = (1 - rate) * np.exp(-((x / sigma) ** 2) / 2)
    weights += rate * np.exp(-(((x - 1) / sigma) ** 2) / 2)
    return float((weights * _loss(x, sigma, rate)).sum() / weights.sum())


def epsilon_from_spectrum(
    transform: Array, cells: int, width: float, shift: float, delta: float, low: float, high: float
) -> float:
    """The ε ≥ `low` with Σ_{t > ε} p(t)·(1 − exp(ε − t)) = δ for a loss t of law p.

    Args:
        transform: the lowest frequencies of p, or all; the others are taken for nothing.
        cells: of the ring of p.
        width: of a cell, in units of the loss.
        shift: what to add to the loss in each cell.
        delta: δ in (0, 1).
        low: the least answer of interest.
        high: an upper bound on the answer, inf for none.

    Returns:
        ε; `low` where the sum is below δ there already, inf where no ε is large enough.
    """
    if len(transform) > cells / 32:
        return _from_cells(transform, cells, width, shift, delta, low)
    return _from_band(transform, cells, width, shift, delta, low, high)


def _from_cells(
    transform: Array, cells: int, width: float, shift: float, delta: float, low: float
) -> float:
    """From p itself, by sums over all cells."""
    from scipy.fft import irfft

    end = cells - cells // 2
    first = max(end - cells, math.floor((low - shift) / width) + 1)
    mass = irfft(transform, cells)
    mass = mass[first:end] if first >= 0 else np.concatenate([mass[first:], mass[:end]])
    t = np.arange(first, end) * width + shift
    # Sums over all cells from i on.
    plain = np.cumsum(mass[::-1])[::-1]
    tilted = np.cumsum((mass * np.exp(-t))[::-1])[::-1]
    over = np.flatnonzero(plain - np.exp(t) * tilted > delta)
    i = int(over[-1]) + 1 if len(over) else 0
    if i == len(t):
        return math.inf
    if plain[i] <= delta or tilted[i] <= 0:  # for i > 0 by rounding only
        return max(low, float(t[i])) if i else low
    return float(np.clip(math.log((plain[i] - delta) / tilted[i]), max(low, t[i] - width), t[i]))


def _from_band(
    transform: Array, cells: int, width: float, shift: float, delta: float, low: float, high: float
) -> float:
    """From the frequencies, without p: a sum of many losses leaves a thousand of a million.

    For each frequency z the sum over cells is that of two geometric series, of z and of
    z·exp(−width).
    """
    from scipy.optimize import brentq

    end = cells - cells // 2  # one past the last cell
    turn = 2j * math.pi / cells * np.arange(1, len(transform))
    plain = 2 * transform[1:] / -np.expm1(turn)
    tilted = 2 * transform[1:] / -np.expm1(turn - width)
    last = np.exp(turn * end)
    plain_end, tilted_end = (plain @ last).real, (tilted @ last).real
    mass = transform[0].real

    def excess(epsilon: float) -> float:
        first = math.floor((epsilon - shift) / width) + 1
        weight = math.exp(epsilon - first * width - shift)  # exp(ε − t) of the first cell
        to_end = weight * math.exp(-width * (end - first))
        still = mass * (end - first - (weight - to_end) / -math.expm1(-width))
        moving = ((plain - weight * tilted) @ np.exp(turn * first)).real
        return float(still + moving - plain_end + to_end * tilted_end) / cells - delta

    high = min(high, (end - 2) * width + shift)
    if high <= low or excess(low) <= 0:
        return low
    if excess(high) > 0:
        return math.inf
    return float(brentq(excess, low, high, xtol=1e-10))
