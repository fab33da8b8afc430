"""ε against the accountants of others."""

import pytest

from defend.privacy.accounting.curve import epsilon

from .accountants import opacus_epsilon, second_opinion

DELTA = 1e-5


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
    reference = second_opinion(history, DELTA, 5e-4)
    # PRV reports an upper bound, its discretization error (0.01) included.
    assert reference - 0.005 <= epsilon(history, DELTA, "prv") <= reference + 0.05
    assert epsilon(history, DELTA, "rdp") >= reference
    # The same comparison rejects one step more in twenty, and 2% less noise.
    sigma, rate, steps = history[0]
    if steps >= 100:
        assert epsilon([(sigma, rate, steps * 1.05), *history[1:]], DELTA) > reference + 0.02
        assert epsilon([(sigma * 0.98, rate, steps), *history[1:]], DELTA) > reference + 0.02


@pytest.mark.parametrize(
    ("history", "delta"),
    [
        ([(0.8, 1e-4, 1)], 1e-8),
        ([(0.5, 0.01, 30)], 1e-3),
        ([(1.0, 0.02, 500)], 1e-5),
        ([(2.0, 0.25, 200)], 1e-5),
        ([(1.5, 1e-3, 10_000)], 1e-6),
        ([(10.0, 0.5, 100)], 1e-7),
        ([(4.0, 1.0, 50)], 1e-5),
        ([(1.0, 0.02, 300), (2.0, 0.05, 100)], 1e-5),
        ([(1.2, 0.01, 100), (0.9, 0.3, 2), (3.0, 0.1, 30)], 1e-4),
    ],
)
def test_agrees_with_the_accountants_of_opacus(history, delta):
    rdp, prv = (opacus_epsilon(history, delta, mechanism) for mechanism in ("rdp", "prv"))

    def agrees(scale):
        ours = [(scale * sigma, rate, steps) for sigma, rate, steps in history]
        same = epsilon(ours, delta, "rdp") == pytest.approx(rdp, rel=1e-6)
        return same, prv - 1e-5 <= epsilon(ours, delta, "prv") <= prv + 1e-3

    assert agrees(1.0) == (True, True)
    assert agrees(1.01) == agrees(0.9) == (False, False)


@pytest.mark.parametrize("sigma", [0.6, 1.0, 4.0])
@pytest.mark.parametrize("rate", [1e-3, 0.02, 0.3])
@pytest.mark.parametrize("steps", [1, 30, 1000])
def test_grid_against_a_second_accountant(sigma, rate, steps):
    if epsilon([(sigma, rate, steps)], DELTA, "rdp") > 40:  # the second accountant is slow there
        steps //= 10
    # It rounds losses up, by more than small ones are.
    reference = second_opinion([(sigma, rate, steps)], DELTA, 3e-4 if rate < 0.01 else 1e-3)
    ours = epsilon([(sigma, rate, steps)], DELTA)
    assert reference - 2e-3 <= ours <= reference + 0.015
    if reference > 1:  # and that is close enough to tell what is planted
        assert epsilon([(sigma, 0.95 * rate, steps)], DELTA) < reference - 2e-3
        assert epsilon([(sigma / 2, rate, steps)], DELTA) > reference + 0.015
