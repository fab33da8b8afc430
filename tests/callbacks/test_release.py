"""Un-noised metrics of training: named as such, or withheld from whatever publishes."""

import csv

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torchmetrics.classification import MulticlassAccuracy

from defend import PGD, DifferentialPrivacy, InputError, Linf, PrivacyError, RobustnessEvaluation
from tests.helpers import Net, flat, loader, trainer

EPSILON = "privacy/epsilon"
UNNOISED = ["at_batch_end", "at_epoch_end", "by_callback", "hits", "in_dict", "train_loss"]


class Telling(Net):
    """Logs in every hook of training that may log, and in validation."""

    def __init__(self):
        super().__init__(schedule=True)
        self.accuracy = MulticlassAccuracy(num_classes=3)
        self.bar = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        scores = self(x)
        loss = F.cross_entropy(scores, y)
        self.accuracy(scores, y)
        self.log("train_loss", loss, prog_bar=True, on_step=True, on_epoch=True)
        self.log("hits", self.accuracy, on_step=False, on_epoch=True)
        self.log_dict({"in_dict": loss * 2})
        return loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.log("at_batch_end", outputs["loss"])

    def on_train_epoch_end(self):
        self.log("at_epoch_end", torch.tensor(1.0))


class AlsoTelling(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        pl_module.log("by_callback", outputs["loss"])


class Bar(Callback):
    """What a progress bar would show, and what callbacks could monitor."""

    def __init__(self):
        self.shown, self.monitored = set(), set()

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.shown |= set(trainer.progress_bar_metrics)
        self.monitored |= set(trainer.callback_metrics)

    def on_train_epoch_end(self, trainer, pl_module):
        self.on_train_batch_end(trainer, pl_module)


def private(**settings):
    fixed = {"delta": 1e-3, "max_grad_norm": 0.5, "noise_multiplier": 1.0, "accountant": "rdp"}
    return DifferentialPrivacy(**{**fixed, "chunk_size": 16, **settings})


def fit(tmp_path, release, *extra, module=None, **settings):
    pl.seed_everything(0)
    module = Telling() if module is None else module
    callback, bar = private(release=release), Bar()
    run = trainer(
        callbacks=[AlsoTelling(), callback, LearningRateMonitor(), *extra, bar],
        logger=CSVLogger(tmp_path),
        log_every_n_steps=1,
        **{"max_epochs": 2, **settings},
    )
    run.fit(module, loader(128, 32), loader(32, 32, seed=1))
    return callback, run, bar, module


def logged(tmp_path):
    """Column → its values, of everything that was logged."""
    (path,) = tmp_path.rglob("metrics.csv")
    with path.open() as file:
        rows = list(csv.DictReader(file))
    return {name: [row[name] for row in rows if row[name]] for name in rows[0]}


def bases(names):
    """Metric names without the endings that Lightning gives them."""
    return {name.removesuffix("_step").removesuffix("_epoch") for name in names}


def test_tags_name_every_metric_that_was_computed_without_noise(tmp_path):
    callback, run, bar, _ = fit(tmp_path, "tag")
    assert callback.results()["unnoised_metrics"] == UNNOISED
    # And they all go where they always go.
    assert set(UNNOISED) <= bases(logged(tmp_path))
    assert set(UNNOISED) <= bases(bar.monitored)
    assert "train_loss" in bases(bar.shown)
    assert "val_loss" in run.callback_metrics
    assert not {EPSILON, "val_loss"} & set(callback.results()["unnoised_metrics"])


def test_withheld_metrics_reach_nobody(tmp_path):
    evaluation = RobustnessEvaluation({"pgd": PGD(Linf(0.1), steps=2)}, curve_records=0)
    callback, run, bar, _ = fit(tmp_path, "withhold", evaluation)
    columns = logged(tmp_path)
    for seen in (columns, bar.monitored, bar.shown, run.callback_metrics, run.logged_metrics):
        assert not set(UNNOISED) & bases(seen)
    assert callback.results()["unnoised_metrics"] == "withheld"
    # What is private, or not computed from the training data, does.
    assert {"val_loss", EPSILON, "robust/worst_case_accuracy"} <= set(run.callback_metrics)
    assert {"val_loss", EPSILON, "robust/worst_case_accuracy"} <= set(columns)
    assert len(columns["val_loss"]) == 2
    assert EPSILON in bar.shown
    assert float(columns[EPSILON][-1]) == pytest.approx(callback.epsilon, abs=1e-4)
    assert callback.steps == run.global_step == 8


@pytest.mark.parametrize("release", ["tag", "withhold"])
def test_the_learning_rate_is_logged(tmp_path, release):
    fit(tmp_path, release)
    rates = [float(v) for v in logged(tmp_path)["lr-SGD"]]
    reference = Telling()
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=8)
    expected = []
    for _ in range(8):
        expected.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx(expected)


def test_withholding_changes_no_step(tmp_path):
    weights = []
    for release in ("tag", "withhold"):
        pl.seed_everything(0)
        module = Telling()
        callback = private(release=release, insecure_seed=4)
        trainer(callbacks=[callback], logger=CSVLogger(tmp_path)).fit(module, loader(128, 32))
        weights.append(flat(module))
    assert torch.equal(*weights)


def test_a_checkpoint_cannot_monitor_what_is_withheld(tmp_path):
    saved = ModelCheckpoint(tmp_path / "a", monitor="train_loss")
    settings = {"enable_checkpointing": True}
    with pytest.raises(MisconfigurationException, match=r"could not find the monitored key"):
        fit(tmp_path / "withheld", "withhold", saved, **settings)
    watching = ModelCheckpoint(tmp_path / "b", monitor="train_loss")
    with pytest.raises(PrivacyError, match="ModelCheckpoint that monitors `train_loss`"):
        fit(tmp_path / "tagged", "tag", watching, **settings)


def test_a_checkpoint_may_monitor_validation(tmp_path):
    saved = ModelCheckpoint(tmp_path / "c", monitor="val_loss", filename="{step}")
    fit(tmp_path, "withhold", saved, enable_checkpointing=True)
    assert saved.best_model_score is not None
    state = torch.load(saved.best_model_path, weights_only=True)
    text = str(state["callbacks"]) + str(state["loops"])
    assert not [name for name in UNNOISED if name in text]


def test_after_the_fit_the_module_logs_as_usual(tmp_path):
    _, run, _, module = fit(tmp_path, "withhold")
    plain = trainer(max_epochs=1, logger=False)
    plain.fit(module, loader(128, 32), loader(32, 32, seed=1))
    assert {"train_loss", "at_batch_end", "at_epoch_end"} <= bases(plain.callback_metrics)
    (result,) = run.validate(module, loader(32, 32, seed=1), verbose=False)
    assert set(result) == {"val_loss"}
    assert "log" not in vars(run.fit_loop.epoch_loop._results)
    # The same Trainer, gone on without the callback, logs again too.
    run.callbacks = [c for c in run.callbacks if not isinstance(c, DifferentialPrivacy)]
    run.fit_loop.max_epochs = 3
    run.fit(module, loader(128, 32))
    assert "train_loss" in bases(run.callback_metrics)


def test_after_an_exception_the_trainer_logs_as_usual(tmp_path):
    class Failing(Telling):
        def on_train_epoch_end(self):
            raise RuntimeError("out of luck")

    module, callback = Failing(), private(release="withhold")
    run = trainer(callbacks=[callback], logger=CSVLogger(tmp_path))
    with pytest.raises(RuntimeError, match="out of luck"):
        run.fit(module, loader(128, 32))
    assert "log" not in vars(run.fit_loop.epoch_loop._results)


def test_names_are_collected_over_fits_and_repeat_none(tmp_path):
    callback = private()
    for _ in range(2):
        trainer(callbacks=[callback], logger=CSVLogger(tmp_path)).fit(Net(), loader(128, 32))
    assert callback.results()["unnoised_metrics"] == ["train_loss"]


def test_nothing_logged_is_nothing_named():
    class Silent(Net):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]), batch[1])

    callback = private()
    trainer(callbacks=[callback]).fit(Silent(), loader(128, 32))
    assert callback.results()["unnoised_metrics"] == []


def test_refuses_another_word():
    with pytest.raises(InputError, match=r"`release` to be one of .*'withhold'.*, got 'hide'"):
        private(release="hide")
