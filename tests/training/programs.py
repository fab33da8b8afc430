"""Runs that must come out alike in one process and in several, and how tests start them.

    python -m tests.training.programs FOLDER PROCESSES NAMES…

runs cases under Lightning's own launcher; each process writes what each case ended with to FOLDER.
Two processes run them under `torch.distributed.run` (`tests.training.two_processes`). `alone` runs
a case in this process.
"""

import dataclasses
import errno
import functools
import os
import sys
import tempfile
from pathlib import Path
from unittest import mock

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from defend import (
    PGD,
    Adversarial,
    AdversarialTraining,
    DifferentialPrivacy,
    Linf,
    RobustnessEvaluation,
)
from defend.batching.records import RecordBatches
from defend.objectives import AWP, MART, TRADES, Madry
from defend.privacy import AdaptiveClipping, Randomness
from tests.distributed import launch, process_group, two_processes
from tests.helpers import Net, data, flat, trainer
from tests.loops import private_loop

SETTINGS = {"delta": 1e-3, "max_grad_norm": 0.5, "noise_multiplier": 0.0, "insecure_seed": 3}
SIGMA = 1.5
# No random start, which each rank has for itself, and no loss of the objective's, which needs one.
ATTACK = PGD(Linf(0.1), steps=2, random_start=False, loss="margin")


def fit_of(private):
    """The open fit of a loop or of a callback."""
    return private.fit if isinstance(private, DifferentialPrivacy) else private._open[-1]


def mlp():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))


def mean_loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def sum_loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")


def gradients(module):
    return torch.cat([p.grad.flatten() for p in module.parameters()])


# --- one run, in each kind of loop ----------------------------------------------------------------


def plain(world, *, records=64, batch=16, epochs=2, lr=0.05, loss=mean_loss, wrap=True,
          sharded=False, spoil=lambda private: None, trainings=1, **settings):  # fmt: skip
    """`make_private` in a plain loop, under DDP if there are several processes."""
    torch.manual_seed(0)
    model = mlp()
    records = data(records)
    shards = DistributedSampler(records) if sharded and world > 1 else None
    loader = DataLoader(records, batch_size=batch // world, sampler=shards)
    wrapped = DistributedDataParallel(model) if world > 1 and wrap else model
    settings = {**SETTINGS, **settings}
    for _ in range(trainings):
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
        run = private_loop(wrapped, optimizer, loader, loss=loss, epochs=epochs, **settings)
        with run as private:
            spoil(private)
            report = _loop(private, wrapped, epochs)
    return report


def fabric(world, *, precision="32-true", **settings):
    """The same under Fabric."""
    run = Fabric(
        accelerator="cpu",
        devices=world,
        precision=precision,
        strategy="auto" if world == 1 else "ddp",
    )
    run.launch()
    return under_fabric(run, settings)


def under_fabric(run, settings):
    torch.manual_seed(0)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    wrapped, optimizer = run.setup(model, optimizer)
    loader = DataLoader(data(64), batch_size=16 // run.world_size)
    settings = {**SETTINGS, **settings}
    with private_loop(
        wrapped, optimizer, loader, loss=mean_loss, epochs=2, fabric=run, **settings
    ) as private:
        return _loop(private, wrapped, 2)


def _loop(private, model, epochs):
    report = {"released": [], "rows": [], "masks": []}
    sampler = fit_of(private).data.sampler
    for epoch in range(epochs):
        for step, batch in enumerate(private.loader):
            private.step(batch)
            report["released"].append(gradients(model))
            report["rows"].append(rows_of(batch))
            report["masks"].append(sampler.sample(epoch * private.steps_per_epoch + step))
    return report | {
        "weights": flat(model),
        "steps": private.steps,
        "epsilon": private.epsilon,
        "max_grad_norm": private.max_grad_norm,
        "ledger": str(private.ledger_path.resolve()),
        "writes": bool(fit_of(private).account.ledgers),
    }


def rows_of(batch):
    """The first number of each row."""
    alone = isinstance(batch, RecordBatches)
    return torch.cat([x[:, 0] for x, _ in batch]) if alone else batch[0][:, 0]


class Watch(Callback):
    """What reaches the optimizer, and what the run ended with."""

    def __init__(self, private):
        self.private, self.report = private, {"released": [], "rows": []}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.report["released"].append(gradients(pl_module))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.report["rows"].append(rows_of(batch))

    def on_train_end(self, trainer, pl_module):
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if "robust" in k}
        self.report |= {"weights": flat(pl_module), "metrics": metrics}
        self.report["steps"] = trainer.global_step
        if self.private is not None:
            self.report["charged"] = self.private.steps
            self.report["max_grad_norm"] = self.private.max_grad_norm
            self.report["ledger"] = str(self.private.ledger_path)
            self.report["writes"] = bool(fit_of(self.private).account.ledgers)


def lightning(world, *, records=64, batch=16, epochs=2, lr=0.05, net=Net, private=True,
              robust=False, spoil=lambda private: None, **settings):  # fmt: skip
    """`DifferentialPrivacy` under a Trainer."""
    pl.seed_everything(0, verbose=False)
    callback = DifferentialPrivacy(**{**SETTINGS, **settings}) if private else None
    watch = Watch(callback)
    callbacks = [callback] if private else []
    if robust:
        objective = Madry() if robust is True else robust
        callbacks.append(AdversarialTraining(ATTACK, objective=objective))
        callbacks.append(RobustnessEvaluation({"pgd": ATTACK}, curve_records=0))
    run = trainer(
        callbacks=[*callbacks, watch, Spoil(spoil, callback)],
        default_root_dir=Path.cwd(),
        max_epochs=epochs,
        devices=world,
        strategy="auto" if world == 1 else "ddp",
    )
    run.fit(
        net(lr=lr),
        DataLoader(data(records), batch_size=batch // world),
        DataLoader(data(30, seed=1), batch_size=5) if robust else None,
    )
    return watch.report


class Spoil(Callback):
    """Breaks something just before the first step."""

    def __init__(self, spoil, private):
        self.spoil, self.private = spoil, private

    def on_train_start(self, trainer, pl_module):
        self.spoil(self.private)


class SumLoss(Net):
    def training_step(self, batch, batch_idx):
        return sum_loss(self, batch)


# --- what may go wrong ----------------------------------------------------------------------------


def noise_on_every_rank(private):
    """The planted mistake: each process adds noise of its own."""
    step = fit_of(private).step
    shard = step.settings.shard
    step.randomness = Randomness(insecure_seed=100 + shard.rank)
    step.settings = dataclasses.replace(step.settings, shard=shard._replace(rank=0))


def full_disk(private):
    """From the third step on, rank 0 has no room for the ledger."""
    account = fit_of(private).account
    for ledger in account.ledgers:
        write = type(ledger)._append

        def fail(entry, ledger=ledger, write=write):
            if account.budget.budget.steps >= 2:
                with mock.patch("os.write", side_effect=OSError(errno.ENOSPC, "no room")):
                    return write(ledger, entry)
            return write(ledger, entry)

        ledger._append = fail


def no_ledger_at(folder):
    path = Path(folder, "not-a-ledger.jsonl")
    path.write_text("something else\n")
    return path


# --- cases ----------------------------------------------------------------------------------------

LOOPS = {"plain": plain, "fabric": fabric, "lightning": lightning}
FEW = {"alone": None, "several": 3}  # a chunk size
QUIET = {"lr": 0.0, "epochs": 6}
FEW_RECORDS = {"records": 12, "batch": 2, "epochs": 6}
CASES = {
    "plain exact": ("plain", {"chunk_size": FEW}),
    "plain empty ranks": ("plain", {"records": 12, "batch": 2, "epochs": 6}),
    "plain shards": (
        "plain", {"sharded": True, "adversarial": Adversarial(ATTACK), "chunk_size": FEW},
    ),
    "plain record": ("plain", {"engine": "record"}),
    "plain adaptive": ("plain", {"clipping": AdaptiveClipping(), "chunk_size": FEW}),
    "plain no seed": ("plain", {"insecure_seed": None, "noise_multiplier": 1.0}),
    "plain twice": ("plain", {"trainings": 2, "insecure_seed": None, "noise_multiplier": 1.0}),
    "plain noise": ("plain", {**QUIET, "noise_multiplier": SIGMA}),
    "plain silence": ("plain", QUIET),
    "plain noise on every rank": (
        "plain", {**QUIET, "noise_multiplier": SIGMA, "spoil": noise_on_every_rank},
    ),
    "plain sum": ("plain", {"loss": sum_loss}),
    "plain no ledger": ("plain", {"ledger": no_ledger_at}),
    "plain not wrapped": ("plain", {"wrap": False}),
    "fabric exact": ("fabric", {"chunk_size": FEW}),
    "lightning exact": ("lightning", {"chunk_size": FEW}),
    "lightning robust": (
        # Without Poisson sampling Lightning shuffles over ranks: one step sees all records.
        "lightning", {"batch": 64, "private": False, "robust": True},
    ),
    "lightning both": ("lightning", {"robust": True, "noise_multiplier": 0.8, "chunk_size": FEW}),
    "lightning record": (
        "lightning",
        {"engine": "record", "robust": AWP(TRADES(), gamma=0.1), "views": 2, **FEW_RECORDS},
    ),
    "lightning objectives": (
        "lightning",
        {"robust": AWP(TRADES(), gamma=0.1), "views": 2, "chunk_size": FEW},
    ),
    "lightning empty ranks": ("lightning", {"records": 12, "batch": 2, "epochs": 6}),
    "lightning adaptive": ("lightning", {"clipping": AdaptiveClipping()}),
    "lightning no seed": ("lightning", {"insecure_seed": None, "noise_multiplier": 1.0}),
    "lightning noise": ("lightning", {**QUIET, "noise_multiplier": SIGMA}),
    "lightning silence": ("lightning", QUIET),
    "lightning noise on every rank": (
        "lightning", {**QUIET, "noise_multiplier": SIGMA, "spoil": noise_on_every_rank},
    ),
    "lightning sum": ("lightning", {"net": SumLoss}),
    "lightning no ledger": ("lightning", {"ledger": no_ledger_at}),
    "three": (
        "lightning",
        {"records": 60, "batch": 15, "robust": True, "noise_multiplier": 0.8, "chunk_size": FEW},
    ),
    "three objectives": (
        "lightning",
        {"records": 60, "batch": 15, "robust": MART(), "views": 3, "chunk_size": FEW},
    ),
    "three empty ranks": ("lightning", {"records": 12, "batch": 3, "epochs": 6}),
    # Last: while one rank waits for another, nothing else can be said to it.
    "plain full disk": ("plain", {"spoil": full_disk}),
    "lightning full disk": ("lightning", {"spoil": full_disk}),
}  # fmt: skip


def run_case(name, world, folder):
    """What one case ends with: its report, or its error."""
    loop, settings = CASES[name]
    settings = {
        key: value["alone" if world == 1 else "several"] if value is FEW else value
        for key, value in settings.items()
    }
    if callable(settings.get("ledger")):
        settings["ledger"] = settings["ledger"](folder)
    here = Path.cwd()
    os.chdir(folder)  # default place of the ledgers
    try:
        return LOOPS[loop](world, **settings)
    except Exception as error:
        return {"error": type(error).__name__, "message": str(error)}
    finally:
        os.chdir(here)


@functools.cache
def alone(name):
    return run_case(name, 1, tempfile.mkdtemp(prefix="defend-alone-"))


@functools.cache
def under_lightning():
    """The folder of the reports of three processes of Lightning's launcher, started once."""
    folder = tempfile.mkdtemp(prefix="defend-lightning-")
    names = [name for name in CASES if name.startswith("three")]
    launch("tests.training.programs", folder, "3", *names)
    return folder


def reports(name):
    """What each of several processes ended a case with."""
    three = name.startswith("three")
    folder = under_lightning() if three else two_processes()
    return [torch.load(Path(folder, f"{name}-{rank}.pt")) for rank in range(3 if three else 2)]


def run_cases(folder, world, names):
    """Run cases in one of several processes, and write what each ended with."""
    for name in names:
        report = run_case(name, world, folder)
        rank = os.environ.get("LOCAL_RANK", "0")
        torch.save(report, Path(folder, f"{name}-{rank}.pt"))


def main(folder, world, *names):
    with process_group():
        run_cases(folder, int(world), names)


if __name__ == "__main__":
    main(*sys.argv[1:])
