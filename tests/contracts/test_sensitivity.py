"""One record, one contribution: every supported combination within C, every planted one flagged."""

import re

import pytest

from tests.contracts.planted import PLANTED, move_of
from tests.contracts.sensitivity import BOUND, COMBINATIONS, RANKS, table
from tests.contracts.table import README


@pytest.mark.parametrize("ranks", RANKS)
def test_every_supported_combination_stays_within_one_clip(ranks):
    found = table(ranks)
    assert set(found) == set(COMBINATIONS)
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
    block = re.search(r"<!-- sensitivity: begin -->(.*?)<!-- sensitivity: end -->",
                      README.read_text(), re.DOTALL)  # fmt: skip
    assert block is not None
    for objective in {c.objective for c in COMBINATIONS}:
        assert f"| {objective} |" in block[1]
    told = dict(re.findall(r"\| (.+?) \| ([\d.]+) C \|\n", block[1].split("| planted")[1]))
    assert set(told) == set(PLANTED)
    for name, figure in told.items():
        assert float(figure) == pytest.approx(move_of(name), abs=0.02)
