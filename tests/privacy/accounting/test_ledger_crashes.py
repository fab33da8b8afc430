import os
import random
import signal
import threading
import time
from contextlib import contextmanager

import pytest

from defend import PrivacyError
from defend.privacy.accounting import ledger as module
from defend.privacy.accounting.ledger import Ledger, read_ledger

from .ledgers import STEP, count, filled, posix


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.jsonl"


# --- disks and other writers ----------------------------------------------------------------------


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


# --- processes and signals ------------------------------------------------------------------------


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
