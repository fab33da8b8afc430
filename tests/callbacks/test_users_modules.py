"""What users bring to a private fit: batches, data modules, and what modules do in a step."""

import csv
import dataclasses

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, Dataset
from torchmetrics.classification import MulticlassAccuracy

from defend import PrivacyError
from tests.callbacks.users import assert_equal_to_plain, everything, fit, plain_and_private, private
from tests.helpers import Net, data, flat, loader, trainer

# --- batches and data modules -------------------------------------------------------------------


@dataclasses.dataclass
class Batch:
    x: torch.Tensor
    y: torch.Tensor


def stack(rows, kind):
    x, y = (torch.stack(column) for column in zip(*rows, strict=True))
    return {"tuple": (x, y), "dict": {"x": x, "y": y}, "dataclass": Batch(x, y)}[kind]


def fields(batch):
    if isinstance(batch, tuple | list):
        return batch
    return (batch["x"], batch["y"]) if isinstance(batch, dict) else (batch.x, batch.y)


class AnyBatch(Net):
    def training_step(self, batch, batch_idx):
        x, y = fields(batch)
        return F.cross_entropy(self(x), y)


@pytest.mark.parametrize("kind", ["tuple", "dict", "dataclass"])
def test_kinds_of_batches(kind):
    def batches():
        collate = lambda rows: stack(rows, kind)  # noqa: E731
        return DataLoader(data(24), batch_size=24, collate_fn=collate)

    assert_equal_to_plain(AnyBatch, batches)


class Augmented(pl.LightningDataModule):
    """Shifts the inputs in training, after they are on the device."""

    noise = 0.0

    def setup(self, stage):
        self.dataset = data(24)

    def train_dataloader(self):
        return DataLoader(self.dataset, batch_size=24)

    def val_dataloader(self):
        return DataLoader(self.dataset, batch_size=24)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        x, y = batch
        if self.trainer.training:
            x = x + 0.5 + self.noise * torch.randn_like(x)
        return x, y


def test_a_data_module_that_augments_batches(monkeypatch):
    assert_equal_to_plain(Net, Augmented)
    shifted = plain_and_private(Net, Augmented)[1]
    assert not torch.allclose(shifted, plain_and_private(Net, everything)[1], atol=1e-3)
    monkeypatch.setattr(Augmented, "noise", 0.1)
    callback = private()
    module = Net()
    trainer(callbacks=[callback], max_epochs=4).fit(module, datamodule=Augmented())
    assert callback.steps == 4
    assert callback.selftest.passed


def test_persistent_workers_change_nothing():
    modules = []
    for workers in (0, 2):
        batches = loader(256, 32, num_workers=workers, persistent_workers=workers > 0)
        modules.append(fit(private(chunk_size=7), batches=batches, max_epochs=2)[0])
    torch.testing.assert_close(flat(modules[0]), flat(modules[1]), rtol=0, atol=0)


# --- what modules do in a training step ---------------------------------------------------------


class Busy(Net):
    """Takes no index, measures, reads the trainer, and writes to the logger itself."""

    def __init__(self, width=16, lr=0.05):
        super().__init__(lr=lr)
        self.save_hyperparameters()
        self.accuracy = MulticlassAccuracy(num_classes=3)
        self.activation = lambda x: x.tanh()
        self.places = []

    def training_step(self, batch):
        x, y = batch
        scores = self.activation(self(x))
        self.places.append((self.trainer.global_step, self.current_epoch))
        self.accuracy(scores, y)
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        self.logger.experiment.log_metrics(
            {"by_hand": float(self.trainer.global_step)}, step=len(self.places) - 1
        )
        return F.cross_entropy(scores, y)


def busy_run(tmp_path, *callbacks, **settings):
    logger = CSVLogger(tmp_path)
    pl.seed_everything(0)
    module = Busy()
    run = trainer(callbacks=list(callbacks), logger=logger, log_every_n_steps=100, **settings)
    run.fit(module, everything())
    return module, run


def test_a_busy_training_step(tmp_path):
    callback = private(noise_multiplier=0.0, max_grad_norm=1e9)
    results = [busy_run(tmp_path, *extra, max_epochs=3) for extra in ([], [callback])]
    (plain, plain_run), (module, run) = results
    assert module.places == plain.places == [(0, 0), (1, 1), (2, 2)]
    assert module.hparams == plain.hparams
    assert callback.steps == 3
    torch.testing.assert_close(flat(module), flat(plain), rtol=0, atol=1e-5)
    accuracy = [r.callback_metrics["accuracy"] for r in (plain_run, run)]
    torch.testing.assert_close(*accuracy)


def test_metrics_do_not_depend_on_chunks(tmp_path):
    found = []
    for chunk_size in (None, 7):
        callback = private(noise_multiplier=0.0, chunk_size=chunk_size)
        found.append(busy_run(tmp_path, callback)[1].callback_metrics["accuracy"])
    torch.testing.assert_close(*found)


def test_the_self_test_writes_nothing_to_the_logger(tmp_path):
    busy_run(tmp_path, private(), max_epochs=3)
    (path,) = tmp_path.rglob("metrics.csv")
    with path.open() as file:
        values = [row["by_hand"] for row in csv.DictReader(file)]
    assert [float(value) for value in values if value] == [0.0, 1.0, 2.0]


class Indexed(Net):
    """The second argument may have any name."""

    def training_step(self, batch, i):
        assert isinstance(i, int)
        return F.cross_entropy(self(batch[0]), batch[1])


def test_an_index_by_another_name():
    assert_equal_to_plain(Indexed, everything)


class Seeded(Net):
    """Augments from a generator of its own."""

    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(3)

    def training_step(self, batch, batch_idx):
        x, y = batch
        x = x + 0.3 * torch.randn(x.shape, generator=self.generator)
        return F.cross_entropy(self(x), y)


def test_a_generator_of_torch_on_the_module():
    assert_equal_to_plain(Seeded, everything, chunk_size=None)


def test_a_generator_of_python_on_the_module_needs_the_self_test_off():
    class Counting(Net):
        def __init__(self):
            super().__init__()
            self.ids = (i for i in range(100))

        def training_step(self, batch, batch_idx):
            self.last = next(self.ids)
            return super().training_step(batch, batch_idx)

    with pytest.raises(PrivacyError, match=r"a module that can be copied .* pass selftest=False"):
        fit(private(), Counting)
    module, _ = fit(private(selftest=False), Counting)
    assert module.last == 7


class Uncopied(Dataset):
    """Large data: a copy would not fit."""

    def __init__(self, records):
        self.records, self.copies = data(records), 0

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i):
        return self.records[i]

    def __deepcopy__(self, memo):
        self.copies += 1
        return self


class Source(pl.LightningDataModule):
    def __init__(self):
        super().__init__()
        self.dataset = Uncopied(24)

    def train_dataloader(self):
        return DataLoader(self.dataset, batch_size=24)


def knowing(**settings):
    """A fit of a module that knows its trainer and its data module."""
    callback = private(**settings)
    pl.seed_everything(0)
    module, source = Net(), Source()
    run = trainer(callbacks=[callback], max_epochs=3)
    module.boss, module.source = run, source
    run.fit(module, datamodule=source)
    assert callback.steps == 3
    return module, source


def test_a_module_that_knows_its_trainer_and_data_module():
    plain, _ = plain_and_private(Net, everything)
    module, source = knowing(noise_multiplier=0.0, max_grad_norm=1e9)
    torch.testing.assert_close(flat(module), plain, rtol=0, atol=1e-5)
    assert module.source is source


def test_the_self_test_copies_no_data():
    assert knowing()[1].dataset.copies == 0
