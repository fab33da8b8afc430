import copy
import dataclasses
import json
import os
import pickle
import random
import signal
import threading
import time
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from defend import InputError, PrivacyError
from defend.privacy import ledger as module
from defend.privacy.accounting import Segment, extend, total_steps
from defend.privacy.ledger import Anchor, Ledger, read_ledger, spent

STEP = {"noise_multiplier": 1.1, "sample_rate": 0.02, "max_grad_norm": 1.0}
posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and signals")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.jsonl"


def filled(path, steps=3, **facts):
    """A ledger with one fit, closed; its anchor."""
    with Ledger.open(path) as ledger:
        ledger.begin("a", insecure=False, delta=1e-5, **facts)
        for _ in range(steps):
            ledger.charge("a", **STEP)
        return ledger.anchor


def count(path):
    with Ledger.open(path) as ledger:
        return sum(total_steps(history) for history in ledger.fits.values())


def in_child(work):
    """Fork; the child runs `work` and ends with 0, or 1 if it raised. Returns its pid."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return pid


# What it holds


def test_steps_are_counted_by_fit_and_merged_as_the_accounting_does(path):
    rng = random.Random(0)
    expected = {"b": (), "a": (), "idle": ()}
    with Ledger.open(path) as ledger:
        for fit in expected:
            ledger.begin(fit, insecure=False)
        for _ in range(60):
            fit, sigma = rng.choice("ab"), rng.choice([1.0, 1.5])
            ledger.charge(fit, noise_multiplier=sigma, sample_rate=0.1, max_grad_norm=1.0)
            expected[fit] = extend(expected[fit], Segment(sigma, 0.1, 1))
        assert ledger.fits == expected
    assert list(spent(read_ledger(path)).items()) == list(expected.items())
    with Ledger.open(path) as again:
        assert list(again.fits.items()) == list(expected.items())
        assert any(len(history) > 5 for history in again.fits.values())


def test_reopened_and_gone_on_is_the_same_as_in_one_go(path):
    anchor = filled(path)
    for round_ in range(1, 4):
        with Ledger.open(path, anchor=anchor, must_exist=True) as ledger:
            assert ledger.anchor.lines == 5 + 3 * (round_ - 1)
            ledger.begin(f"resumed {round_}", insecure=False)
            ledger.charge("a", **STEP)
            ledger.charge(f"resumed {round_}", **STEP)
            assert ledger.fits["a"] == ((1.1, 0.02, 3 + round_),)
    assert count(path) == 9  # from the first anchor: a rollback refunds nothing


def test_facts_and_what_is_insecure(path):
    filled(path, records=100, sampling="poisson", data_digest=None)
    with Ledger.open(path) as ledger:
        facts = {"insecure": False, "delta": 1e-5, "records": 100, "sampling": "poisson"}
        assert ledger.facts == {"a": {**facts, "data_digest": None}}
        assert not ledger.insecure
        ledger.begin("seeded", insecure=True)
        assert ledger.insecure
        ledger.begin("secret", insecure=False)
    with Ledger.open(path) as ledger:
        assert ledger.insecure
        assert list(ledger.facts) == ["a", "seeded", "secret"]


@settings(max_examples=50, deadline=None)
@given(
    sigma=st.floats(0, 1e300),
    rate=st.floats(0, 1, exclude_min=True),
    norm=st.floats(0, 1e300, exclude_min=True),
)
def test_floats_come_back_exactly(tmp_path_factory, sigma, rate, norm):
    path = tmp_path_factory.mktemp("floats") / "ledger.jsonl"
    with Ledger.open(path) as ledger:
        ledger.begin("a", insecure=False)
        ledger.charge("a", noise_multiplier=sigma, sample_rate=rate, max_grad_norm=norm)
    step = read_ledger(path)[-1]
    assert (step["noise_multiplier"], step["sample_rate"], step["max_grad_norm"]) == (
        sigma,
        rate,
        norm,
    )


def test_the_chain_is_the_one_of_the_docstring(path):
    import hashlib

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


def test_an_anchor_goes_through_a_checkpoint(path):
    anchor = filled(path)
    assert Anchor(**json.loads(json.dumps(dataclasses.asdict(anchor)))) == anchor


def test_reading_takes_microseconds_a_line(path, monkeypatch):
    monkeypatch.setattr(module, "_sync", lambda descriptor: None)
    filled(path, steps=20_000)
    start = time.process_time()
    with Ledger.open(path) as ledger:
        assert ledger.fits == {"a": ((1.1, 0.02, 20_000),)}
    assert time.process_time() - start < 1.0  # 0.1 s on a quiet core


# Edits


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


# Torn last lines


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


# Bad arguments


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
@pytest.mark.parametrize("name", list(STEP))
def test_settings_out_of_range_are_refused_and_not_charged(path, name, bad):
    filled(path)
    with Ledger.open(path) as ledger:
        with pytest.raises(InputError, match=f"Expected `{name}` to be"):
            ledger.charge("a", **{**STEP, name: bad})
        if name != "noise_multiplier":
            with pytest.raises(InputError, match=f"Expected `{name}` to be"):
                ledger.charge("a", **{**STEP, name: 0.0})
    assert count(path) == 3


def test_names_and_facts_are_checked(path):
    with Ledger.open(path) as ledger:
        with pytest.raises(InputError, match=r"got 'a'. Call `begin` first"):
            ledger.charge("a", **STEP)
        ledger.begin("a", insecure=False)
        with pytest.raises(InputError, match="a new name for a fit, got 'a' again"):
            ledger.begin("a", insecure=False)
        with pytest.raises(InputError, match=r"under other names, got \['digest', 'kind'\]"):
            ledger.begin("b", insecure=False, kind="step", digest="")
        for fact in (float("nan"), object()):
            with pytest.raises(InputError, match="facts that JSON can hold, got"):
                ledger.begin("b", insecure=False, fact=fact)
        assert list(ledger.fits) == ["a"]
    with pytest.raises(InputError, match="`lines` ≥ 1, got 0"):
        Anchor(0, "0" * 64)


def test_a_closed_ledger_takes_nothing(path):
    filled(path)
    ledger = Ledger.open(path)
    ledger.close()
    ledger.close()
    with pytest.raises(PrivacyError, match=r"an open ledger, got .* closed"):
        ledger.charge("a", **STEP)


def test_a_ledger_has_one_writer_and_no_copies(path):
    with Ledger.open(path) as ledger:
        for duplicate in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(PrivacyError, match=r"one writer of .*, got a copy"):
                duplicate(ledger)
        with pytest.raises(PrivacyError, match=r"no other run has open, got .* locked. Wait"):
            Ledger.open(path)
    Ledger.open(path).close()


def test_a_forgotten_ledger_gives_its_lock_back(path):
    Ledger.open(path)
    Ledger.open(path).close()


def test_a_refused_ledger_is_not_left_locked(path):
    filled(path)
    with pytest.raises(PrivacyError, match="another run"):
        Ledger.open(path, anchor=Anchor(2, "0" * 64))
    assert count(path) == 3


# Disks and signals


def test_a_charge_is_one_write_then_one_flush(path, monkeypatch):
    calls = []
    write = os.write
    filled(path)
    with Ledger.open(path) as ledger:
        monkeypatch.setattr(os, "write", lambda fd, b: calls.append(b) or write(fd, b))
        monkeypatch.setattr(module, "_sync", lambda fd: calls.append(path.read_bytes()))
        ledger.charge("a", **STEP)
        monkeypatch.undo()
    line, flushed = calls
    assert line.endswith(b"\n")
    assert flushed == path.read_bytes()
    assert flushed.endswith(line)


@posix
def test_the_name_of_a_new_ledger_is_flushed_too(path, monkeypatch):
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda fd: flushed.append(os.fstat(fd).st_ino))
    path = path.parent / "new" / path.name
    Ledger.open(path).close()
    assert path.parent.stat().st_ino in flushed


@contextmanager
def room_for(size):
    """A full disk, as near as it gets: files may not grow beyond `size` bytes."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


@posix
@pytest.mark.parametrize(("room", "match"), [(50, "50 of 1.. bytes were"), (0, "too large")])
def test_a_full_disk_stops_the_step_and_leaves_nothing(path, room, match):
    filled(path)
    before = path.read_bytes()
    ledger = Ledger.open(path)
    with (
        room_for(len(before) + room),
        pytest.raises(PrivacyError, match=f"to write the step to .* got: .*{match}.* not taken"),
    ):
        ledger.charge("a", **STEP)
    assert path.read_bytes() == before
    with pytest.raises(PrivacyError, match="closed"):  # room again, but open anew
        ledger.charge("a", **STEP)
    assert count(path) == 3


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
def test_a_failed_flush_or_an_interrupt_charges_nothing(path, monkeypatch, error):
    filled(path)
    before = path.read_bytes()

    def fail(descriptor):
        monkeypatch.undo()
        raise error

    ledger = Ledger.open(path)
    monkeypatch.setattr(module, "_sync", fail)
    with pytest.raises((PrivacyError, KeyboardInterrupt)) as raised:
        ledger.charge("a", **STEP)
    assert isinstance(error, OSError) == ("Input/output error" in str(raised.value))
    assert path.read_bytes() == before
    assert count(path) == 3


def test_another_writer_is_noticed_before_the_next_line(path):
    filled(path)
    with Ledger.open(path) as ledger:
        with path.open("a") as file:
            file.write("x")
        with pytest.raises(PrivacyError, match=r"as this run left it, got \d+. Something else"):
            ledger.charge("a", **STEP)


def test_without_locks_a_second_writer_is_noticed_too(path, monkeypatch):
    monkeypatch.setattr(module, "fcntl", None)  # as on Windows
    filled(path)
    with Ledger.open(path) as one, Ledger.open(path) as two:
        one.charge("a", **STEP)
        with pytest.raises(PrivacyError, match="Something else writes to it"):
            two.charge("a", **STEP)
    assert count(path) == 4


@posix
def test_killed_in_a_tight_loop_it_never_counts_too_little(path):
    rng = random.Random(2)
    acknowledged = 0
    with Ledger.open(path) as ledger:
        ledger.begin("a", insecure=False, **STEP)
    over = 0
    for _ in range(20):
        reading, writing = os.pipe()

        def victim(writing=writing):
            with Ledger.open(path) as ledger:
                while True:
                    ledger.charge("a", **STEP)
                    os.write(writing, b".")  # the step would be taken here

        pid = in_child(victim)
        os.close(writing)
        assert os.read(reading, 1) == b"."  # it runs
        time.sleep(rng.uniform(0, 0.03))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL
        said = 1
        while part := os.read(reading, 65536):
            said += len(part)
        os.close(reading)
        counted = count(path) - acknowledged - over
        assert said <= counted <= said + 1
        acknowledged, over = acknowledged + said, over + counted - said
    assert acknowledged > 40
    assert len(read_ledger(path)) == 2 + acknowledged + over


@posix
def test_charging_after_the_step_would_count_too_little(path):
    """The wrong order, which the comparison of the test above must reject."""
    filled(path, steps=0)
    reading, writing = os.pipe()

    def victim():
        with Ledger.open(path) as ledger:
            os.write(writing, b".")
            os.kill(os.getpid(), signal.SIGKILL)
            ledger.charge("a", **STEP)

    os.waitpid(in_child(victim), 0)
    assert not len(os.read(reading, 10)) <= count(path)
    os.close(reading), os.close(writing)


@posix
def test_of_racing_processes_one_gets_the_ledger(path):
    for _ in range(20):
        go, start = os.pipe()
        told, tell = os.pipe()
        hold, let_go = os.pipe()

        def racer(go=go, start=start, tell=tell, hold=hold, let_go=let_go):
            os.close(start), os.close(let_go)
            os.read(go, 1)  # returns for all at once, when `start` is closed
            try:
                ledger = Ledger.open(path)
            except PrivacyError as error:
                os.write(tell, b"0" if "locked" in str(error) else b"?")
            else:
                os.write(tell, b"1")
                os.read(hold, 1)
                ledger.close()

        racers = [in_child(racer) for _ in range(2)]
        os.close(start)
        answers = os.read(told, 1) + os.read(told, 1)
        os.close(let_go)
        assert [os.waitpid(pid, 0)[1] for pid in racers] == [0, 0]
        assert sorted(answers) == sorted(b"01")
        for end in (go, told, tell, hold):
            os.close(end)
    assert len(read_ledger(path)) == 1  # of all that raced to make it


@posix
def test_a_forked_child_neither_writes_nor_frees_nor_keeps_the_lock(path):
    with Ledger.open(path) as ledger:
        ledger.begin("a", insecure=False)

        def child():
            with pytest.raises(PrivacyError, match="closed, by `close`, a failed write or a fork"):
                ledger.charge("a", **STEP)
            ledger.close()
            with pytest.raises(PrivacyError, match="locked"):
                Ledger.open(path)

        assert os.waitpid(in_child(child), 0)[1] == 0
        with pytest.raises(PrivacyError, match="locked"):
            Ledger.open(path)
    # A loader's worker outlives its killed parent by seconds; the resumed run must not wait.
    told, tell = os.pipe()

    def parent():
        ledger = Ledger.open(path)
        worker = in_child(lambda: time.sleep(30))
        os.write(tell, str(worker).encode())
        os.kill(os.getpid(), signal.SIGKILL)
        ledger.close()

    os.waitpid(in_child(parent), 0)
    worker = int(os.read(told, 20))
    try:
        Ledger.open(path, must_exist=True).close()
    finally:
        os.kill(worker, signal.SIGKILL)
        os.close(told), os.close(tell)


def test_reviewers_read_while_it_is_written(path):
    filled(path, steps=1)
    stop, failures, lengths = threading.Event(), [], []

    def review():
        while not stop.is_set():
            try:
                lengths.append(len(read_ledger(path)))
            except Exception as error:
                failures.append(error)

    reviewer = threading.Thread(target=review)
    with Ledger.open(path) as ledger:
        reviewer.start()
        for _ in range(300):
            ledger.charge("a", **STEP)
        stop.set()
        reviewer.join()
        final = len(read_ledger(path))
    assert failures == []
    assert lengths == sorted(lengths)
    assert len(set(lengths)) > 3
    assert final == 303
