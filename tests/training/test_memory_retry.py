"""Chunks that run out of memory are halved: nothing is lost, and nothing counts twice."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset

from defend import DifferentialPrivacy
from tests.helpers import Net, data, flat, loader, trainer

ROOT = Path(__file__).parents[2]
MESSAGE = "rows did not fit"


def private(**settings):
    fixed = {"delta": 1e-3, "max_grad_norm": 0.5, "noise_multiplier": 0.0, "accountant": "rdp"}
    return DifferentialPrivacy(**{**fixed, "insecure_seed": 3, "ledger": False, **settings})


class _Full(torch.autograd.Function):
    """Passes its input on, and finds no memory in backward."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise torch.OutOfMemoryError("simulated: backward")


class Small(Net):
    """Memory for `fits` rows, from step `since` on; fails at one of three places."""

    def __init__(self, fits=None, where="forward", since=0, in_chunk=None):
        super().__init__()
        self.fits, self.where, self.since, self.in_chunk = fits, where, since, in_chunk
        self.rows, self.chunks = [], 0

    def forward(self, x):
        x = x.flatten(1)
        if not self.training or self._trainer is None:
            return self.net(x)
        self.chunks += 1
        self.rows.append((self.trainer.global_step, len(x)))
        if not self.is_full(len(x)):
            return self.net(x)
        if self.where == "forward":
            raise torch.OutOfMemoryError("simulated: forward")
        if self.where == "first":  # no gradient has come yet
            return _Full.apply(self.net(x))
        hidden = self.net[:2](x)  # the last layer has its gradients, the first has none
        return self.net[2](_Full.apply(hidden))

    def is_full(self, rows):
        if self.in_chunk is not None:
            return self.chunks == self.in_chunk
        return self.fits is not None and rows > self.fits and self.trainer.global_step >= self.since


def fit(callback, module, batches=None, extra=(), **settings):
    """Also gives the warnings about memory. The self-test is left out: it would run out too."""
    pl.seed_everything(0)
    run = trainer(callbacks=[callback, *extra], **settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.fit(module, batches or loader(256, 32))
    return run, [str(w.message) for w in caught if MESSAGE in str(w.message)]


def small(fits=None, **place):
    pl.seed_everything(0)
    return Small(fits, **place)


def of_chunks(size, **settings):
    """What a run with chunks of that size from the start ends with."""
    module = small()
    fit(private(chunk_size=size, selftest=False), module, **settings)
    return flat(module)


@pytest.mark.parametrize("where", ["forward", "first", "middle"])
@pytest.mark.parametrize("fits", [16, 5])
def test_halves_give_what_small_chunks_give(where, fits):
    callback, module = private(chunk_size=None, selftest=False), small(fits, where=where)
    run, messages = fit(callback, module, max_epochs=2)
    assert callback.steps == run.global_step == 16
    assert messages
    torch.testing.assert_close(flat(module), of_chunks(fits, max_epochs=2), rtol=0, atol=1e-6)
    assert all(p.grad is None for p in module.parameters())


def test_the_comparison_sees_a_row_that_counts_twice_or_not_at_all():
    """A planted wrong answer: the chunk that fails is lost, or half of it."""
    for chunk in ([0, 0], [0]):

        class Wrong(Small):
            def training_step(self, batch, batch_idx):
                x, y = batch
                if self.trainer.global_step == 3:  # one record in another's place
                    x = torch.cat([x[: len(x) - len(chunk)], x[chunk]])  # noqa: B023
                return F.cross_entropy(self(x), y)

        pl.seed_everything(0)
        module = Wrong()
        fit(private(chunk_size=16, selftest=False), module)
        assert (flat(module) - of_chunks(16)).abs().max() > 1e-5


def test_the_next_batches_use_the_smaller_chunk_from_the_start():
    module = small(20, since=2)
    _, messages = fit(private(chunk_size=None, selftest=False), module)
    assert len(messages) == 1
    assert "going on with" in messages[0]
    too_large = [(step, rows) for step, rows in module.rows if step >= 2 and rows > 20]
    assert len(too_large) == 1  # the attempt that failed
    assert {step for step, _ in module.rows} == set(range(8))
    sizes = [[rows for step, rows in module.rows if step == s] for s in range(2)]
    assert all(len(rows) == 1 for rows in sizes)  # before, nothing was split


def test_a_failure_in_the_middle_of_several_chunks():
    module = small(in_chunk=3)  # of the first batch's
    callback = private(chunk_size=8, selftest=False)
    _, messages = fit(callback, module)
    assert len(messages) == 1
    assert "simulated: forward" in messages[0]
    assert callback.steps == 8
    torch.testing.assert_close(flat(module), of_chunks(8), rtol=0, atol=1e-6)


def test_the_rest_of_the_batch_uses_the_smaller_chunk_too():
    module = small(4, since=2)
    _, messages = fit(private(chunk_size=8, selftest=False), module, max_steps=3)
    too_large = [rows for step, rows in module.rows if step == 2 and rows > 4]
    assert len(too_large) == len(messages) == 1


def test_the_mean_in_the_log_stays_sane():
    """What failed in backward was logged before, and weighs in again with its halves."""
    means = []
    for fits, where in ((None, "forward"), (16, "forward"), (16, "middle")):
        run, messages = fit(private(chunk_size=None, selftest=False), small(fits, where=where))
        means.append(float(run.callback_metrics["train_loss_epoch"]))
        assert bool(messages) == (fits is not None)
    whole, forward, backward = means
    assert forward == pytest.approx(whole, abs=1e-5)
    assert backward == pytest.approx(whole, abs=0.05)


def test_a_record_that_does_not_fit_is_an_error_and_not_charged():
    callback, module = private(noise_multiplier=1.0, chunk_size=None, selftest=False), small(0)
    module.since = 3
    with pytest.raises(torch.OutOfMemoryError, match="simulated: forward"):
        fit(callback, module)
    assert callback.steps == 3
    assert [rows for step, rows in module.rows if step == 3][-1] == 1
    assert all(p.grad is None and vars(p) == {} for p in module.parameters())
    assert not any(m._forward_hooks for m in module.modules())


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    class Broken(Small):
        def forward(self, x):
            if self.trainer.global_step == 2:
                raise RuntimeError("something else")
            return super().forward(x)

    callback = private(chunk_size=None, selftest=False)
    with pytest.raises(RuntimeError, match="something else"):
        fit(callback, Broken())
    assert callback.steps == 2


def test_noise_is_added_once_a_step_whatever_was_tried():
    class Silent(Small):
        def training_step(self, batch, batch_idx):
            return 0.0 * self(batch[0]).mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1.0)

    weights = []
    for fits in (None, 4):
        pl.seed_everything(0)
        module = Silent(fits)
        callback = private(noise_multiplier=1.0, chunk_size=None, selftest=False)
        fit(callback, module)
        assert callback.steps == 8
        weights.append(flat(module))
    torch.testing.assert_close(*weights, rtol=0, atol=0)


# --- the memory of a step is that of its chunk ---------------------------------------------------


class Digits(Dataset):
    """scikit-learn's digits, again and again, each time with a little of its index mixed in."""

    def __init__(self, records=8192):
        from sklearn.datasets import load_digits

        digits = load_digits()
        self.x = torch.tensor(digits.data / 16, dtype=torch.float32)
        self.y = torch.tensor(digits.target)
        self.records = records

    def __len__(self):
        return self.records

    def __getitem__(self, i):
        turn, place = divmod(i, len(self.x))
        return self.x[place] * (1 - 0.01 * turn), self.y[place]


class Wide(pl.LightningModule):
    """26,122 parameters: the gradients of 4,096 records take 408 MiB."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 348), nn.Tanh(), nn.Linear(348, 10))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


def peak():
    """Most bytes that this process held so far."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage starts from what the parent held when it forked
        line = next(n for n in status.read_text().splitlines() if n.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def peak_growth(chunk_size):
    """Bytes that two steps on 4,096 expected records add to this process' peak, and the weights."""
    torch.set_num_threads(1)
    records = Digits()
    # What a first fit of any size loads and allocates is there before the peak is read.
    for batch_size, steps in ((32, 1), (4096, 2)):
        before = peak()
        pl.seed_everything(0)
        module = Wide()
        callback = private(chunk_size=chunk_size)
        run = trainer(callbacks=[callback], max_steps=steps)
        run.fit(module, DataLoader(records, batch_size=batch_size))
        assert callback.steps == steps
    return peak() - before, flat(module)


# Each size in a process of its own, forked so that what it needs is imported once.
PROGRAM = """
import json, os
from tests.training.test_memory_retry import peak_growth
for size in (64, None):
    child = os.fork()
    if child == 0:
        grown, weights = peak_growth(size)
        print(json.dumps([grown, weights.tolist()]), flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


def test_an_expected_batch_of_4096_runs_in_the_memory_of_its_chunks():
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    lines = [json.loads(line) for line in process.stdout.splitlines() if line.startswith("[")]
    found = [(grown, torch.tensor(weights)) for grown, weights in lines]
    (small_, in_chunks), (large, at_once) = found
    print(f"peak growth: {small_ / 2**20:.0f} MiB in chunks of 64, {large / 2**20:.0f} MiB at once")
    assert large > 300 * 2**20
    assert small_ < 0.25 * large
    torch.testing.assert_close(in_chunks, at_once, rtol=0, atol=1e-6)


def test_the_digits_are_told_apart():
    records = Digits()
    seen = {records[i][0].numpy().tobytes() for i in range(len(records))}
    assert len(seen) > 0.99 * len(records)


def test_the_data_of_the_small_runs_are_learnable():
    """So that equal weights above are not equal because nothing moved."""
    before = flat(small())
    assert (of_chunks(16) - before).abs().max() > 1e-2
    assert len({int(y) for _, y in data(256)}) == 3
