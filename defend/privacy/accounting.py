"""Steps ↔ (ε, δ) for the Poisson-subsampled Gaussian mechanism.

Adjacency is add-or-remove one record. The composition itself is Opacus'; what is added here is
the inverse questions (which σ, how many steps) and guards where the accountants raise or mislead.
"""

import math
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import NamedTuple

from defend.errors import InputError

ACCOUNTANTS = ("prv", "rdp")

_MOST_NOISE = 1e4
_LEAST_NOISE = 0.1  # nobody wants less
_LEAST_NOISE_FOR_PRV = 0.4
_MOST_STEPS = 2**24
_PRECISION = 1e-3  # relative, of σ; never at the expense of the target


class Segment(NamedTuple):
    """`steps` steps in a row at constant σ and q.

    Attributes:
        noise_multiplier: σ, the noise's standard deviation in units of the clipping norm C.
        sample_rate: q, the probability that a record joins a batch.
        steps: how many.
    """

    noise_multiplier: float
    sample_rate: float
    steps: int


History = tuple[Segment, ...]


def extend(history: Iterable[Segment], segment: Segment) -> History:
    """`history` followed by `segment`, merged with the last one where σ and q are the same."""
    done = tuple(history)
    if segment.steps == 0:
        return done
    if done and done[-1][:2] == segment[:2]:
        return (*done[:-1], segment._replace(steps=done[-1].steps + segment.steps))
    return (*done, segment)


def total_steps(history: Iterable[Segment]) -> int:
    """All steps of a history."""
    return sum(segment.steps for segment in history)


def epsilon(history: Iterable[Segment], delta: float, accountant: str = "prv") -> float:
    """An upper bound on the ε spent by `history` at `delta`.

    Args:
        history: what was run, in order; order does not change ε.
        delta: δ in (0, 1); choose it well below 1 / number of records.
        accountant: "prv" (tight; floor near 0.01) or "rdp" (looser; floor near 0.1 at δ = 1e-5).
            Below σ = 0.4 "prv" falls back to "rdp".

    Returns:
        ε ≥ 0: 0.0 for no steps, inf where a segment has σ = 0.

    Raises:
        InputError: if `delta` or `accountant` is out of range.
    """
    if not 0 < delta < 1:
        raise InputError(f"Expected `delta` to be in (0, 1), got {delta}.")
    if accountant not in ACCOUNTANTS:
        raise InputError(f"Expected `accountant` to be one of {ACCOUNTANTS}, got {accountant!r}.")
    steps = tuple(Segment(*s) for s in history if s[2] > 0)
    if not steps:
        return 0.0
    # Both accountants raise, or return NaN, without noise.
    if any(s.noise_multiplier == 0 for s in steps):
        return math.inf
    # PRV's mesh explodes as σ → 0 (gigabytes at 0.1). RDP's bound is valid, and ε huge anyway.
    if any(s.noise_multiplier < _LEAST_NOISE_FOR_PRV for s in steps):
        accountant = "rdp"
    return _epsilon(steps, delta, accountant)


@lru_cache(maxsize=4096)
def _epsilon(history: History, delta: float, accountant: str) -> float:
    import warnings

    from opacus.accountants import create_accountant

    machine = create_accountant(accountant)
    machine.history = [tuple(segment) for segment in history]
    with warnings.catch_warnings():
        # "Optimal order is the largest alpha": the bound is valid, only loose.
        warnings.filterwarnings("ignore", message="Optimal order is the")
        return max(0.0, float(machine.get_epsilon(delta)))


def noise_multiplier_for(
    target_epsilon: float,
    *,
    delta: float,
    sample_rate: float,
    steps: int,
    spent: Iterable[Segment] = (),
    accountant: str = "prv",
) -> float:
    """The smallest σ (to 0.3%, rounded up) whose `steps` steps, after `spent`, stay within budget.

    Args:
        target_epsilon: ε that must not be exceeded, > 0.
        delta: δ in (0, 1).
        sample_rate: q in (0, 1].
        steps: steps still to take, ≥ 1.
        spent: what was run before on the same data.
        accountant: "prv" or "rdp".

    Returns:
        σ with epsilon(spent + steps at σ) ≤ target_epsilon.

    Raises:
        InputError: if no σ does: `spent` already used the budget up, or the target lies below
            what the accountant can certify.
    """
    if not target_epsilon > 0:
        raise InputError(f"Expected `target_epsilon` to be > 0, got {target_epsilon}.")
    spent = tuple(spent)

    def excess(sigma: float, machine: str = accountant) -> float:
        history = extend(spent, Segment(sigma, sample_rate, steps))
        return epsilon(history, delta, machine) - target_epsilon

    # RDP is cheap and close: where it finds a σ, the search with PRV starts from that one.
    sigma = _smallest(lambda s: excess(s, "rdp"), start=1.0, growth=2.0)
    if accountant != "rdp":
        growth = 2.0 if sigma is None else 1.1
        sigma = _smallest(excess, start=sigma or 1.0, growth=growth)
    if sigma is None:
        raise InputError(
            f"Expected a `target_epsilon` that some noise can meet, got {target_epsilon} at "
            f"delta={delta} with ε = {epsilon(spent, delta, accountant):.4g} already spent. "
            "Raise the target, or train for fewer steps; accountant='prv' certifies smaller "
            "ε than 'rdp'."
        )
    return sigma


def _smallest(excess: Callable[[float], float], *, start: float, growth: float) -> float | None:
    """The smallest σ, from above, with excess(σ) ≤ 0 for a decreasing `excess`; None if none."""
    from scipy.optimize import brentq

    high = start
    while excess(high) > 0:
        high *= growth
        if high > _MOST_NOISE:
            return None
    low = high
    while excess(low) <= 0:
        high, low = low, low / growth
        if low < _LEAST_NOISE:
            return high
    root = brentq(excess, low, high, xtol=_PRECISION * low, rtol=_PRECISION)
    sigma = root * (1 + _PRECISION)
    while excess(sigma) > 0:
        sigma *= 1 + _PRECISION
    return min(sigma, high)


def affordable_steps(
    target_epsilon: float,
    *,
    delta: float,
    noise_multiplier: float,
    sample_rate: float,
    limit: int | None = None,
    spent: Iterable[Segment] = (),
    accountant: str = "prv",
) -> int:
    """How many more steps at (σ, q) stay within `target_epsilon`, up to `limit`.

    Args:
        target_epsilon: ε that must not be exceeded.
        delta: δ in (0, 1).
        noise_multiplier: σ ≥ 0.
        sample_rate: q in (0, 1].
        limit: the answer is not sought beyond this; None doubles until the budget is spent.
        spent: what was run before on the same data.
        accountant: "prv" or "rdp".

    Returns:
        The largest n ≤ limit with epsilon(spent + n steps) ≤ target_epsilon; 0 if there is none.

    Raises:
        InputError: if `limit` is None and the noise is so large that the budget never ends.
    """
    spent = tuple(spent)

    def fits(n: int) -> bool:
        history = extend(spent, Segment(noise_multiplier, sample_rate, n))
        return epsilon(history, delta, accountant) <= target_epsilon

    if limit is None:
        limit = 1
        while fits(limit):
            limit *= 2
            if limit > _MOST_STEPS:
                raise InputError(
                    f"Expected a plan with an end, got none and a budget for over {_MOST_STEPS} "
                    "steps. Set max_steps or max_epochs."
                )
    elif fits(limit):
        return limit
    low, high = 0, limit  # low fits (or is 0), high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
