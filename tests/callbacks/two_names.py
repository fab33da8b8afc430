"""Runs under either of Lightning's names: `python -m tests.callbacks.two_names FOLDER`.

A package that was imported stays so: each case has a process of its own. They are forked when all
is imported but Lightning, since that takes seconds. What a case found is in FOLDER/CASE.pt.
"""

import importlib.abc
import os
import sys
import traceback
import warnings
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

NAMES = {"lightning.pytorch": "lightning.fabric", "pytorch_lightning": "lightning_fabric"}
SETTINGS = {"delta": 1e-3, "max_grad_norm": 0.5, "noise_multiplier": 1.0, "insecure_seed": 3}
SILENT = {
    "accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "enable_model_summary": False,
}  # fmt: skip


class Absent(importlib.abc.MetaPathFinder):
    """Packages that are not installed; notes what defend asks of them."""

    def __init__(self, *names):
        self.names, self.asked = names, []

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            callers = [f.f_globals.get("__name__", "") for f, _ in traceback.walk_stack(None)]
            if any(caller.startswith("defend.") for caller in callers):
                self.asked.append(name)
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def batches():
    x = torch.rand(64, 8, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, (x.sum(1) > 4).long()), batch_size=16)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))


def mean_loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def weights(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def module_of(pl):
    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net()

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, batch_idx):
            loss = mean_loss(self, batch)
            self.log("train_loss", loss)
            return loss

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", mean_loss(self, batch))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    return Module


def callbacks_of(pl, ledger):
    from defend import PGD, AdversarialTraining, DifferentialPrivacy, Linf, RobustnessEvaluation

    class Fades(pl.Callback):
        """Writes to batches, and is so tried out with a copy of the trainer."""

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            assert isinstance(trainer, pl.Trainer)
            assert all(isinstance(x, pl.loggers.Logger) and x.name for x in trainer.loggers)
            batch[0].mul_(0.9)

    attack = PGD(Linf(0.1), steps=2)
    evaluation = RobustnessEvaluation({"pgd": attack}, curve_records=8)
    # A second one is no second of a kind that has a state, which a Trainer would refuse.
    more = RobustnessEvaluation({"more": attack}, curve_records=0)
    private = DifferentialPrivacy(**SETTINGS, chunk_size=8, ledger=ledger)
    return [private, AdversarialTraining(attack), evaluation, more, Fades()]


def fitted(pl, folder, *, epochs=2, ckpt_path=None, logger=False):
    """The ε and the weights after so many epochs; a checkpoint of each is in the folder."""
    ledger = (ckpt_path or folder / "a checkpoint").parent / "ledger.jsonl"
    private, *others = callbacks_of(pl, ledger)
    saved = import_module(f"{pl.__name__}.callbacks").ModelCheckpoint(
        folder, save_top_k=-1, filename="{epoch}"
    )
    trainer = pl.Trainer(
        callbacks=[*others, private, saved], max_epochs=epochs, logger=logger,
        default_root_dir=folder, log_every_n_steps=1, **SILENT,
    )  # fmt: skip
    module = module_of(pl)()
    trainer.fit(module, batches(), batches(), ckpt_path=ckpt_path)
    return private.epsilon, weights(module)


def evidence(logger):
    """What is in the run of MLflow."""
    run = logger.experiment.get_run(logger.run_id).data
    files = logger.experiment.list_artifacts(logger.run_id, "defend")
    return {
        "params": {k: v for k, v in run.params.items() if k.startswith("defend/")},
        "tags": {k: v for k, v in run.tags.items() if k.startswith("defend.")},
        "metrics": set(run.metrics),
        "files": {file.path for file in files},
    }


def refusals(pl, folder):
    """What is said of a backward of one's own, of strategies, and of an older package."""
    from defend import DefendError, DifferentialPrivacy

    class OwnBackward(module_of(pl)):
        def backward(self, loss):
            loss.backward()

    single = pl.strategies.SingleDeviceStrategy
    theirs = {"__module__": f"{pl.__name__}.strategies.fsdp"}
    found = {}
    version = pl.__version__
    for name, kind, strategy in (
        ("none", module_of(pl), single),
        ("backward", OwnBackward, single),
        ("sharded", module_of(pl), type("FSDPStrategy", (single,), theirs)),
        ("own", module_of(pl), type("Own", (single,), {})),
        ("older", module_of(pl), single),
    ):
        trainer = pl.Trainer(
            callbacks=DifferentialPrivacy(**SETTINGS), strategy=strategy(torch.device("cpu")),
            max_epochs=1, logger=False, enable_checkpointing=False, default_root_dir=folder,
            **SILENT,
        )  # fmt: skip
        pl.__version__ = "2.5.6" if name == "older" else version
        try:
            trainer.fit(kind(), batches())
        except DefendError as error:
            found[name] = str(error)
    return found


def under_fabric(fabric):
    from defend import Privacy, make_private

    run = import_module(fabric).Fabric(accelerator="cpu", devices=1)
    model = net()
    model, optimizer = run.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    privacy = Privacy(**SETTINGS, ledger=False)
    with make_private(
        model, optimizer, batches(), loss=mean_loss, epochs=1, privacy=privacy, fabric=run
    ) as private:
        for batch in private.loader:
            private.step(batch)
    return weights(model)


def alone(name, other, folder):
    """All of it, where the other package is not installed."""
    absent = Absent(other.partition(".")[0], NAMES[other].partition(".")[0])
    sys.meta_path.insert(0, absent)
    if name == "lightning.pytorch":
        import defend.callbacks  # noqa: F401  # before Lightning: it has to look for both
    pl = import_module(name)
    logger = import_module(f"{name}.loggers").MLFlowLogger(
        name, tracking_uri=f"sqlite:///{folder}/mlflow.db", artifact_location=str(folder / "files")
    )
    mine = folder / name
    epsilon, after_two = fitted(pl, mine, logger=logger)
    # The other's checkpoint where there is one: a run may go on under the other name.
    first = folder / other / "epoch=0.ckpt"
    resumed = fitted(pl, mine / "on", ckpt_path=first if first.exists() else mine / first.name)
    return {
        "epsilon": epsilon,
        "weights": after_two,
        "resumed": resumed[1],
        "evidence": evidence(logger),
        "refusals": refusals(pl, mine),
        "fabric": under_fabric(NAMES[name]),
        "asked": absent.asked,
    }


def mixed(folder):
    """The callbacks are of one package, the Trainer that comes later of the other."""
    ours = import_module("lightning.pytorch")
    from defend import DifferentialPrivacy

    theirs = import_module("pytorch_lightning")
    bases = [issubclass(DifferentialPrivacy, pl.Callback) for pl in (ours, theirs)]
    return {"bases": bases, "weights": fitted(theirs, folder / "mixed")[1]}


def bases(*broken):
    """What callbacks are made from where some of both cannot be imported, and none was yet."""
    from defend.callbacks import _lightning

    def imported(name):
        if name in broken:
            raise AttributeError("torch has no such thing any more")
        return import_module(name)

    nothing = SimpleNamespace(modules={})
    with (
        mock.patch.object(_lightning, "sys", nothing),
        mock.patch.object(_lightning, "import_module", imported),
    ):
        try:
            return [base.__module__.partition(".")[0] for base in _lightning.callback_bases()]
        except ImportError as error:
            return str(error)


def defend_first(folder):
    """defend is imported before either; then LightningCLI builds a callback."""
    from defend import DifferentialPrivacy

    one, other = NAMES
    found = {"bases": [bases(), bases(one), bases(other), bases(one, other)]}
    for name in NAMES:
        pl, cli = import_module(name), import_module(f"{name}.cli")
        config = folder / f"{name}.yaml"
        config.write_text(
            "trainer:\n  callbacks:\n    - class_path: defend.DifferentialPrivacy\n"
            "      init_args: {delta: 0.001, max_grad_norm: 0.5, noise_multiplier: 1.0}\n"
        )
        built = cli.LightningCLI(
            module_of(pl), run=False, args=["--config", str(config)], save_config_callback=None,
            trainer_defaults={**SILENT, "logger": False, "enable_checkpointing": False},
        )  # fmt: skip
        found[name] = isinstance(built.trainer.callbacks[0], DifferentialPrivacy)
    return found


if __name__ == "__main__":
    # What Lightning, its logger and defend import later.
    for slow in ("torch._dynamo", "torchmetrics", "opacus.grad_sample", "defend",
                 "mlflow.store.tracking.sqlalchemy_store"):  # fmt: skip
        import_module(slow)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    folder, one, other = Path(sys.argv[1]), *NAMES
    for name, case in {
        other: lambda: alone(other, one, folder),
        one: lambda: alone(one, other, folder),
        "mixed": lambda: mixed(folder),
        "defend first": lambda: defend_first(folder),
    }.items():
        assert not {one.partition(".")[0], other} & set(sys.modules)
        if os.fork() == 0:
            try:
                torch.save(case(), folder / f"{name}.pt")
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        _, status = os.wait()
        if status:
            sys.exit(f"{name} failed")
