"""A last line that is not whole was being written in a crash."""

import pytest

from defend import PrivacyError
from defend.privacy.accounting.ledger import Ledger, read_ledger

from .ledgers import STEP, count, filled


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.jsonl"


@pytest.mark.parametrize("kept", [1, 20, 100, 160, -1])
def test_a_torn_line_after_a_step_becomes_one_step(path, kept):
    anchor = filled(path, steps=2)
    whole = path.read_bytes()
    path.write_bytes(whole + whole.splitlines(keepends=True)[-1][:kept])
    assert len(read_ledger(path, anchor=anchor)) == 4  # a reader leaves it out
    with Ledger.open(path, anchor=anchor) as ledger:
        assert ledger.fits == {"a": ((1.1, 0.02, 3),)}
        ledger.charge("a", **STEP)
    entries = read_ledger(path, anchor=anchor)
    assert [entry.get("torn", False) for entry in entries] == [False] * 4 + [True, False]
    assert entries[4]["max_grad_norm"] == 1.0
    assert count(path) == 4  # mended once


def test_a_last_line_of_garbage_is_torn_too(path):
    filled(path, steps=2)
    with path.open("ab") as file:
        file.write(b"\0" * 100 + b'}"\n')  # a block that never reached the disk
    assert count(path) == 3


def test_a_torn_first_step_is_charged_if_its_fit_said_at_what(path):
    with Ledger.open(path) as ledger:
        ledger.begin("a", insecure=False)
        ledger.charge("a", **STEP)
        ledger.begin("b", insecure=False, **{**STEP, "noise_multiplier": 0.5})
    with path.open("a") as file:
        file.write('{"kind": "st')
    with Ledger.open(path) as ledger:
        assert ledger.fits == {"a": ((1.1, 0.02, 1),), "b": ((0.5, 0.02, 1),)}


def test_a_torn_line_before_any_setting_charges_nothing_and_is_marked(path):
    filled(path, steps=0, noise_multiplier=None, sample_rate=0.1, max_grad_norm=1.0)
    with path.open("a") as file:
        file.write('{"ki')
    with Ledger.open(path) as ledger:
        assert ledger.fits == {"a": ()}
        ledger.charge("a", **STEP)
    assert [e["kind"] for e in read_ledger(path)] == ["ledger", "fit", "note", "step"]
    assert read_ledger(path)[2]["torn"]


@pytest.mark.parametrize("kept", [1, 30, 60, 130])
def test_a_torn_first_line_is_a_new_ledger(path, kept):
    Ledger.open(path).close()
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(PrivacyError, match="got a file without one"):
        read_ledger(path)
    filled(path)
    assert count(path) == 3


def test_a_line_torn_inside_the_anchor_is_a_cut(path):
    anchor = filled(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(PrivacyError, match="got 4 whole ones"):
        Ledger.open(path, anchor=anchor)
