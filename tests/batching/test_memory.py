"""Rows that fit, from two measurements of a simulated memory."""

import pytest

from defend.batching.memory import rows_that_fit


class Memory:
    """fixed + per_row bytes, and a record of what was asked."""

    def __init__(self, fixed, per_row):
        self.fixed, self.per_row, self.asked = fixed, per_row, []

    def __call__(self, rows):
        self.asked.append(rows)
        return self.fixed + rows * self.per_row


@pytest.mark.parametrize("fixed", [0, 1_000_000])
@pytest.mark.parametrize("per_row", [1, 1_000, 777])
@pytest.mark.parametrize("free", [2_000_000, 50_000_000])
def test_uses_the_share_and_never_more(fixed, per_row, free):
    memory = Memory(fixed, per_row)
    rows = rows_that_fit(memory, free, most=10**9)
    assert fixed + rows * per_row <= 0.8 * free < fixed + (rows + 1) * per_row
    assert max(memory.asked) <= 12  # small steps only


def test_never_more_than_is_wanted():
    assert rows_that_fit(Memory(0, 1), 10**9, most=300) == 300


def test_never_less_than_one():
    assert rows_that_fit(Memory(10**9, 10**9), 1000, most=300) == 1


def test_batches_that_are_small_anyway_are_not_measured():
    memory = Memory(0, 10**9)
    assert rows_that_fit(memory, 1, most=3) == 3
    assert memory.asked == []


def test_memory_that_does_not_grow_is_no_division_by_zero():
    assert rows_that_fit(lambda rows: 5, 1000, most=50) == 50
