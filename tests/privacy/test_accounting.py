import math

import pytest

from defend import InputError
from defend.privacy.accounting import (
    Segment,
    affordable_steps,
    epsilon,
    extend,
    noise_multiplier_for,
    total_steps,
)

DELTA = 1e-5


def second_opinion(history, delta):
    """ε by Google's dp-accounting (privacy loss distributions), independent of Opacus."""
    import dp_accounting
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    for sigma, rate, steps in history:
        event = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(sigma))
        accountant.compose(event, steps)
    return accountant.get_epsilon(delta)


@pytest.mark.parametrize(
    "history",
    [
        [(1.0, 0.01, 1)],
        [(1.0, 0.02, 500)],
        [(0.7, 0.05, 100)],
        [(2.0, 0.25, 200)],
        [(4.0, 1.0, 50)],
        [(1.0, 0.02, 300), (2.0, 0.05, 100)],
    ],
)
def test_agrees_with_a_second_accountant(history):
    reference = second_opinion(history, DELTA)
    # PRV reports an upper bound, its discretization error (0.01) included.
    assert reference - 0.005 <= epsilon(history, DELTA, "prv") <= reference + 0.05
    assert epsilon(history, DELTA, "rdp") >= reference
    # The same comparison rejects one step more in twenty, and 2% less noise.
    sigma, rate, steps = history[0]
    if steps >= 100:
        assert epsilon([(sigma, rate, steps * 1.05), *history[1:]], DELTA) > reference + 0.02
        assert epsilon([(sigma * 0.98, rate, steps), *history[1:]], DELTA) > reference + 0.02


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
