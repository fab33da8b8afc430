"""The inverse questions of accounting: which σ for a target ε, and how many steps for a budget."""

import math
from collections.abc import Callable, Iterable

from defend.errors import InputError
from defend.privacy.accounting.curve import epsilon
from defend.privacy.accounting.history import Segment, scheduled

_LARGEST_NOISE = 1e4
_SMALLEST_NOISE = 0.1  # below it ε grows beyond any use
_STEPS_WITHOUT_END = 2**24  # a budget for more of them is taken for one that never ends
_PRECISION = 1e-3  # relative, of σ; never at the expense of the target


def noise_multiplier_for(
    target_epsilon: float,
    *,
    delta: float,
    sample_rate: float,
    steps: int,
    spent: Iterable[Segment] = (),
    accountant: str = "prv",
    schedule: Callable[[int], float] | None = None,
) -> float:
    """The smallest σ (to 0.3%, rounded up) whose `steps` steps, after `spent`, stay within budget.

    Args:
        target_epsilon: ε that must not be exceeded, > 0.
        delta: δ in (0, 1).
        sample_rate: q in (0, 1].
        steps: steps still to take, ≥ 1.
        spent: what was run before on the same data.
        accountant: "prv" or "rdp".
        schedule: number of a step still to take, from 0 → factor on σ; None for a constant σ.

    Returns:
        σ, before the schedule, with epsilon(spent + steps at σ) ≤ target_epsilon.

    Raises:
        InputError: if no σ does: `spent` already used the budget up, the target lies below what
            the accountant can certify, or the schedule leaves steps with hardly any noise.
    """
    if not target_epsilon > 0:
        raise InputError(f"Expected `target_epsilon` to be > 0, got {target_epsilon}.")
    spent = tuple(spent)
    factors = scheduled(1.0, sample_rate, steps, schedule)

    def spends(sigma: float, machine: str = accountant) -> float:
        plan = (segment._replace(noise_multiplier=sigma * segment[0]) for segment in factors)
        return epsilon((*spent, *plan), delta, machine)

    # RDP is cheap and close: where it finds a σ, the search with PRV starts from that one.
    sigma = _smallest(lambda s: spends(s, "rdp") - target_epsilon, start=1.0, growth=2.0)
    if accountant != "rdp":
        closer = None
        if sigma is not None and (spend := spends(sigma, "rdp")) > 0:
            ratio = spends(0.97 * sigma, "rdp") / spend
            closer = _secant(spends, target_epsilon, sigma, math.log(ratio) / math.log(0.97))
        growth = 2.0 if sigma is None else 1.1
        sigma = closer or _smallest(
            lambda s: spends(s) - target_epsilon, start=sigma or 1.0, growth=growth
        )
    if sigma is None:
        raise InputError(
            f"Expected a `target_epsilon` that some noise can meet, got {target_epsilon} at "
            f"delta={delta} with ε = {epsilon(spent, delta, accountant):.4g} already spent. "
            "Raise the target, train for fewer steps, or take a schedule that keeps more noise; "
            "accountant='prv' certifies smaller ε than 'rdp'."
        )
    return sigma


def _secant(
    spends: Callable[[float], float], target: float, sigma: float, slope: float
) -> float | None:
    """σ with spends(σ) just below `target`, near a σ that meets it; None where that fails.

    log ε is nearly a straight line in log σ, of `slope` at first: two or three ε do.
    """
    spend = spends(sigma)
    for _ in range(6):
        if not (slope < 0 < spend < math.inf):
            return None
        further = math.log(target / spend) / slope  # what to add to log σ
        if -_PRECISION < further <= 0:
            return sigma
        nearer = sigma * math.exp(further + _PRECISION / 3)
        if not _SMALLEST_NOISE < nearer < _LARGEST_NOISE or nearer == sigma:
            return None
        before, spend = spend, spends(nearer)
        if spend > 0:
            slope = math.log(spend / before) / math.log(nearer / sigma)
        sigma = nearer
    return None


def _smallest(excess: Callable[[float], float], *, start: float, growth: float) -> float | None:
    """The smallest σ, from above, with excess(σ) ≤ 0 for a decreasing `excess`; None if none."""
    from scipy.optimize import brentq

    high = start
    while excess(high) > 0:
        high *= growth
        if high > _LARGEST_NOISE:
            return None
    low = high
    while excess(low) <= 0:
        high, low = low, low / growth
        if low < _SMALLEST_NOISE:
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
    noise_multiplier: float | Callable[[int], float],
    sample_rate: float,
    limit: int | None = None,
    spent: Iterable[Segment] = (),
    accountant: str = "prv",
) -> int:
    """How many more steps at (σ, q) stay within `target_epsilon`, up to `limit`.

    Args:
        target_epsilon: ε that must not be exceeded.
        delta: δ in (0, 1).
        noise_multiplier: σ ≥ 0; or number of a step still to take, from 0 → σ > 0.
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

    def excess(n: int) -> float:
        if callable(noise_multiplier):
            plan = scheduled(1.0, sample_rate, n, noise_multiplier)
        else:
            plan = scheduled(noise_multiplier, sample_rate, n)
        history = (*spent, *plan)
        # RDP is cheaper by far, and enough where it is within the target.
        rough = epsilon(history, delta, "rdp") - target_epsilon
        if accountant == "rdp" or rough <= -0.5 * abs(target_epsilon):
            return rough
        return epsilon(history, delta, accountant) - target_epsilon

    if limit is None:
        limit = 1
        while excess(limit) <= 0:
            limit *= 2
            if limit > _STEPS_WITHOUT_END:
                raise InputError(
                    "Expected a plan with an end, got none and a budget for over "
                    f"{_STEPS_WITHOUT_END} steps. Set max_steps or max_epochs."
                )
    elif excess(limit) <= 0:
        return limit
    return _last_within(excess, limit)


def _last_within(excess: Callable[[int], float], high: int) -> int:
    """The last n < high with excess(n) ≤ 0 for a growing `excess`, of which excess(high) > 0.

    A straight line between the ends, which shortens the bracket fast where ε is smooth, and a
    half where that failed. One step to each side of the line, so that both ends close in.
    """
    low, value_low, value_high = 0, -math.inf, excess(high)
    halve = True
    while high - low > 1:
        if halve or not (math.isfinite(value_low) and math.isfinite(value_high)):
            middle = (low + high) // 2
        else:
            share = -value_low / (value_high - value_low)
            guess = low + int(share * (high - low))
            # just beyond the guess, on the side of the end that is further away
            nudge = 1 + (high - low) // 64
            middle = guess + nudge if guess - low < high - guess else guess - nudge
            middle = min(max(middle, low + 1), high - 1)
        value, length = excess(middle), high - low
        if value <= 0:
            low, value_low = middle, value
        else:
            high, value_high = middle, value
        halve = high - low > length / 2
    return low
