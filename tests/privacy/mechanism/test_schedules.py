"""Schedules of σ and C."""

import pytest

from defend import InputError
from defend.privacy.mechanism.schedules import Decay, factor


def test_decay_is_exponential_or_in_stairs():
    assert [Decay(0.5)(t) for t in range(4)] == [1.0, 0.5, 0.25, 0.125]
    assert [Decay(2.0, every=2)(t) for t in range(5)] == [1.0, 1.0, 2.0, 2.0, 4.0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"gamma": 0.0}, "`gamma` to be > 0"), ({"gamma": 1.0, "every": 0}, "`every` to be ≥ 1")],
)
def test_bad_settings(settings, message):
    with pytest.raises(InputError, match=message):
        Decay(**settings)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_factor_that_ends_the_noise_is_refused(value):
    with pytest.raises(InputError, match=r"a finite factor > 0, got .* at step 3"):
        factor(lambda step: value, 3)


def test_a_schedule_that_overflows_says_so():
    with pytest.raises(InputError, match=r"a finite factor > 0, got inf at step 8000"):
        factor(Decay(1.1), 8000)


def test_no_schedule_is_constant():
    assert factor(None, 5) == 1.0
