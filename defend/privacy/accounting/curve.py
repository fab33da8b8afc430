"""ε after every step: the Poisson-subsampled Gaussian mechanism, composed once for a whole plan.

The losses of independent steps add up, and so do what `losses` knows of each:

- RDP: the Rényi divergences of n steps are n times those of one, at each order.
- PRV: n steps are the n-th power of one step's Fourier transform: one transform for the plan, one
  more for each point of a curve.

The PRV bound grows by 0.01 (by up to 0.5 at ε of 100 and more) for the mesh, and is valid by the
error analysis of Gopi et al. 2021 (arXiv 2106.02848); the domain follows Opacus, which reads its
Remark 5.6 the same way.
"""

import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

import numpy as np

from defend.errors import InputError, PrivacyError
from defend.privacy.accounting.history import History, Segment
from defend.privacy.accounting.privacy_loss import (
    MOST_NOISE,
    NO_NOISE,
    Array,
    epsilon_from_renyi,
    epsilon_from_spectrum,
    renyi,
    spectrum,
)

ACCOUNTANTS = ("prv", "rdp")

_LEAST_NOISE_FOR_PRV = 0.4  # the domain, and memory with it, explodes as σ → 0
_MESH_ERROR, _MOST_MESH_ERROR = 0.01, 0.5  # of ε
_MOST_CELLS = 2**22  # of one mesh: 0.3 GB at the peak
_MOST_LEVELS = 32

Level = tuple[float, float]  # σ and q


def _mesh(levels: Sequence[Level], counts: Array, delta: float) -> tuple[float, int, float]:
    """Width and number of cells, and the mesh's error in ε, for `counts` steps of each level.

    Both the error and the domain grow with each count, so that a mesh is also good for fewer steps.
    """
    from scipy.fft import next_fast_len

    steps = float(counts.sum())
    divergences = [renyi(*level) for level in levels]
    each = [epsilon_from_renyi(one, delta / (8 * steps)) for one in divergences]
    reach = 3 + max(epsilon_from_renyi(counts @ np.array(divergences), delta / 4), *each, 0.01)
    per_width = math.sqrt(steps * math.log(12 / delta) / 2)
    most = _MOST_CELLS // max(1, len(levels) // 8)
    # A huge ε or very many steps get a coarser mesh rather than gigabytes.
    error = max(_MESH_ERROR, 2 * reach * per_width / most)
    width = error / per_width
    if not error <= _MOST_MESH_ERROR:
        return width, 0, math.inf
    return width, next_fast_len(math.ceil(2 * reach / width) + 2, real=True), error


def _prv(levels: Sequence[Level], counts: Array, delta: float) -> list[float]:
    """PRV bounds for each row of `counts`, steps per level; rows grow. inf where PRV fails."""
    unbounded = [math.inf] * len(counts)
    taking_part = [k for k in range(len(levels)) if levels[k][1] > 0 and counts[-1, k] > 0]
    levels, counts = [levels[k] for k in taking_part], counts[:, taking_part]
    if not levels:
        return [0.0] * len(counts)
    few = len(levels) <= 4 * _MOST_LEVELS
    if not few or any(sigma < _LEAST_NOISE_FOR_PRV for sigma, _ in levels):
        return unbounded
    spread = delta / 1000  # the part of δ that pays for truncation
    left = delta - spread - 2 * np.finfo(float).eps * counts.sum(1)  # and for rounding of powers
    if left[0] < delta / 2:  # all rows: δ / 8n, below, might underflow to 0
        return unbounded
    width, cells, error = _mesh(levels, counts[-1], spread)
    if cells == 0:
        return unbounded
    spectra, shifts = zip(*(spectrum(*level, width, cells) for level in levels), strict=True)
    if not counts[-1] @ np.abs(shifts) <= 1:  # beyond what the domain leaves room for
        return unbounded
    divergences = np.array([renyi(*level) for level in levels])
    bounds: list[float] = []
    low = -1.0  # where the search begins: every ε is above
    products = _products(np.array(spectra), counts, cells)
    for row, rest, product in zip(counts, left, products, strict=True):
        if rest < delta / 2:
            bounds.append(math.inf)
            continue
        high = epsilon_from_renyi(row @ divergences, rest)  # looser
        low = epsilon_from_spectrum(product, cells, width, row @ shifts, rest, low, high)
        if math.isnan(low):
            raise PrivacyError("Expected a PRV bound, got NaN. Use accountant='rdp'; report this.")
        bounds.append(max(0.0, low + error))
    return bounds


def _products(spectra: Array, counts: Array, cells: int) -> Iterator[Array]:
    """Π spectra[k]^row[k] for each row of `counts`, without the frequencies that are nothing."""
    logs = np.log(np.maximum(np.abs(spectra), 1e-300)) + 1j * np.angle(spectra)
    powers = range(math.ceil(math.log2(logs.shape[1])))
    # The largest of each level from frequency 2^b on, for each b.
    highest = np.stack([logs.real[:, 2**b :].max(1) for b in powers], axis=1)
    for row in counts:
        # From `band` on, the product is nothing beside rounding.
        silent = row @ highest < -46 - math.log(cells)
        band = 2 ** int(silent.argmax()) if silent.any() else logs.shape[1]
        yield np.exp(row @ logs[:, :band])


def _levelled(segments: Iterable[tuple[float, float, float]]) -> tuple[list[Level], Array, Array]:
    """Distinct (σ, q); the level of each segment; its steps.

    More than `_MOST_LEVELS` values of σ are rounded down to the smallest of their bin (bins of
    equal ratio). Less noise never spends less, so what follows remains an upper bound; and so it
    does where σ is cut to the range whose squares are floats.
    """
    segments = [(min(s, MOST_NOISE) if s > NO_NOISE else 0.0, q, n) for s, q, n in segments]
    sigmas = sorted({sigma for sigma, _, _ in segments if sigma > 0})
    rounded = {0.0: 0.0, **{sigma: sigma for sigma in sigmas}}
    if len(sigmas) > _MOST_LEVELS:
        ratio = math.log(sigmas[-1] / sigmas[0]) / _MOST_LEVELS
        least: dict[int, float] = {}
        for sigma in sigmas:  # ascending: the first of a bin is its smallest
            place = min(int(math.log(sigma / sigmas[0]) / ratio), _MOST_LEVELS - 1)
            rounded[sigma] = least.setdefault(place, sigma)
    levels: dict[Level, int] = {}
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
        with np.errstate(over="ignore"):  # inf, which is the answer then
            divergences = counts[taken] @ self._divergences[taken]
        rdp = epsilon_from_renyi(divergences, self._delta)
        return max(self._before, min(self._above[bisect_left(self._at, n)], rdp))

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


def epsilon(history: Iterable[Segment], delta: float, accountant: str = "prv") -> float:
    """An upper bound on the ε spent by `history` at `delta`.

    Args:
        history: what was run, in order; order does not change ε.
        delta: δ in (0, 1); choose it well below 1 / number of records.
        accountant: "prv" (tight; floor near 0.01) or "rdp" (looser; floor near 0.1 at δ = 1e-5).
            "prv" is never above "rdp", and the same where PRV has no answer within bounds of
            memory: σ < 0.4, ε of hundreds, or δ within rounding of 0.

    Returns:
        ε ≥ 0: 0.0 for no steps, inf where a segment has σ ≤ 1e-150. σ above 1e9 counts as 1e9.

    Raises:
        InputError: if `delta`, `accountant` or a segment is out of range.
    """
    steps = tuple(Segment(*s) for s in history)
    check_settings(steps, delta, accountant)
    return bound(steps, delta, accountant)
