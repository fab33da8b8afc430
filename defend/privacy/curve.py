"""ε after every step: the Poisson-subsampled Gaussian mechanism, composed once for a whole plan.

One step with noise σ and rate q has the privacy loss t(x) = log(1 − q + q·exp((2x − 1) / 2σ²))
with x ~ (1 − q)·N(0, σ²) + q·N(1, σ²), and the losses of n steps add up. Two bounds follow:

- RDP (Mironov et al. 2019, arXiv 1908.10530): log E[exp((α − 1)·t)] adds up for each order α.
- PRV (Gopi et al. 2021, arXiv 2106.02848): the loss is put on a mesh, and n steps are the n-th
  power of its Fourier transform: one transform for the plan, one more for each point of a curve.

Both bound the loss of removing a record, which for this mechanism is the larger one: the tests
compare with an accountant that takes the larger of both directions.

The PRV bound grows by 0.01 (by up to 0.5 at ε of 100 and more) for the mesh, and is valid by the
error analysis of that paper; the domain follows Opacus, which reads its Remark 5.6 the same way.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from defend.errors import InputError

if TYPE_CHECKING:
    from defend.privacy.accounting import History

ACCOUNTANTS = ("prv", "rdp")

# Those of Opacus, so that its "rdp" gives the same numbers.
_ORDERS = np.array([1 + i / 10 for i in range(1, 100)] + list(range(12, 64)))
_LEAST_NOISE_FOR_PRV = 0.4  # the domain, and memory with it, explodes as σ → 0
_LEAST_NOISE_FOR_QUADRATURE = 0.1
_MESH_ERROR, _MOST_MESH_ERROR = 0.01, 0.5  # of ε
_MOST_CELLS = 2**22  # of one mesh: 0.3 GB at the peak
_MOST_LEVELS = 32

Array = np.ndarray[Any, Any]


# --- one step ---------------------------------------------------------------------------------


def _loss(x: Array, sigma: float, rate: float) -> Array:
    """t(x), exact also where q is small or exp would overflow."""
    z = (2 * x - 1) / (2 * sigma**2)
    small = np.log1p(rate * np.expm1(np.minimum(z, 30.0))) if rate < 1 else z
    return np.where(z < 30, small, z + math.log(rate) + np.log1p((1 - rate) / rate * np.exp(-z)))


def _inverse_loss(t: Array, sigma: float, rate: float) -> Array:
    """x(t); −∞ at and below log(1 − q), where there is no mass."""
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.log1p(np.expm1(np.minimum(t, 30.0)) / rate)
    z[np.isnan(z)] = -np.inf
    far = t > 30
    z[far] = t[far] - math.log(rate) + np.log1p((rate - 1) * np.exp(-t[far]))
    return sigma**2 * z + 0.5


@lru_cache(maxsize=4096)
def renyi(sigma: float, rate: float) -> Array:
    """The Rényi divergence of one step at each order of `_ORDERS`.

    Integer orders by the binomial sum. Fractional orders by the trapezoidal rule, which is exact
    to rounding for a smooth integrand that dies out on both sides. As log A(α) = (α − 1)·D(α) is
    convex with A(1) = 1, a straight line between integers bounds it from above: used for tiny σ,
    where the mesh would have to be too fine.
    """
    from scipy.special import gammaln, logsumexp

    if rate == 0 or sigma == 0:
        return np.full(len(_ORDERS), 0.0 if rate == 0 else np.inf)
    if rate == 1:
        return _ORDERS / (2 * sigma**2)
    whole = np.arange(1, 64)[:, None]
    k = np.arange(64)[None, :]
    with np.errstate(over="ignore"):
        binomial = gammaln(whole + 1) - gammaln(k + 1) - gammaln(np.maximum(whole - k, 0) + 1)
        terms = binomial + k * math.log(rate) + (whole - k) * math.log1p(-rate)
        terms = terms + (k * k - k) / (2 * sigma**2)
    log_a = logsumexp(np.where(k <= whole, terms, -np.inf), axis=1)
    log_a[0] = 0.0
    result = np.interp(_ORDERS, whole[:, 0], np.maximum(log_a, 0.0))
    if sigma >= _LEAST_NOISE_FOR_QUADRATURE:
        fractional = _ORDERS % 1 != 0
        # Poles of the integrand lie at a distance of πσ² from the axis.
        width = min(sigma / 4, 0.4 * sigma**2)
        x = np.arange(-13 * sigma, 11 + 13 * sigma, width)
        log_weights = -((x / sigma) ** 2) / 2 + math.log(width / sigma / math.sqrt(2 * math.pi))
        exponent = _ORDERS[fractional, None] * _loss(x, sigma, rate)
        peak = exponent.max() if exponent.max() > 1 else 0.0
        if peak:
            integral = logsumexp(log_weights + exponent, axis=1)
        else:  # A − 1 is tiny: do not lose it beside 1
            integral = np.log1p((np.exp(log_weights) * np.expm1(exponent)).sum(1))
        result[fractional] = np.maximum(integral, 0.0)
    return result / (_ORDERS - 1)


def _converted(divergences: Array, delta: float) -> float:
    """ε ≥ 0 from Rényi divergences at `_ORDERS` (Balle et al. 2020, arXiv 1905.09982, Thm. 21)."""
    slack = np.log1p(-1 / _ORDERS) - (math.log(delta) + np.log(_ORDERS)) / (_ORDERS - 1)
    return max(0.0, float((divergences + slack).min()))


def _spectrum(sigma: float, rate: float, width: float, cells: int) -> tuple[Array, float]:
    """Fourier transform of one step's loss, rounded to multiples of `width`, and its mean shift.

    Cell j of a ring of `cells` holds the mass of ((j ± ½)·width), the ring's second half being
    negative. The shift is what rounding took from the mean; adding it back is what makes the
    error of n steps grow with √n only.
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

    # The true mean of the truncated loss, by the trapezoidal rule in x.
    step = min(sigma / 8, 0.2 * sigma**2)
    points = np.arange(max(x[0], -14 * sigma), min(x[-1], 1 + 14 * sigma) + step, step)
    weights = (1 - rate) * np.exp(-((points / sigma) ** 2) / 2)
    weights += rate * np.exp(-(((points - 1) / sigma) ** 2) / 2)
    mean = float((weights * _loss(points, sigma, rate)).sum() / weights.sum())
    centers = np.arange(-half, cells - half) * width
    return rfft(np.roll(mass, -half)), mean - float(centers @ mass)


def _from_cells(
    spectrum: Array, cells: int, width: float, shift: float, delta: float, low: float
) -> float:
    """The ε ≥ `low` with Σ_{t > ε} p(t)·(1 − exp(ε − t)) = δ for a composed loss t.

    Returns `low` where the sum is below δ there already, and inf where no ε is large enough.
    """
    from scipy.fft import irfft

    end = cells - cells // 2
    first = max(end - cells, math.floor((low - shift) / width) + 1)
    mass = irfft(spectrum, cells)
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
    spectrum: Array, cells: int, width: float, shift: float, delta: float, low: float, high: float
) -> float:
    """The same from the lowest frequencies of p alone, where the others are nothing; ε ≤ `high`.

    For each frequency z the sum over cells is that of two geometric series, of z and of
    z·exp(−width), so that p itself is not needed. Many steps leave a thousand of a million
    frequencies.
    """
    from scipy.optimize import brentq

    end = cells - cells // 2  # one past the last cell
    turn = 2j * math.pi / cells * np.arange(1, len(spectrum))
    plain = 2 * spectrum[1:] / -np.expm1(turn)
    tilted = 2 * spectrum[1:] / -np.expm1(turn - width)
    last = np.exp(turn * end)
    plain_end, tilted_end = (plain @ last).real, (tilted @ last).real
    mass = spectrum[0].real

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


# --- many steps -------------------------------------------------------------------------------


def _mesh(
    levels: Sequence[tuple[float, float]], counts: Array, delta: float
) -> tuple[float, int, float]:
    """Width and number of cells, and the mesh's error in ε, for `counts` steps of each level.

    Both the error and the domain grow with each count, so that a mesh is also good for fewer steps.
    """
    from scipy.fft import next_fast_len

    steps = float(counts.sum())
    divergences = [renyi(*level) for level in levels]
    reach = _converted(counts @ np.array(divergences), delta / 4)
    reach = max(reach, *(_converted(one, delta / (8 * steps)) for one in divergences), 0.01) + 3
    per_width = math.sqrt(steps * math.log(12 / delta) / 2)
    most = _MOST_CELLS // max(1, len(levels) // 8)
    # A huge ε or very many steps get a coarser mesh rather than gigabytes.
    error = max(_MESH_ERROR, 2 * reach * per_width / most)
    width = error / per_width
    if not error <= _MOST_MESH_ERROR:
        return width, 0, math.inf
    return width, next_fast_len(math.ceil(2 * reach / width) + 2, real=True), error


def _prv(levels: Sequence[tuple[float, float]], counts: Array, delta: float) -> list[float]:
    """PRV bounds for each row of `counts`, steps per level; rows grow. inf where PRV fails."""
    unbounded = [math.inf] * len(counts)
    taking_part = [k for k in range(len(levels)) if levels[k][1] > 0 and counts[-1, k] > 0]
    levels, counts = [levels[k] for k in taking_part], counts[:, taking_part]
    few = len(levels) <= 4 * _MOST_LEVELS
    if not few or any(sigma < _LEAST_NOISE_FOR_PRV for sigma, _ in levels):
        return unbounded
    if not levels:
        return [0.0] * len(counts)
    spread = delta / 1000  # the part of δ that pays for truncation
    width, cells, error = _mesh(levels, counts[-1], spread)
    if cells == 0:
        return unbounded
    divergences = np.array([renyi(*level) for level in levels])
    spectra, shifts = zip(*(_spectrum(*level, width, cells) for level in levels), strict=True)
    if not counts[-1] @ np.abs(shifts) <= 1:  # beyond what the domain leaves room for
        return unbounded

    logs = np.log(np.maximum(np.abs(spectra), 1e-300)) + 1j * np.angle(spectra)
    highest = _highest(logs.real)
    bounds: list[float] = []
    low = -1.0  # ε < 0 is no news
    for row in counts:
        left = delta - spread - 2 * np.finfo(float).eps * row.sum()  # rounding of the powers
        if left < delta / 2:
            bounds.append(math.inf)
            continue
        # Beyond `band`, the product is nothing beside rounding.
        silent = row @ highest < -46 - math.log(cells)
        band = 2 ** int(silent.argmax()) if silent.any() else logs.shape[1]
        high = _converted(row @ divergences, left)  # RDP's bound, looser
        product = np.exp(row @ logs[:, :band])
        ring = (cells, width, float(row @ shifts), left, low)
        wide = band > cells / 32
        low = _from_cells(product, *ring) if wide else _from_band(product, *ring, high)
        bounds.append(max(0.0, low + error))
    return bounds


def _highest(magnitudes: Array) -> Array:
    """The largest of each row from column 2^b on, for each b."""
    powers = range(math.ceil(math.log2(magnitudes.shape[1])))
    return np.stack([magnitudes[:, 2**b :].max(1) for b in powers], axis=1)


def _levelled(segments: Iterable[tuple[float, float, float]]) -> tuple[list, Array, Array]:
    """Distinct (σ, q); the level of each segment; its steps.

    More than `_MOST_LEVELS` values of σ are rounded down to the smallest of their bin (bins of
    equal ratio). Less noise never spends less, so what follows remains an upper bound.
    """
    segments = list(segments)
    sigmas = sorted({sigma for sigma, _, _ in segments if sigma > 0})
    rounded = {0.0: 0.0, **{sigma: sigma for sigma in sigmas}}
    if len(sigmas) > _MOST_LEVELS:
        ratio = math.log(sigmas[-1] / sigmas[0]) / _MOST_LEVELS
        least: dict[int, float] = {}
        for sigma in sigmas:  # ascending: the first of a bin is its smallest
            place = min(int(math.log(sigma / sigmas[0]) / ratio), _MOST_LEVELS - 1)
            rounded[sigma] = least.setdefault(place, sigma)
    levels: dict[tuple[float, float], int] = {}
    of = [levels.setdefault((rounded[s], q), len(levels)) for s, q, _ in segments]
    return list(levels), np.array(of, dtype=int), np.array([float(s[2]) for s in segments])


def check_settings(
    history: Iterable[tuple[float, float, float]], delta: float, accountant: str
) -> None:
    """Raise InputError where no ε is defined."""
    if not 0 < delta < 1:
        raise InputError(f"Expected `delta` to be in (0, 1), got {delta}.")
    if accountant not in ACCOUNTANTS:
        raise InputError(f"Expected `accountant` to be one of {ACCOUNTANTS}, got {accountant!r}.")
    for sigma, rate, steps in history:
        if not (0 <= sigma < math.inf and 0 <= rate <= 1 and 0 <= steps < math.inf):
            raise InputError(
                "Expected segments (noise_multiplier ≥ 0, sample_rate in [0, 1], steps ≥ 0), got "
                f"({sigma}, {rate}, {steps})."
            )


class EpsilonCurve:
    """An upper bound on the ε spent after each step of a plan, in microseconds a step.

    The plan is composed once, at `points` numbers of steps. Between two of them holds the bound
    of the next, or RDP's for exactly n steps where that is smaller. More than 32 values of σ are
    rounded down to 32 (1.1% on average where σ halves over the plan), here as in `epsilon`.

    *Guarantee.* curve(n) is an upper bound on ε(spent + the first n steps of plan), never falls,
    is epsilon(spent) at 0, and epsilon(spent + plan) at the end (to 1e-6; or epsilon(spent), where
    steps that cost nearly nothing leave the other below it). The mesh of the whole plan is valid
    for each part of it: a mesh of width h errs by h·√(n·log(12/δ')/2) in ε, and the domain must
    hold the loss of n steps but for a mass of δ', both of which grow with n.

    Args:
        plan: what will be run next: one segment, or several with a noise schedule.
        delta: δ in (0, 1).
        accountant: "prv" or "rdp", as in `epsilon`.
        spent: what was run before on the same data.
        points: how many numbers of steps get a PRV bound of their own, ≥ 1; denser at the start,
            where ε grows fastest.

    Attributes:
        steps: length of the plan.

    Raises:
        InputError: if an argument is out of range.
    """

    def __init__(
        self,
        plan: History,
        delta: float,
        accountant: str = "prv",
        *,
        spent: History = (),
        points: int = 64,
    ) -> None:
        before, ahead = list(spent), list(plan)
        check_settings([*before, *ahead], delta, accountant)
        if points < 1:
            raise InputError(f"Expected `points` to be ≥ 1, got {points}.")
        self._delta = delta
        self._levels, of, steps = _levelled([*before, *ahead])
        rows = np.zeros((len(ahead) + 1, len(self._levels)))
        np.add.at(rows[0], of[: len(before)], steps[: len(before)])
        rows[np.arange(1, len(rows)), of[len(before) :]] = steps[len(before) :]
        self._counts = rows.cumsum(0)  # steps of each level up to each segment's start
        self._ends = np.concatenate([[0.0], steps[len(before) :].cumsum()])
        self._of = of[len(before) :]
        self.steps = sum(segment[2] for segment in ahead)
        self._divergences = np.array([renyi(*level) for level in self._levels])
        self._before = bound(tuple(before), delta, accountant) if before else 0.0
        self._at = _places(self.steps, points)
        self._above = [math.inf] * len(self._at)
        if accountant == "prv" and self._at:
            counts = np.array([self._counts_at(n) for n in self._at])
            self._above = _prv(self._levels, counts, delta)

    def __call__(self, n: int) -> float:
        """The bound after the first `n` steps of the plan; InputError beyond its end."""
        if not 0 <= n <= self.steps:
            raise InputError(f"Expected a step of the plan, 0 to {self.steps}, got {n}.")
        if n == 0:
            return self._before
        counts = self._counts_at(n)
        taken = counts > 0
        renyi_bound = _converted(counts[taken] @ self._divergences[taken], self._delta)
        return max(self._before, min(self._above[bisect_left(self._at, n)], renyi_bound))

    def _counts_at(self, n: float) -> Array:
        """Steps of each level, those spent before included, after `n` ≥ 1 steps of the plan."""
        i = int(np.searchsorted(self._ends, n)) - 1
        counts = self._counts[i].copy()
        counts[self._of[i]] += n - self._ends[i]
        return counts


def _places(steps: float, points: int) -> list[float]:
    """At most `points` numbers of steps up to `steps`: two thirds as dense from 1/16 and 1/4 on.

    Even within each part, so that the same few powers lead from each to the next.
    """
    if steps == 0:
        return []
    if steps <= points:
        return [*range(1, math.ceil(steps)), steps]
    quarter = max(1, points // 4)
    parts = [np.linspace(0, 1 / 16, quarter + 1), np.linspace(1 / 16, 1 / 4, quarter + 1)]
    parts.append(np.linspace(1 / 4, 1, points - 2 * quarter + 1))
    inner = np.unique(np.rint(steps * np.concatenate(parts)))
    if points < 4:
        inner = np.rint(steps * np.linspace(0, 1, points + 1))
    return [*(int(n) for n in inner if 0 < n < steps), steps]


@lru_cache(maxsize=4096)
def bound(history: History, delta: float, accountant: str) -> float:
    """The ε of a whole history: the end of its curve."""
    curve = EpsilonCurve(history, delta, accountant, points=1)
    return curve(curve.steps)
