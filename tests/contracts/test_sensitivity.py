"""One record, one contribution: every supported combination within C, every planted one flagged."""

import re

import pytest

from tests.contracts.planted import PLANTED, move_of
from tests.contracts.sensitivity import BOUND, RANKS, combinations, table
from tests.contracts.sensitivity_table import BEGIN, END, lines
from tests.contracts.table import README


@pytest.mark.parametrize("ranks", RANKS)
def test_every_supported_combination_stays_within_one_clip(ranks):
    found = table(ranks)
    assert set(found) == set(combinations(ranks))
    assert max(found.values()) <= BOUND
    assert min(found.values()) > 0.9  # records are clipped: the bound is reached, not far away


@pytest.mark.parametrize("name", PLANTED)
def test_every_planted_wrong_version_is_flagged(name):
    assert move_of(name) > 1.05


def test_chunks_and_processes_change_nothing():
    for ranks in RANKS[1:]:
        for combination, move in table(ranks).items():
            assert move == pytest.approx(table(1)[combination], abs=1e-5)


def test_the_readme_tells_what_is_found():
    text = README.read_text().split(BEGIN)[1].split(END)[0]
    told = [line for line in text.splitlines() if line]
    found = [line for line in lines() if line]
    assert len(told) == len(found)
    for mine, theirs in zip(found, told, strict=True):
        assert re.split(r"[\d.]+ C", mine) == re.split(r"[\d.]+ C", theirs)
        pairs = zip(re.findall(r"([\d.]+) C", mine), re.findall(r"([\d.]+) C", theirs), strict=True)
        assert all(float(a) == pytest.approx(float(b), abs=0.02) for a, b in pairs)
