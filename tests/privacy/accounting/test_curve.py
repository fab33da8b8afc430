import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import norm

from defend import InputError, PrivacyError
from defend.privacy.accounting import curve as module
from defend.privacy.accounting.curve import EpsilonCurve, epsilon
from defend.privacy.accounting.history import Segment, scheduled
from defend.privacy.accounting.privacy_loss import epsilon_from_renyi, renyi

from .accountants import second_opinion

DELTA = 1e-5
MESH = 0.01  # what PRV adds for its mesh


def epsilon_of_one_step(sigma, rate, delta):
    """From the definition: δ(ε) = P(t > ε) − exp(ε)·Q(t > ε), and t > ε is a half-line in x."""

    def excess(eps):
        x = sigma**2 * math.log(1 + math.expm1(eps) / rate) + 0.5
        with_record = (1 - rate) * norm.sf(x / sigma) + rate * norm.sf((x - 1) / sigma)
        return with_record - math.exp(eps) * norm.sf(x / sigma) - delta

    return brentq(excess, 0, 60) if excess(0) > 0 else 0.0


@pytest.mark.parametrize("sigma", [0.4, 1.0, 3.0, 30.0])
@pytest.mark.parametrize("rate", [1e-3, 0.05, 0.5, 1.0])
def test_one_step_against_the_definition(sigma, rate):
    truth = epsilon_of_one_step(sigma, rate, DELTA)
    bound = EpsilonCurve(((sigma, rate, 1),), DELTA)(1)
    assert truth <= bound <= truth + 1.2 * MESH
    if truth > 0.2:  # the same comparison rejects the other adjacency, replacing one record
        assert not truth <= epsilon([(2 * sigma, rate, 1)], DELTA) <= truth + 1.2 * MESH


@pytest.mark.parametrize("sigma", [0.4, 1.0, 3.0])
@pytest.mark.parametrize("rate", [1e-3, 0.05, 0.5])
def test_for_one_step_removing_a_record_costs_more_than_adding_it(sigma, rate):
    for eps in (0.0, 1e-4, 0.01, 0.1, 0.5, 2.0):
        x = sigma**2 * math.log1p(math.expm1(eps) / rate) + 0.5
        with_record = (1 - rate) * norm.sf(x / sigma) + rate * norm.sf((x - 1) / sigma)
        removed = with_record - math.exp(eps) * norm.sf(x / sigma)
        added = 0.0  # the loss −t > ε has no mass where ε ≥ −log(1 − q)
        if eps < -math.log1p(-rate):
            x = sigma**2 * math.log1p(math.expm1(-eps) / rate) + 0.5
            with_record = (1 - rate) * norm.cdf(x / sigma) + rate * norm.cdf((x - 1) / sigma)
            added = norm.cdf(x / sigma) - math.exp(eps) * with_record
        assert added <= removed + 1e-15
        assert eps == 0 or added < removed  # both are the total variation at 0


@pytest.mark.parametrize(("sigma", "steps"), [(1.0, 4), (5.0, 100), (200.0, 40_000)])
@pytest.mark.parametrize("delta", [1e-9, 1e-5, 1e-2])
def test_many_full_batches_are_one_gaussian(sigma, steps, delta):
    curve = EpsilonCurve(((sigma, 1.0, steps),), delta)
    for n in (steps // 4, steps):
        truth = epsilon_of_one_step(sigma / math.sqrt(n), 1.0, delta)
        # Of δ, a part in 1,000 pays for truncation, and 2e-11 for rounding in the longest.
        assert truth <= curve(n) <= truth + 1.4 * MESH


@pytest.mark.parametrize(
    ("plan", "spent"),
    [
        ([(1.0, 0.02, 500)], []),
        ([(0.8, 0.1, 40)], []),
        ([(2.0, 0.001, 20_000)], []),
        ([(1.5, 0.05, 200)], [(1.0, 0.02, 100)]),
        ([(1.0, 0.02, 100), (2.0, 0.05, 50)], [(3.0, 0.2, 10)]),
    ],
)
def test_whole_curve_against_a_second_accountant(plan, spent):
    curve = EpsilonCurve(plan, DELTA, spent=spent)
    total = sum(steps for _, _, steps in plan)
    assert curve.steps == total
    # The second accountant rounds losses up, by more than small ones are.
    coarse = 1e-4 if plan[0][1] < 0.01 else 1e-3
    for n in (total // 5, total // 2):
        reference = second_opinion([*spent, *first(plan, n)], DELTA, coarse)
        slack = 0.02 + 0.06 * reference  # to the next point of the curve
        assert reference - 1e-3 <= curve(n) <= reference + slack
    end = second_opinion([*spent, *plan], DELTA, coarse)
    assert end - 1e-3 <= curve(total) <= end + 1.2 * MESH
    # Too few steps, too rare or too quiet ones are told apart.
    for wrong in (
        [(sigma, 0.95 * rate, steps) for sigma, rate, steps in plan],
        [(1.05 * sigma, rate, steps) for sigma, rate, steps in plan],
        first(plan, int(0.9 * total)),
    ):
        assert EpsilonCurve(wrong, DELTA, spent=spent)(total_of(wrong)) < end + MESH - 1e-3
    replace_one = [(sigma / 2, rate, steps) for sigma, rate, steps in [*spent, *plan]]
    assert epsilon(replace_one, DELTA) > 1.5 * end


def first(plan, n):
    """The first n steps of a plan."""
    result = []
    for sigma, rate, steps in plan:
        taken = min(steps, n)
        result += [(sigma, rate, taken)] if taken else []
        n -= taken
    return result


def total_of(history):
    return sum(steps for _, _, steps in history)


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
@pytest.mark.parametrize("steps", [1, 2, 63, 64, 65, 1000])
def test_ends_of_the_curve(accountant, steps):
    spent, plan = ((1.0, 0.03, 40),), ((1.2, 0.02, steps),)
    curve = EpsilonCurve(plan, DELTA, accountant, spent=spent)
    assert curve(0) == epsilon(spent, DELTA, accountant)
    assert curve(steps) == pytest.approx(epsilon([*spent, *plan], DELTA, accountant), abs=1e-6)
    assert EpsilonCurve(plan, DELTA, accountant)(0) == 0.0
    assert EpsilonCurve((), DELTA, accountant, spent=spent)(0) == curve(0)


segments = st.tuples(
    st.floats(0.3, 8.0), st.sampled_from([0.0, 1e-4, 0.01, 0.2, 1.0]), st.integers(0, 300)
)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.lists(segments, max_size=3), st.lists(segments, max_size=2), st.sampled_from([1, 3, 16]))
def test_never_falls_and_never_beats_the_exact_prefix(plan, spent, points):
    curve = EpsilonCurve(plan, DELTA, spent=spent, points=points)
    values = [curve(n) for n in range(curve.steps + 1)]
    assert all(0 <= a <= b < math.inf for a, b in itertools.pairwise(values))
    assert values[0] == epsilon(spent, DELTA)
    n = len(values) // 3
    # Both add 0.01 to what is exact to far less.
    assert values[n] >= epsilon([*spent, *first(plan, n)], DELTA) - 1e-3
    rdp = epsilon([*spent, *first(plan, n)], DELTA, "rdp")
    assert values[n] <= max(rdp + 1e-9, values[0])


def test_composes_once_however_often_it_is_asked(monkeypatch):
    calls = []
    spectrum = module.spectrum
    monkeypatch.setattr(module, "spectrum", lambda *a: calls.append(a) or spectrum(*a))
    curve = EpsilonCurve([(1.0, 0.02, 5000)], DELTA)
    assert len({curve(n) for n in range(5001)}) >= 64
    assert len(calls) == 1


def test_points_make_it_tighter():
    exact = epsilon([(1.0, 0.02, 410)], DELTA)
    coarse, fine = (EpsilonCurve([(1.0, 0.02, 500)], DELTA, points=p)(410) for p in (1, 100))
    assert exact - 1e-4 < fine < exact + 0.02
    assert fine < coarse <= epsilon([(1.0, 0.02, 410)], DELTA, "rdp")


def test_places_are_steps_of_the_plan():
    for steps in (1, 3, 64, 100, 10**6):
        for points in (1, 2, 3, 4, 64):
            places = module._places(steps, points)
            assert places == sorted(set(places))
            assert 1 <= places[0] <= places[-1] == steps
            assert len(places) <= points
    assert module._places(0, 64) == []


def test_no_noise_is_no_privacy_from_there_on():
    curve = EpsilonCurve([(1.0, 0.1, 5), (0.0, 0.1, 5)], DELTA)
    assert curve(5) == pytest.approx(epsilon([(1.0, 0.1, 5)], DELTA, "rdp"))
    assert curve(6) == math.inf
    assert EpsilonCurve([(1.0, 0.1, 5)], DELTA, spent=[(0.0, 0.1, 1)])(3) == math.inf


def test_what_is_never_sampled_costs_nothing():
    curve = EpsilonCurve([(0.0, 0.0, 5), (1.0, 0.0, 5)], DELTA)
    assert [curve(n) for n in (0, 5, 10)] == [0.0, 0.0, 0.0]


def test_many_values_of_noise_are_rounded_down_to_few():
    plan = scheduled(1.0, 0.02, 300, lambda t: 2 - t / 300)
    levels, of, steps = module._levelled(plan)
    assert len(levels) <= 32
    assert steps.sum() == 300
    for segment, k in zip(plan, of, strict=True):
        assert levels[k][0] <= segment.noise_multiplier <= levels[k][0] * 2 ** (1 / 32) + 1e-12
    # An upper bound, and not by much: the slow composition takes each step for itself.
    exact = sum(renyi(s, q) * n for s, q, n in plan)
    exact = epsilon_from_renyi(exact, DELTA)
    assert exact < epsilon(plan, DELTA, "rdp") < 1.03 * exact
    # PRV of 34 values rounded to 32 is that of 34, which no second accountant composes fast.
    few = [(1 + k / 100, 0.1, 1) for k in range(34)]
    halves = [epsilon([(sigma, 0.1, 34)], DELTA) for sigma in (1.33, 1.0)]
    assert halves[0] < epsilon(few, DELTA) < halves[1]


def test_noise_beyond_the_floats_is_cut_to_an_upper_bound():
    plan = [(10.0**k, 0.1, 1) for k in range(-320, 300, 10)]
    levels, of, _ = module._levelled(plan)
    assert len(levels) <= 33
    for segment, k in zip(plan, of, strict=True):
        assert levels[k][0] <= segment[0]
        assert levels[k][0] == 0 or 1e-150 < levels[k][0] <= 1e9
    assert EpsilonCurve(plan, DELTA)(1) == math.inf
    assert math.isfinite(EpsilonCurve(plan[::-1], DELTA)(10))


def test_nan_from_the_mesh_is_not_mistaken_for_nothing_spent(monkeypatch):
    monkeypatch.setattr(module, "epsilon_from_spectrum", lambda *a: math.nan)
    with pytest.raises(PrivacyError, match="a PRV bound, got NaN"):
        EpsilonCurve([(1.0, 0.1, 10)], DELTA)


@pytest.mark.parametrize("n", [-1, 11, math.nan])
def test_refuses_steps_beyond_the_plan(n):
    with pytest.raises(InputError, match="a step of the plan, 0 to 10"):
        EpsilonCurve([Segment(1.0, 0.1, 10)], DELTA)(n)


def test_refuses_bad_settings():
    plan = [(1.0, 0.1, 10)]
    with pytest.raises(InputError, match="`points` to be ≥ 1, got 0"):
        EpsilonCurve(plan, DELTA, points=0)
    with pytest.raises(InputError, match=r"`delta` to be in \(0, 1\)"):
        EpsilonCurve(plan, 0.0)
    with pytest.raises(InputError, match="`accountant` to be one of"):
        EpsilonCurve(plan, DELTA, "gdp")
    with pytest.raises(InputError, match=r"segments .* got \(-1.0, 0.1, 1\)"):
        EpsilonCurve(plan, DELTA, spent=[(-1.0, 0.1, 1)])
