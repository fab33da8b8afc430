import hashlib
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from defend import PrivacyError
from defend.privacy.accounting.ledger import Anchor, Ledger, read_ledger

from .ledgers import STEP, filled


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.jsonl"


def test_the_chain_is_the_one_of_the_docstring(path):
    filled(path)
    digest = ""
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        text = line.replace(f', "digest": "{entry["digest"]}"}}', "")
        digest = hashlib.sha256((digest + text).encode()).hexdigest()
        assert entry["digest"] == digest
    assert [entry["kind"] for entry in read_ledger(path)] == ["ledger", "fit", *["step"] * 3]


def test_two_ledgers_of_the_same_run_differ(tmp_path):
    assert filled(tmp_path / "one") != filled(tmp_path / "two")


def test_every_single_byte_edit_is_seen_with_the_anchor(path):
    anchor = filled(path, steps=1)
    good = path.read_bytes()
    assert len(read_ledger(path, anchor=anchor)) == 3
    rng = random.Random(1)
    for position in range(len(good)):
        # One bit, a line end, and something at random.
        for new in {good[position] ^ 1, 10, rng.randrange(256)} - {good[position]}:
            path.write_bytes(good[:position] + bytes([new]) + good[position + 1 :])
            with pytest.raises(PrivacyError, match=r"^Expected .*, (as|got)"):
                read_ledger(path, anchor=anchor)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_lines_dropped_moved_doubled_or_put_in_are_seen_with_the_anchor(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("edits") / "ledger.jsonl"
    anchor = filled(path, steps=4)
    lines = path.read_bytes().splitlines(keepends=True)
    picks = data.draw(st.lists(st.integers(0, len(lines) - 1), max_size=8))
    path.write_bytes(b"".join(lines[i] for i in picks))
    if picks[: len(lines)] == list(range(len(lines))):
        picks = picks[len(lines) :]
        if not picks:
            assert len(read_ledger(path, anchor=anchor)) == len(lines)
            return
    with pytest.raises(PrivacyError, match="Expected"):
        read_ledger(path, anchor=anchor)


@pytest.mark.parametrize("number", [1, 2, 3, 5])
def test_an_edited_line_is_named(path, number):
    filled(path)
    lines = path.read_bytes().splitlines(keepends=True)
    line = lines[number - 1]
    lines[number - 1] = line[:45] + (b"1" if line[45:46] == b"0" else b"0") + line[46:]
    path.write_bytes(b"".join(lines))
    for read in (read_ledger, Ledger.open):
        with pytest.raises(PrivacyError, match=f"got another line {number}: its digest"):
            read(path)


def test_more_noise_written_in_afterwards_is_seen(path):
    filled(path)
    path.write_text(path.read_text().replace('"noise_multiplier": 1.1', '"noise_multiplier": 9.1'))
    with pytest.raises(PrivacyError, match="got another line 3: its digest does not match"):
        Ledger.open(path)


def test_a_cut_at_a_line_end_is_seen_up_to_the_anchor_and_not_beyond(path):
    early = filled(path, steps=1)
    with Ledger.open(path) as ledger:
        ledger.charge("a", **STEP)
        late = ledger.anchor
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    with pytest.raises(
        PrivacyError, match=r"at least 4 lines in .* got 3 whole ones. The file was"
    ):
        Ledger.open(path, anchor=late)
    assert len(read_ledger(path, anchor=early)) == 3  # as the docstring says


def test_another_runs_ledger_is_refused(tmp_path):
    anchor = filled(tmp_path / "one")
    filled(tmp_path / "two", steps=9)
    for read in (read_ledger, Ledger.open):
        with pytest.raises(PrivacyError, match=r"line 5 is another. It belongs to another run"):
            read(tmp_path / "two", anchor=anchor)


def test_a_missing_or_emptied_ledger_is_refused_where_one_is_expected(path):
    anchor = Anchor(3, "0" * 64)
    for expected in ({"must_exist": True}, {"anchor": anchor}):
        with pytest.raises(PrivacyError, match=r"an earlier run at .*, got no file"):
            Ledger.open(path, **expected)
        assert not path.exists()
    with pytest.raises(PrivacyError, match="got no file"):
        read_ledger(path)
    path.touch()
    with pytest.raises(PrivacyError, match=r"got a file without one. Its content was lost"):
        Ledger.open(path, must_exist=True)
    with pytest.raises(PrivacyError, match="got a file without one"):
        read_ledger(path)
    with pytest.raises(PrivacyError, match="at least 3 lines"):
        Ledger.open(path, anchor=anchor)
    assert path.read_bytes() == b""
    Ledger.open(path).close()  # not expected to hold anything: a new one
    assert len(read_ledger(path)) == 1


@pytest.mark.parametrize("text", ["notes\n", "notes", '{"kind": "fit"}\n', "\n", "\0\0\0"])
def test_a_file_that_is_no_ledger_is_refused_and_left_alone(path, text):
    path.write_text(text)
    for read in (read_ledger, Ledger.open):
        with pytest.raises(PrivacyError, match=r"ledger of version 1, got .* not start like one"):
            read(path)
    assert path.read_text() == text
