import itertools
import math

import pytest

from defend import InputError
from defend.privacy.accounting import curve
from defend.privacy.accounting.calibration import affordable_steps, noise_multiplier_for
from defend.privacy.accounting.curve import epsilon
from defend.privacy.accounting.history import Segment, extend, scheduled, total_steps
from defend.privacy.mechanism import schedules

from .accountants import second_opinion

DELTA = 1e-5


def test_edges_where_accountants_raise_or_mislead():
    assert epsilon([], DELTA) == 0.0
    assert epsilon([(1.0, 0.1, 0)], DELTA) == 0.0
    for accountant in ("prv", "rdp"):
        assert epsilon([(0.0, 0.1, 1)], DELTA, accountant) == math.inf


@pytest.mark.parametrize("delta", [0, 1, -1e-5])
def test_refuses_a_bad_delta(delta):
    with pytest.raises(InputError, match=r"`delta` to be in \(0, 1\)"):
        epsilon([(1.0, 0.1, 1)], delta)


def test_refuses_an_unknown_accountant():
    with pytest.raises(InputError, match="`accountant` to be one of"):
        epsilon([(1.0, 0.1, 1)], DELTA, "gdp")


def test_segments_merge_where_nothing_changed():
    history = extend(extend((), Segment(1.0, 0.1, 3)), Segment(1.0, 0.1, 2))
    assert history == (Segment(1.0, 0.1, 5),)
    history = extend(history, Segment(2.0, 0.1, 1))
    assert total_steps(history) == 6
    assert len(history) == 2
    assert extend(history, Segment(2.0, 0.1, 0)) == history


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
@pytest.mark.parametrize(("target", "rate", "steps"), [(1.0, 0.02, 200), (8.0, 0.1, 100)])
def test_noise_for_a_target_meets_it_without_waste(accountant, target, rate, steps):
    sigma = noise_multiplier_for(
        target, delta=DELTA, sample_rate=rate, steps=steps, accountant=accountant
    )
    assert epsilon([(sigma, rate, steps)], DELTA, accountant) <= target
    assert epsilon([(0.99 * sigma, rate, steps)], DELTA, accountant) > target


def test_noise_for_what_is_left_of_a_budget():
    spent = (Segment(1.0, 0.05, 50),)
    sigma = noise_multiplier_for(6.0, delta=DELTA, sample_rate=0.05, steps=50, spent=spent)
    assert epsilon([*spent, (sigma, 0.05, 50)], DELTA) <= 6.0
    assert sigma > noise_multiplier_for(6.0, delta=DELTA, sample_rate=0.05, steps=50)


def test_no_noise_can_undo_what_is_spent():
    with pytest.raises(InputError, match=r"some noise can meet, got 1.0 .* already spent"):
        noise_multiplier_for(1.0, delta=DELTA, sample_rate=0.05, steps=10, spent=[(0.7, 0.05, 100)])


def test_refuses_a_target_of_nothing():
    with pytest.raises(InputError, match="`target_epsilon` to be > 0"):
        noise_multiplier_for(0.0, delta=DELTA, sample_rate=0.1, steps=1)


@pytest.mark.parametrize("limit", [None, 10_000])
def test_affordable_steps_is_the_last_that_fits(limit):
    n = affordable_steps(
        2.0, delta=DELTA, noise_multiplier=1.0, sample_rate=0.02, limit=limit, accountant="rdp"
    )
    assert epsilon([(1.0, 0.02, n)], DELTA, "rdp") <= 2.0
    assert epsilon([(1.0, 0.02, n + 1)], DELTA, "rdp") > 2.0


def test_affordable_steps_at_its_ends():
    settings = {"delta": DELTA, "sample_rate": 0.02, "accountant": "rdp"}
    assert affordable_steps(9.0, noise_multiplier=5.0, limit=3, **settings) == 3
    assert affordable_steps(0.5, noise_multiplier=0.3, limit=100, **settings) == 0
    assert affordable_steps(9.0, noise_multiplier=0.0, limit=100, **settings) == 0


@pytest.mark.parametrize("sigma", [0.01, 0.1, 0.3])
def test_little_noise_costs_no_memory(sigma):
    history = [(sigma, 0.1, 1000)]
    assert epsilon(history, DELTA, "prv") == epsilon(history, DELTA, "rdp") > 100


@pytest.mark.parametrize(
    "history",
    [
        [(0.4, 1e-5, 1000)],
        [(0.5, 0.3, 1_000_000)],  # a mesh of 10^9 cells, if one let it
        [(1.0, 1.0, 100_000)],
        [(100.0, 1e-5, 1)],
        [(100.0, 0.3, 1), (0.4, 1.0, 3)],
        [(1e6, 0.5, 10)],
        [(0.1, 5e-324, 10)],  # of which 1 / q is no float
        [(2.0, 1e-310, 10)],
    ],
)
@pytest.mark.parametrize("delta", [1e-300, 1e-12, 1e-9, 1e-2, 0.9])
@pytest.mark.filterwarnings("error")
def test_every_corner_has_a_finite_bound(history, delta):
    prv, rdp = (epsilon(history, delta, accountant) for accountant in ("prv", "rdp"))
    assert 0 <= prv <= rdp < math.inf


def test_memory_is_bounded(monkeypatch):
    meshes = []
    mesh = curve._mesh
    monkeypatch.setattr(curve, "_mesh", lambda *a: meshes.append(mesh(*a)) or meshes[-1])
    curve.bound.cache_clear()
    assert epsilon([(0.5, 0.02, 100_000)], DELTA) > 100
    assert epsilon([(0.5, 0.02, 3_000)], DELTA) > 10
    assert max(cells for _, cells, _ in meshes) <= 1.01 * curve._MOST_CELLS
    # A coarser mesh is paid for in ε, or given up for RDP.
    assert all(error >= 0.01 for _, _, error in meshes)


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
@pytest.mark.filterwarnings("error")
def test_any_noise_has_a_bound_and_more_noise_never_spends_more(accountant):
    powers = [*range(-320, -10, 10), -5, -4, -3, *range(-2, 4), 6, 9, 20, 150, 200, 308]
    sigmas = sorted([5e-324, 1e-170, 9.9e-3, 1.01e-2, 0.05, 0.0999, *(10.0**k for k in powers)])
    for steps in (1, 1000):
        spent = [epsilon([(sigma, 0.01, steps)], DELTA, accountant) for sigma in sigmas]
        assert all(e == math.inf for s, e in zip(sigmas, spent, strict=True) if s <= 1e-150)
        assert all(e > 1e3 for s, e in zip(sigmas, spent, strict=True) if s < 1e-2)
        assert all(0 <= e < math.inf for s, e in zip(sigmas, spent, strict=True) if s > 1e-140)
        assert all(a >= b for a, b in itertools.pairwise(spent))


@pytest.mark.parametrize("delta", [5e-324, 1e-310, 1e-300, 1e-17])
@pytest.mark.parametrize("steps", [1, 10**6, 1e308])
@pytest.mark.filterwarnings("error")
def test_any_delta_and_number_of_steps_has_a_bound(delta, steps):
    for sigma in (1.0, 1e200):
        history = [(sigma, 0.5, steps)]
        # Beside such a δ the mesh is all rounding: RDP answers.
        assert epsilon(history, delta) == epsilon(history, delta, "rdp") > 0
    assert epsilon([(1.0, 0.0, steps)], delta) == 0.0


def test_a_schedule_that_ends_the_noise_ends_the_budget():
    """σ falls to 1e-183, of which the square is no float any more."""
    settings = {"delta": DELTA, "sample_rate": 0.01}
    plan = scheduled(1.0, 0.01, 4000, schedules.Decay(0.9))
    assert epsilon(plan, DELTA) == math.inf
    n = affordable_steps(3.0, noise_multiplier=schedules.Decay(0.9), limit=4000, **settings)
    assert 0 < n < 4000
    assert epsilon(plan[:n], DELTA) <= 3.0 < epsilon(plan[: n + 1], DELTA)
    for accountant in ("prv", "rdp"):
        with pytest.raises(InputError, match=r"some noise can meet, got 3.0 .* keeps more noise"):
            noise_multiplier_for(
                3.0, steps=4000, accountant=accountant, schedule=schedules.Decay(0.9), **settings
            )


def test_where_the_least_noise_spends_nothing_it_is_taken():
    """ε of 0 leaves no ratio to search along."""
    sigma = noise_multiplier_for(1.0, delta=0.9, sample_rate=1e-9, steps=1)
    assert epsilon([(sigma, 1e-9, 1)], 0.9) <= 1.0
    assert sigma < 1.0


@pytest.mark.parametrize(
    "segment", [(math.inf, 0.1, 1), (-1.0, 0.1, 1), (math.nan, 0.1, 1), (1.0, 1.1, 1), (1, 0.1, -1)]
)
def test_refuses_what_is_no_segment(segment):
    with pytest.raises(InputError, match=r"Expected segments .*noise_multiplier ≥ 0"):
        epsilon([segment], DELTA)


@pytest.mark.parametrize("n", [93, 99, 105])
def test_steps_are_planned_exactly_where_the_rate_cannot_be_inverted(n):
    rate = 1 / n
    assert int(1 / rate) != n  # what must not be relied on
    plan = scheduled(1.0, rate, 2 * n)
    assert total_steps(plan) == 2 * n
    assert epsilon(plan, DELTA, "rdp") == epsilon([(1.0, rate, 2 * n)], DELTA, "rdp")
    budget = epsilon(plan, DELTA, "rdp")
    settings = {"delta": DELTA, "noise_multiplier": 1.0, "sample_rate": rate, "accountant": "rdp"}
    assert affordable_steps(budget, **settings) == 2 * n
    # Two steps fewer are told apart.
    assert epsilon([(1.0, rate, 2 * int(1 / rate))], DELTA, "rdp") < budget


def stairs(t):
    return 1.5 if t < 40 else 1.0 if t < 90 else 0.8


def test_a_schedule_is_the_composition_of_its_steps():
    plan = scheduled(2.0, 0.05, 100, stairs, first_step=20)
    assert plan == (
        Segment(3.0, 0.05, 20), Segment(2.0, 0.05, 50), Segment(1.6, 0.05, 30),
    )  # fmt: skip
    slow = ()
    for t in range(20, 120):
        slow = extend(slow, Segment(2.0 * stairs(t), 0.05, 1))
    assert plan == slow
    one_by_one = [(2.0 * stairs(t), 0.05, 1) for t in range(20, 120)]
    for accountant in ("prv", "rdp"):
        fast = epsilon(plan, DELTA, accountant)
        assert fast == pytest.approx(epsilon(one_by_one, DELTA, accountant), abs=1e-9)
        assert fast != pytest.approx(
            epsilon(scheduled(2.0, 0.05, 100, stairs), DELTA, accountant), rel=0.005
        )
    reference = second_opinion(plan, DELTA, 1e-3)
    assert reference - 2e-3 <= epsilon(plan, DELTA) <= reference + 0.012


def test_no_schedule_is_a_constant_one():
    assert scheduled(2.0, 0.05, 7) == (Segment(2.0, 0.05, 7),)
    assert scheduled(2.0, 0.05, 7, lambda t: 1.0) == (Segment(2.0, 0.05, 7),)
    assert scheduled(2.0, 0.05, 0) == scheduled(2.0, 0.05, 0, stairs) == ()


@pytest.mark.parametrize("factor", [0.0, -0.1, math.nan, math.inf])
def test_refuses_the_schedules_that_training_refuses(factor):
    message = r"a finite factor > 0, got .* at step 5"
    with pytest.raises(InputError, match=message):
        schedules.factor(lambda t: factor, 5)
    with pytest.raises(InputError, match=message):
        scheduled(1.0, 0.1, 3, lambda t: factor, first_step=5)


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
def test_noise_for_a_target_with_a_schedule(accountant):
    settings = {"delta": DELTA, "sample_rate": 0.05, "accountant": accountant}
    schedule = {"schedule": lambda t: stairs(20 + t)}  # of a plan that goes on at step 20
    sigma = noise_multiplier_for(3.0, steps=100, **schedule, **settings)

    def spends(sigma, first_step=20):
        return epsilon(scheduled(sigma, 0.05, 100, stairs, first_step), DELTA, accountant)

    assert spends(sigma) <= 3.0 < spends(0.99 * sigma)
    assert spends(sigma, first_step=50) > 3.0  # the schedule's place matters
    noise = {"noise_multiplier": lambda t: sigma * stairs(20 + t)}
    n = affordable_steps(2.5, limit=100, **noise, **settings)
    assert 0 < n < 100
    plans = [scheduled(sigma, 0.05, k, stairs, 20) for k in (n, n + 1)]
    assert epsilon(plans[0], DELTA, accountant) <= 2.5 < epsilon(plans[1], DELTA, accountant)


def test_noise_for_a_schedule_that_never_stands_still():
    def falling(t):
        return 2 - t / 40

    settings = {"delta": DELTA, "sample_rate": 0.05, "steps": 40, "schedule": falling}
    sigma = noise_multiplier_for(4.0, **settings)
    assert 3.96 < epsilon(scheduled(sigma, 0.05, 40, falling), DELTA) <= 4.0
    assert sigma < noise_multiplier_for(4.0, accountant="rdp", **settings)


@pytest.mark.parametrize(
    ("target", "delta", "rate", "steps"), [(3.0, 1e-5, 0.05, 600), (8.0, 1e-4, 128 / 1437, 300)]
)
def test_few_compositions_find_the_noise_and_the_steps(monkeypatch, target, delta, rate, steps):
    calls = []
    prv = curve._prv
    monkeypatch.setattr(curve, "_prv", lambda *a: calls.append(a) or prv(*a))
    curve.bound.cache_clear()
    sigma = noise_multiplier_for(target, delta=delta, sample_rate=rate, steps=steps)
    assert epsilon([(sigma, rate, steps)], delta) <= target
    assert epsilon([(0.996 * sigma, rate, steps)], delta) > target
    assert len(calls) <= 6
    calls.clear()
    plan = {"delta": delta, "noise_multiplier": sigma, "sample_rate": rate}
    n = affordable_steps(0.8 * target, limit=steps, **plan)
    assert len(calls) <= 12
    assert epsilon([(sigma, rate, n)], delta) <= 0.8 * target
    assert epsilon([(sigma, rate, n + 1)], delta) > 0.8 * target


def test_tiny_targets_are_met():
    sigma = noise_multiplier_for(0.05, delta=DELTA, sample_rate=0.01, steps=1000)
    assert epsilon([(sigma, 0.01, 1000)], DELTA) <= 0.05
    assert epsilon([(0.99 * sigma, 0.01, 1000)], DELTA) > 0.05
    with pytest.raises(InputError, match="some noise can meet"):
        noise_multiplier_for(0.005, delta=1e-9, sample_rate=0.01, steps=1000)
