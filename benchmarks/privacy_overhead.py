"""What the guards of DP-SGD cost: self-test, ledger and accounting, against the same run without.

    python benchmarks/privacy_overhead.py [--device cpu|cuda] [--repeats 9] [--epochs 20]
        [--threads 2] [--quick]

Both sides train the quickstart's net on scikit-learn's digits (1,437 records, expected batch 128;
random ones of the same shape where scikit-learn is missing, which costs the same) with DP-SGD under
Lightning, without logger and validation, at about the same noise:

    guarded      target_epsilon: σ is found, ε known after each step; self-test and ledger on
    unguarded    σ given; no self-test, no ledger, no ε after each step

Runs are interleaved and their order alternates; the figure is the median over the rounds of
(seconds of a whole fit, guarded − unguarded) / (seconds of the unguarded fit). Because a machine's
noise is of the size of what is measured, the guards are also timed by themselves inside the guarded
runs: `share` is their sum over the seconds of the epochs. The last line is JSON.
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
from collections.abc import Callable
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import defend
from defend.privacy.accounting.budget import FitBudget
from defend.privacy.accounting.ledger import Ledger
from defend.privacy.checks.dry_run import DryRun
from defend.training.private import PrivateTraining

TARGET, DELTA, BATCH, RECORDS = 8.0, 1e-4, 128, 1437
DATA = "digits" if importlib.util.find_spec("sklearn") else "random"


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
            nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32 * 16, 64), nn.ReLU(), nn.Linear(64, 10),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=5e-3)


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
        return TensorDataset(torch.rand(RECORDS, 1, 8, 8), torch.randint(0, 10, (RECORDS,)))
    from sklearn.datasets import load_digits

    images, targets = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    return TensorDataset(x[:RECORDS], torch.tensor(targets)[:RECORDS])


@contextmanager
def timed(places: dict[str, tuple[Any, str]]) -> Any:
    """Seconds that each of these functions takes, by name."""
    spent: dict[str, float] = defaultdict(float)
    kept = {name: getattr(owner, attribute) for name, (owner, attribute) in places.items()}

    def wrap(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[name] += time.perf_counter() - start

        return wrapped

    for name, (owner, attribute) in places.items():
        setattr(owner, attribute, wrap(name, kept[name]))
    try:
        yield spent
    finally:
        for name, (owner, attribute) in places.items():
            setattr(owner, attribute, kept[name])


GUARDS = {
    "self-test, all looks": (DryRun, "selftest"),
    "opening the fit: σ, digest of the data, ledger": (PrivateTraining, "open"),
    "ledger": (Ledger, "charge"),
    "ε after each step": (FitBudget, "epsilon_now"),
}


def fit(data: TensorDataset, options: argparse.Namespace, guarded: bool) -> dict[str, Any]:
    """Seconds of a whole fit, of its epochs, and of each guard."""
    settings: dict[str, Any] = {"delta": DELTA, "max_grad_norm": 1.0}
    if guarded:
        settings |= {"target_epsilon": TARGET}
    else:
        settings |= {"noise_multiplier": 0.8, "selftest": False, "ledger": False}
    timer = EpochTimer()
    with tempfile.TemporaryDirectory() as folder, timed(GUARDS) as spent:
        trainer = pl.Trainer(
            accelerator="gpu" if options.device == "cuda" else "cpu", devices=1, logger=False,
            max_epochs=options.epochs, callbacks=[defend.DifferentialPrivacy(**settings), timer],
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            default_root_dir=folder,
        )  # fmt: skip
        kept = FitBudget.epsilon_now
        if not guarded:
            FitBudget.epsilon_now = lambda _: 0.0  # type: ignore[method-assign]
        start = time.perf_counter()
        trainer.fit(Module(), DataLoader(data, BATCH, shuffle=True))
        seconds = time.perf_counter() - start
        FitBudget.epsilon_now = kept  # type: ignore[method-assign]
    return {"fit": seconds, "epochs": timer.seconds, "guards": dict(spent)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="tiny, to see that it runs")
    options = parser.parse_args()
    if options.quick:
        options.repeats, options.epochs = 1, 1
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    data = digits()

    fit(data, argparse.Namespace(**{**vars(options), "epochs": 1}), guarded=True)  # warms up
    ratios, shares, guards = [], [], defaultdict(list)
    for repeat in range(options.repeats):
        order = (True, False) if repeat % 2 else (False, True)
        runs = {guarded: fit(data, options, guarded) for guarded in order}
        ratios.append(runs[True]["fit"] / runs[False]["fit"] - 1)
        shares.append(sum(runs[True]["guards"].values()) / runs[True]["epochs"])
        for name, seconds in runs[True]["guards"].items():
            guards[name].append(seconds)
        epoch = runs[False]["epochs"] / options.epochs
        print(f"round {repeat}: {ratios[-1]:+.2%}, share {shares[-1]:.2%}", flush=True)

    milliseconds = {name: 1000 * statistics.median(guards[name]) for name in GUARDS}
    print(f"{'guard':40} {'ms a fit':>9}")
    for name, value in milliseconds.items():
        print(f"{name:40} {value:9.1f}")
    print(f"an epoch without guards: {1000 * epoch:.0f} ms; {options.epochs} epochs a fit")
    print(f"guards timed by themselves: {statistics.median(shares):.2%} of the epochs")
    print(f"guarded against unguarded fits: {statistics.median(ratios):+.2%}")
    result = {
        "benchmark": "privacy_overhead",
        "device": torch.cuda.get_device_name() if options.device == "cuda" else _processor(),
        "data": DATA,
        "threads": options.threads,
        "repeats": options.repeats,
        "epochs": options.epochs,
        "versions": {name: version(name) for name in ("torch", "lightning", "opacus")},
        "epoch_s": epoch,
        "guards_ms_a_fit": milliseconds,
        "share": statistics.median(shares),
        "ratio_of_fits": statistics.median(ratios),
        "ratios": ratios,
    }
    print(json.dumps(result))


def _processor() -> str:
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
