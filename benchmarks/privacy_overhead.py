"""What the guards of DP-SGD cost: self-test, looks, ledger and the rest, against a run without.

    python benchmarks/privacy_overhead.py [--device cpu|cuda] [--repeats 7] [--threads 2] [--quick]

Two trainings with DP-SGD under Lightning, without logger and validation:

    digits    the quickstart's net on scikit-learn's digits (1,437 records, expected batch 128;
              random ones of the same shape where scikit-learn is missing, which costs the same)
    lenet     a LeNet on 60,000 random images of 1 × 28 × 28, expected batch 256

and of each a guarded fit (σ is found, ε known after each step; everything on) and an unguarded one
(σ given; no self-test, no ledger, no ε after each step), interleaved, their order alternating.
Because a machine's noise is of the size of what is measured, each guard is timed by itself inside
the guarded fits, without the guards that it calls: `start_s` is what passes before the first step,
`step_ms` what an ordinary step costs (of each guard the median over the steps), `step_share` that
as a part of an unguarded step, and `looks_s` all the rest: looks of the schedule, trials of hooks,
ε of the whole plan once, which come at steps 4, 16, 64, … and fade. Looks by chance take 0.5% of
the time at most, and are in there, too. Medians over the rounds. The last line is JSON.
"""

import argparse
import importlib.util
import json
import logging
import platform
import statistics
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import defend
from defend.callbacks._guarded_hooks import GuardedHooks
from defend.privacy.accounting.budget import FitBudget
from defend.privacy.accounting.ledger import Ledger
from defend.privacy.checks.dry_run import DryRun
from defend.privacy.checks.state_watch import StateWatch
from defend.privacy.mechanism.user_randomness import UserRandomness
from defend.training.private import PrivateTraining

TARGET, DELTA = 8.0, 1e-5
DATA = "digits" if importlib.util.find_spec("sklearn") else "random"


class Module(pl.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=5e-3)


def small_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32 * 16, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


def lenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(6, 16, 5), nn.Tanh(),
        nn.AvgPool2d(2), nn.Flatten(), nn.Linear(400, 120), nn.Tanh(), nn.Linear(120, 84),
        nn.Tanh(), nn.Linear(84, 10),
    )  # fmt: skip


class EpochTimer(pl.Callback):
    """Seconds of the epochs alone."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.start = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - self.start


def digits() -> TensorDataset:
    if DATA == "random":
        return TensorDataset(torch.rand(1437, 1, 8, 8), torch.randint(0, 10, (1437,)))
    from sklearn.datasets import load_digits

    images, targets = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    return TensorDataset(x[:1437], torch.tensor(targets)[:1437])


def images() -> TensorDataset:
    return TensorDataset(torch.rand(60_000, 1, 28, 28), torch.randint(0, 10, (60_000,)))


@dataclass(frozen=True)
class Case:
    """A training: its net, its data, its expected batch, and how many steps are taken."""

    net: Callable[[], nn.Module]
    data: Callable[[], TensorDataset]
    batch: int
    steps: int


CASES = {"digits": Case(small_net, digits, 128, 120), "lenet": Case(lenet, images, 256, 60)}


class Times:
    """Seconds that functions take, step by step; those that they call count for themselves.

    Args:
        first: the function that is called first in each step.
    """

    def __init__(self, first: str) -> None:
        self._first = first
        self.steps: list[dict[str, float]] = [defaultdict(float)]  # the first: before any step
        self._inner = [0.0]

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if name == self._first:
                self.steps.append(defaultdict(float))
            start = time.perf_counter()
            self._inner.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                seconds = time.perf_counter() - start
                self.steps[-1][name] += seconds - self._inner.pop()
                self._inner[-1] += seconds

        return wrapped

    def ordinary(self, name: str) -> float:
        """Of a function in the middle one of the steps."""
        return statistics.median(step[name] for step in self.steps[1:])

    def total(self) -> float:
        """Of all functions, after the first step began."""
        return sum(sum(step.values()) for step in self.steps[1:])


@contextmanager
def timed(places: dict[str, tuple[Any, str]]) -> Iterator[Times]:
    """Inside, these functions are timed, by name; the first of them begins a step."""
    times = Times(next(iter(places)))
    kept = {name: getattr(owner, attribute) for name, (owner, attribute) in places.items()}
    for name, (owner, attribute) in places.items():
        setattr(owner, attribute, times.wrap(name, kept[name]))
    try:
        yield times
    finally:
        for name, (owner, attribute) in places.items():
            setattr(owner, attribute, kept[name])


GUARDS = {
    "the batch as it was loaded": (GuardedHooks, "begin"),
    "self-test, looks": (DryRun, "selftest"),
    "opening the fit: σ, digest of the data, ledger": (PrivateTraining, "open"),
    "secret numbers": (UserRandomness, "renew"),
    "hooks: was a batch changed, is something kept?": (GuardedHooks, "check"),
    "what the step keeps": (StateWatch, "note"),
    "ledger": (Ledger, "charge"),
    "ε after each step": (FitBudget, "epsilon_now"),
}


def fit(case: Case, data: TensorDataset, device: str, guarded: bool) -> dict[str, Any]:
    """Seconds of a fit's steps, and of each guard: before the first step, and for a step."""
    settings: dict[str, Any] = {"delta": DELTA, "max_grad_norm": 1.0}
    if guarded:
        settings |= {"target_epsilon": TARGET}
    else:
        settings |= {"noise_multiplier": 0.8, "selftest": False, "ledger": False}
    with tempfile.TemporaryDirectory() as folder, timed(GUARDS) as times:
        timer = EpochTimer()
        trainer = pl.Trainer(
            accelerator="gpu" if device == "cuda" else "cpu", devices=1, logger=False,
            max_steps=case.steps, callbacks=[defend.DifferentialPrivacy(**settings), timer],
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            default_root_dir=folder,
        )  # fmt: skip
        kept = FitBudget.epsilon_now
        if not guarded:
            FitBudget.epsilon_now = lambda _: 0.0  # type: ignore[method-assign]
        trainer.fit(Module(case.net()), DataLoader(data, case.batch, shuffle=True))
        FitBudget.epsilon_now = kept  # type: ignore[method-assign]
    of_a_step = {name: 1000 * times.ordinary(name) for name in GUARDS}
    return {
        "epochs": timer.seconds,
        "start": sum(times.steps[0].values()),
        "step_ms": of_a_step,
        "looks": times.total() - case.steps * sum(of_a_step.values()) / 1000,
    }


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of one case."""
    case = CASES[name]
    if options.quick:
        case = replace(case, steps=12)
    data, rounds = case.data(), []
    fit(case, data, options.device, guarded=True)  # warms up
    for repeat in range(options.repeats):
        order = (True, False) if repeat % 2 else (False, True)
        rounds.append({guarded: fit(case, data, options.device, guarded) for guarded in order})
        both = {k: v["epochs"] for k, v in rounds[-1].items()}
        print(f"{name}, round {repeat}: {both[True] / both[False] - 1:+.2%}", flush=True)

    def median(of: Callable[[dict[bool, dict[str, Any]]], float]) -> float:
        return statistics.median(map(of, rounds))

    guards = {n: median(lambda r, n=n: r[True]["step_ms"][n]) for n in rounds[0][True]["step_ms"]}
    plain = 1000 * median(lambda r: r[False]["epochs"]) / case.steps
    found = {
        "start_s": median(lambda r: r[True]["start"]),
        "unguarded_step_ms": plain,
        "guards_ms_a_step": guards,
        "step_ms": sum(guards.values()),
        "step_share": sum(guards.values()) / plain,
        "looks_s": median(lambda r: r[True]["looks"]),
        "steps": case.steps,
        "ratio_of_epochs": median(lambda r: r[True]["epochs"] / r[False]["epochs"]),
    }
    print(
        f"{name}: {found['start_s']:.2f} s before the first step; an unguarded one {plain:.1f} ms"
    )
    for guard, value in guards.items():
        print(f"  {guard:48} {value:7.3f} ms a step")
    print(f"  {'together':48} {found['step_ms']:7.3f} ms, {found['step_share']:.2%} of a step")
    print(f"  looks and what else fades, in {case.steps} steps {found['looks_s']:13.2f} s")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="tiny, to see that it runs")
    options = parser.parse_args()
    if options.quick:
        options.repeats = 1
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    result = {
        "benchmark": "privacy_overhead",
        "device": torch.cuda.get_device_name() if options.device == "cuda" else _processor(),
        "data": DATA,
        "threads": options.threads,
        "repeats": options.repeats,
        "versions": {name: version(name) for name in ("torch", "lightning", "opacus")},
        **{name: measure(name, options) for name in CASES},
    }
    print(json.dumps(result))


def _processor() -> str:
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
