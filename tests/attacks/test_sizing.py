"""The batch that does not fit: halved, remembered, and the result is that of the whole batch."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from defend import PGD
from defend.attacks import sizing
from defend.threat import L1, L2, Linf

ROOT = Path(__file__).parents[2]
X = torch.rand(24, 8, generator=torch.Generator().manual_seed(3))
Y = torch.arange(24) % 4


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class _Full(torch.autograd.Function):
    """Passes its input on, and finds no memory in backward."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise torch.OutOfMemoryError("simulated: backward")


class Tight(nn.Module):
    """Memory for `fits` rows; keeps how many it was asked for."""

    def __init__(self, fits=None, where="forward"):
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
        self.fits, self.where, self.rows = fits, where, []

    def forward(self, x):
        self.rows.append(len(x))
        if self.fits is None or len(x) <= self.fits:
            return self.net(x)
        if self.where == "forward":
            raise torch.OutOfMemoryError("simulated: forward\nand a long table")
        return _Full.apply(self.net(x))


def run(attack, model, **settings):
    """The result and the warnings about memory."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = attack.perturb(model, X, Y, generator=seeded(), **settings)
    return result, [str(w.message) for w in caught if "did not fit" in str(w.message)]


ATTACKS = {
    "plain": PGD(Linf(0.1), steps=3),
    "short": PGD(L2(0.3), steps=2, step_size=0.05),  # it does not forget where it started
    "best": PGD(L2(0.3), steps=3, iterate="best"),
    "restarts": PGD(Linf(0.1), steps=3, restarts=3),
    "stops": PGD(Linf(0.1), steps=3, stop_when_fooled=True),
    "stops-restarts": PGD(L2(0.3), steps=3, stop_when_fooled=True, restarts=2),
    "kl": PGD(Linf(0.1), steps=3, loss="kl"),
    "l1": PGD(L1(1.0), steps=3, loss="margin"),
}


@pytest.mark.parametrize(("fits", "where"), [(11, "backward"), (5, "forward"), (1, "backward")])
@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_halves_end_where_the_whole_batch_does(attack, fits, where):
    whole, no_messages = run(attack, Tight())
    model = Tight(fits, where)
    halved, messages = run(attack, model)
    torch.testing.assert_close(halved.x_adv, whole.x_adv, rtol=0, atol=1e-6)
    assert not no_messages
    assert halved.zero_gradients == whole.zero_gradients
    assert halved.nonfinite_gradients == whole.nonfinite_gradients == 0
    if attack.stop_when_fooled:  # what is computed depends on how many of a chunk are left
        assert 0 < halved.gradients <= len(X) * attack.steps * attack.restarts
        return
    assert halved.gradients == whole.gradients
    expected = {11: [24, 12], 5: [24, 12, 6], 1: [24, 12, 6, 3, 2]}[fits]
    assert [int(m.split()[0]) for m in messages] == expected


def test_another_start_would_have_been_noticed():
    """A planted wrong answer: the start is drawn again after a failure."""
    attack = ATTACKS["short"]
    whole, again = (attack(Tight(), X, Y, generator=seeded(seed)) for seed in (0, 1))
    assert (whole - again).abs().max() > 1e-3


def test_said_once_and_remembered():
    model, attack = Tight(7), ATTACKS["restarts"]
    _, messages = run(attack, model)
    assert messages == [
        "24 rows did not fit (simulated: forward); going on with 12 at a time.",
        "12 rows did not fit (simulated: forward); going on with 6 at a time.",
    ]
    assert sum(rows > 7 for rows in model.rows) == 2  # not once more in later restarts
    model.rows.clear()
    for settings in ({}, {"chunk_size": None}, {"chunk_size": 12}):
        _, messages = run(attack, model, **settings)
        assert not messages
    assert set(model.rows) == {6}


def test_remembered_for_what_it_was_found_on_only():
    model = Tight(7)
    run(ATTACKS["plain"], model)
    model.fits = None
    model.double().rows.clear()
    ATTACKS["plain"](model, X.double(), Y, generator=seeded())
    assert set(model.rows) == {24}


@pytest.mark.parametrize(
    ("asked", "fits", "sizes"), [(8, 3, [8, 4, 2]), (10, 6, [8, 4]), (5, 5, [])]
)
def test_a_size_of_the_users_own_is_halved_too(asked, fits, sizes):
    model = Tight(fits)
    result, messages = run(ATTACKS["plain"], model, chunk_size=asked)
    assert [int(m.split()[0]) for m in messages] == sizes[: len(messages)]
    assert len(messages) == sum(size > fits for size in sizes)
    torch.testing.assert_close(
        result.x_adv, run(ATTACKS["plain"], Tight())[0].x_adv, rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("chunk_size", [5, 7, 10, 23])
def test_chunks_are_equal(chunk_size):
    model = Tight()
    ATTACKS["plain"](model, X, Y, generator=seeded(), chunk_size=chunk_size)
    assert max(model.rows) <= chunk_size
    assert max(model.rows) - min(model.rows) <= 1
    assert sum(model.rows) == 24 * 3
    assert len(model.rows) == 3 * -(-24 // chunk_size)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_record_that_does_not_fit_is_an_error(where):
    model = Tight(0, where)
    with pytest.raises(torch.OutOfMemoryError, match=f"simulated: {where}"):
        run(ATTACKS["plain"], model)
    assert model.rows[-1] == 1
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert model.training


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    class Broken(Tight):
        def forward(self, x):
            raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        run(ATTACKS["plain"], Broken())


# --- the memory of an attack is that of its chunk ------------------------------------------------

PROGRAM = """
import json, torch
from torch import nn
from defend.attacks.pgd import PGD
from defend.threat import Linf

def peak():
    line = next(n for n in open("/proc/self/status") if n.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

def attacked(rows, size):
    generator = torch.Generator().manual_seed(0)
    return PGD(Linf(0.1), steps=2)(model, x[:rows], y[:rows], generator=generator, chunk_size=size)

torch.set_num_threads(1)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 4096), nn.Tanh(), nn.Linear(4096, 4))
x, y = torch.rand(4096, 16), torch.zeros(4096, dtype=torch.int64)
attacked(64, None)
peaks = [peak()]
results = []
for size in (64, None):
    results.append(attacked(4096, size))
    peaks.append(peak())
print(json.dumps([peaks, (results[0] - results[1]).abs().max().item()]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
def test_a_batch_of_4096_runs_in_the_memory_of_its_chunks():
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    peaks, difference = json.loads(process.stdout.splitlines()[-1])
    small, large = peaks[1] - peaks[0], peaks[2] - peaks[0]
    print(f"peak growth: {small / 2**20:.0f} MiB in chunks of 64, {large / 2**20:.0f} MiB at once")
    assert large > 100 * 2**20  # 64 MiB for the hidden layer of 4,096 records, and its gradient
    assert small < 0.1 * large
    assert difference < 1e-5


# --- on a GPU ------------------------------------------------------------------------------------


@pytest.fixture
def little_memory():
    """Lets this process have 512 MiB more than it holds."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**29) / total)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


def wide():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(64, 2**14), nn.Tanh(), nn.Linear(2**14, 4)).cuda()


def wide_batch():
    x = torch.rand(16384, 64, generator=seeded())  # 1 GiB for its hidden layer
    return x.cuda(), (torch.arange(16384) % 4).cuda()


@pytest.mark.cuda
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_on_cuda_a_batch_that_does_not_fit_is_halved(little_memory, cuda_graphs):
    model, (x, y) = wide(), wide_batch()
    attack = PGD(L2(0.5), steps=3, cuda_graphs=cuda_graphs)
    with pytest.warns(UserWarning, match="16384 rows did not fit"):
        adv = attack(model, x, y, generator=seeded(), chunk_size=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = attack(model, x, y, generator=seeded(), chunk_size=None)
    small = attack(model, x, y, generator=seeded(), chunk_size=512)
    torch.testing.assert_close(adv, again, rtol=0, atol=1e-4)
    torch.testing.assert_close(adv, small, rtol=0, atol=1e-4)


@pytest.mark.cuda
def test_on_cuda_what_fits_is_found_before_it_fails(little_memory):
    model, (x, y) = wide(), wide_batch()
    attack = PGD(L2(0.5), steps=3, cuda_graphs=False)
    torch.cuda.reset_peak_memory_stats()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attack(model, x, y, generator=seeded())
    (known,) = sizing._KNOWN_ROWS[model].values()
    assert 256 <= known < 16384
    assert torch.cuda.max_memory_allocated() > 2**27  # and the memory is made use of
