"""Seconds of the blocks, not of what lies between them."""

import time

import pytest
import torch

from defend.training.stopwatch import Stopwatch


def test_seconds_add_up_and_pauses_do_not_count():
    watch = Stopwatch(torch.device("cpu"))
    assert watch.read() == 0
    start = time.perf_counter()
    for _ in range(3):
        with watch:
            time.sleep(0.02)
        time.sleep(0.05)
    # On a busy machine a sleep may be longer than it says, but not shorter.
    assert 0.06 <= watch.read() <= time.perf_counter() - start - 3 * 0.05
    assert watch.read() == watch.read()


def test_a_block_that_fails_counts_too():
    watch = Stopwatch(torch.device("cpu"))

    def fail():
        with watch:
            time.sleep(0.02)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert watch.read() >= 0.02


class Queue:
    """A device that runs what it is given only when somebody waits for it."""

    def __init__(self):
        self.now, self.waiting, self.waits = 0.0, [], 0

    def work(self, milliseconds):
        self.waiting.append(milliseconds)

    def run(self):
        while self.waiting:
            item = self.waiting.pop(0)
            if isinstance(item, Event):
                item.at = self.now
            else:
                self.now += item

    def event(self, enable_timing):
        assert enable_timing
        return Event(self)


class Event:
    def __init__(self, queue):
        self.queue, self.at = queue, None

    def record(self):
        self.queue.waiting.append(self)

    def query(self):
        return self.at is not None

    def synchronize(self):
        self.queue.waits += 1
        self.queue.run()

    def elapsed_time(self, end):
        return end.at - self.at


@pytest.fixture
def queue(monkeypatch):
    queue = Queue()
    monkeypatch.setattr(torch.cuda, "Event", queue.event)
    return queue


def test_on_a_gpu_nobody_waits_before_the_reading(queue):
    watch = Stopwatch(torch.device("cuda"))
    for _ in range(3):
        with watch:
            queue.work(250.0)
        queue.work(4000.0)
    assert queue.waits == 0
    assert watch.read() == 0.75
    assert queue.waits == 3
    assert watch.read() == 0.75


def test_on_a_gpu_what_is_over_is_added_on_the_way(queue):
    watch = Stopwatch(torch.device("cuda"))
    for _ in range(1000):
        with watch:
            queue.work(1.0)
        queue.run()
    assert len(watch._pairs) <= 2
    assert queue.waits == 0
    assert watch.read() == pytest.approx(1.0)


@pytest.mark.cuda
def test_on_a_real_gpu():
    watch, matrix = Stopwatch(torch.device("cuda")), torch.rand(4096, 4096, device="cuda")
    for _ in range(20):
        with watch:
            matrix @ matrix
    assert 0.001 < watch.read() < 10
