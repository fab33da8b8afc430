"""Hooks as people write them, beside a private run: they are left alone, and their files too."""

import os
import threading
import time
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, Dataset

from defend import DifferentialPrivacy, PrivacyError
from defend.privacy.checks.dry_run_records import survey
from tests.helpers import data, trainer

ROWS = 24


class Net(pl.LightningModule):
    """Asks for its number, so that trials are long; keeps a schedule and a count in buffers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(8, 3)
        self.register_buffer("tau", torch.ones(()))
        self.register_buffer("count", torch.zeros(()))

    def training_step(self, batch, batch_idx):
        scale = 0.5 if self.global_step % 2 else 1.0
        return scale * F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Clock(pl.Callback):
    """A time that changes each epoch: enough for hooks to be tried out."""

    def on_train_epoch_start(self, trainer, pl_module):
        self.started = time.time()


def fitted(module, *callbacks, make=trainer, **settings):
    dp = DifferentialPrivacy(noise_multiplier=1.0, delta=1e-3, max_grad_norm=1.0, ledger=False)
    settings = {"max_epochs": 3, "limit_val_batches": 1, **settings}
    fit = make(callbacks=[*callbacks, Clock(), dp], **settings)
    loader = DataLoader(data(ROWS), batch_size=12)
    fit.fit(module, loader, DataLoader(data(4), batch_size=4))
    assert dp.steps == 6
    return fit


def test_checkpoints_stay(tmp_path):
    class Best(ModelCheckpoint):
        pass

    seen = []

    class Reads(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append(len(list(tmp_path.iterdir())))

    best = Best(tmp_path, save_top_k=1)
    fitted(Net(), best, Reads(), enable_checkpointing=True)
    assert [f.name for f in tmp_path.iterdir()] == ["epoch=2-step=6.ckpt"]
    assert seen == [0, 0, 1, 1, 1, 1]


def test_what_a_hook_saves_is_what_the_module_held(tmp_path):
    file = tmp_path / "weights.pt"

    class Saves(Net):
        def on_train_epoch_end(self):
            self.tau.mul_(0.5)
            torch.save(self.state_dict(), file)

    module = Saves()
    fitted(module)
    assert float(torch.load(file)["tau"]) == float(module.tau) == 0.125


class Anneals(Net):
    def on_train_batch_start(self, batch, batch_idx):
        self.tau.fill_(0.9**self.global_step)


class SetsUp(Net):
    def on_train_start(self):
        self.tau.fill_(0.5)


class Calibrates(Net):
    def on_validation_end(self):
        self.tau.add_(1.0)


class ReadsTheRate(Net):
    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.rate = self.optimizers().param_groups[0]["lr"]
        self.folder = Path(self.trainer.logger.log_dir) if self.trainer.logger else None


class NowAndThenNoisy(Net):
    def training_step(self, batch, batch_idx):
        x, y = batch
        if self.global_step % 5 == 4:
            x = x + 0.3 * torch.randn_like(x)
        return super().training_step([x, y], batch_idx)


@pytest.mark.parametrize("kind", [Anneals, SetsUp, Calibrates, ReadsTheRate, NowAndThenNoisy])
def test_modules_with_hooks_train(kind):
    fitted(kind())


class HoldsALock(pl.Callback):
    def __init__(self):
        self.lock, self.file = threading.Lock(), Path(os.devnull).open("w")  # noqa: SIM115

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        with self.lock:
            self.file.write(str(float(outputs["loss"])))
            self.last = float(outputs["loss"])

    def on_train_end(self, trainer, pl_module):
        self.file.close()


class FailsInTrials(pl.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.last = float(outputs["loss"])
        if type(trainer) is not pl.Trainer:
            raise RuntimeError("no such logger")


@pytest.mark.parametrize("kind", [HoldsALock, FailsInTrials])
def test_callbacks_that_are_hard_to_try_train_as_long_as_they_publish_nothing(kind):
    fitted(Net(), kind())


def test_lightnings_averages_may_take_the_place_of_weights():
    class Counts(Net):
        def training_step(self, batch, batch_idx):
            self.count += 1
            return super().training_step(batch, batch_idx)

    fitted(Counts(), EMAWeightAveraging(decay=0.5))


def test_a_trainer_of_ones_own_keeps_its_methods():
    class Mine(pl.Trainer):
        def scale(self):
            return 0.5

    class Uses(Net):
        def training_step(self, batch, batch_idx):
            return self.trainer.scale() * super().training_step(batch, batch_idx)

    def make(**settings):
        return Mine(
            logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, accelerator="cpu", **settings,
        )  # fmt: skip

    fitted(Uses(), make=make)


# --- what is kept in odd places -------------------------------------------------------------------

STATS = None


class Keeps(Net):
    stats = None

    def training_step(self, batch, batch_idx):
        x, y = batch
        for mean in self.kept():
            x = x - mean
        return super().training_step([x, y], batch_idx)


class InATuple(Keeps):
    def kept(self):
        return self.stats or ()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.stats = (batch[0].mean(0),)


class InAGlobal(Keeps):
    def kept(self):
        return () if STATS is None else (STATS,)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        global STATS
        STATS = batch[0].mean(0)


class InAQueue(Keeps):
    def __init__(self):
        super().__init__()
        self.queue = [torch.zeros(8)]

    def kept(self):
        return self.queue[-1:]

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.queue.append(batch[0].mean(0))


class InANumber(Keeps):
    def kept(self):
        return () if self.stats is None else (float(self.stats),)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.stats = np.float64(batch[0].mean())


@pytest.mark.parametrize("kind", [InATuple, InAGlobal, InAQueue, InANumber])
def test_what_a_hook_keeps_in_odd_places_is_found(kind):
    with pytest.raises(PrivacyError, match="nor in the batch before"):
        fitted(kind())


# --- data that torch has no numbers for -----------------------------------------------------------


class Odd(Dataset):
    ragged = np.array([np.zeros(2), np.zeros(3)], dtype=object)

    def __len__(self):
        return ROWS

    def __getitem__(self, i):
        picture = np.arange(12.0).reshape(3, 4) + i
        return picture[:, ::-1], np.array([i], ">i2"), 2**70 + i, np.longdouble(i), "name"


def test_data_of_any_kind_is_looked_at():
    found = survey(Odd())
    assert len(found.values[1]) > 3
    assert all(0 <= i < ROWS for i in found.odd)


# --- what start hooks set up, and what draws ------------------------------------------------------


class SetUpByHooks(Net):
    """The step needs what hooks set up: it is tried out once they ran."""

    def on_fit_start(self):
        self.weight = torch.ones(3)

    def on_train_epoch_start(self):
        self.losses = []

    def on_train_batch_start(self, batch, batch_idx):
        self.alpha = min(1.0, (1 + self.global_step) / 10)

    def training_step(self, batch, batch_idx):
        loss = self.alpha * self.weight[0] * super().training_step(batch, batch_idx)
        self.losses.append(loss.detach())
        return loss


class SetUpAndUnsound(SetUpByHooks):
    def training_step(self, batch, batch_idx):
        x, y = batch
        return super().training_step([x - x.mean(0), y], batch_idx)


def test_a_step_that_needs_its_hooks_is_tried_out_after_them():
    fitted(SetUpByHooks())
    with pytest.raises(PrivacyError, match="alone and in a batch") as caught:
        fitted(SetUpAndUnsound())
    assert "after step 0 of this fit" in str(caught.value)


class Words(Dataset):
    """Of different lengths; one is much longer than all others."""

    def __init__(self):
        generator = np.random.default_rng(0)
        self.items = [generator.integers(1, 20, 2 + i % 7).tolist() for i in range(ROWS)]
        self.items[3] = [5] * 30

    def __len__(self):
        return ROWS

    def __getitem__(self, i):
        return self.items[i], self.items[i][0] % 3


def padded(items):
    ids = torch.zeros(len(items), max(len(words) for words, _ in items), dtype=torch.long)
    for row, (words, _) in zip(ids, items, strict=True):
        row[: len(words)] = torch.tensor(words)
    return ids, torch.tensor([y for _, y in items])


class Reads(Net):
    def __init__(self):
        super().__init__()
        self.table, self.drop = nn.Embedding(20, 8), nn.Dropout(0.1)

    def training_step(self, batch, batch_idx):
        ids, y = batch
        mask = (ids > 0).unsqueeze(-1).float()
        h = self.drop(self.table(ids)) * mask
        return F.cross_entropy(self.net(h.sum(1) / mask.sum(1)), y)


def test_dropout_on_batches_padded_to_the_longest_trains():
    dp = DifferentialPrivacy(noise_multiplier=1.0, delta=1e-3, max_grad_norm=1.0, ledger=False)
    fit = trainer(callbacks=[dp], max_epochs=1)
    fit.fit(Reads(), DataLoader(Words(), batch_size=12, collate_fn=padded))
    assert dp.steps == 2


class DropsRows(pl.Callback):
    """Draws from a generator of its own, which a fit starts from OS entropy each time."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(3)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        kept = torch.rand(batch[0].shape, generator=self.generator) > 0.2
        batch[0].mul_(kept)


class Averages(pl.Callback):
    """Its own dict has the names of the module's weights."""

    def on_fit_start(self, trainer, pl_module):
        self.ema = {name: t.clone() for name, t in pl_module.state_dict().items()}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        for name, tensor in pl_module.state_dict().items():
            self.ema[name].mul_(0.9).add_(tensor, alpha=0.1)


@pytest.mark.parametrize("kind", [DropsRows, Averages])
def test_callbacks_with_things_of_their_own_train(kind):
    fitted(Net(), kind())


# --- what hides well ---


class LargestSoFar(Net):
    """Only the largest record moves what is carried on."""

    largest = 1.0

    def training_step(self, batch, batch_idx):
        x = batch[0] / self.largest
        self.largest = max(self.largest, float(batch[0].abs().max()))
        return super().training_step([x, batch[1]], batch_idx)


class ByPlace(Net):
    def training_step(self, batch, batch_idx):
        x, y = batch
        signs = torch.where(torch.arange(len(x)) < 8, 1.0, -1.0)
        return super().training_step([x * signs.unsqueeze(1), y], batch_idx)


class InLargeBatches(Net):
    def training_step(self, batch, batch_idx):
        x, y = batch
        return super().training_step([x - x.mean(0) if len(x) > 16 else x, y], batch_idx)


class WeightsAnew(Net):
    """A new dict each epoch, of shares that records have in the last losses."""

    def __init__(self):
        super().__init__()
        self.weights = dict.fromkeys(range(3), 1.0)

    def training_step(self, batch, batch_idx):
        x, y = batch
        weight = torch.tensor([self.weights[int(label)] for label in y])
        self.seen = float(x.detach().square().mean())
        return (weight * F.cross_entropy(self.net(x), y, reduction="none")).mean()

    def on_train_epoch_end(self):
        self.weights = dict.fromkeys(range(3), self.seen)


@pytest.mark.parametrize("kind", [LargestSoFar, ByPlace, InLargeBatches, WeightsAnew])
def test_what_hides_well_is_found(kind):
    with pytest.raises(PrivacyError, match=r"the batch before|in a batch|record holds"):
        fitted(kind())


class LogsNorms(Net):
    """The norm of each gradient, logged from a hook."""

    def norms(self):
        self.log("norms", sum(p.grad.norm() for p in self.parameters()))


class AfterBackward(LogsNorms):
    def on_after_backward(self):
        self.norms()


class BeforeStep(LogsNorms):
    def on_before_optimizer_step(self, optimizer):
        self.norms()


def test_gradients_that_are_read_too_early_are_explained():
    """Python says that None has no `norm`; the note tells the hook that works, which does."""
    with pytest.raises(AttributeError) as error:
        fitted(AfterBackward())
    assert "in on_before_optimizer_step" in error.value.__notes__[0]
    fitted(BeforeStep())


def normalized(loss):
    loss.div_(loss.detach().clone())


def flooded(loss):
    loss.sub_(0.5).abs_().add_(0.5)


def hooked(loss):
    loss.register_hook(lambda gradient: gradient * 2)


class BeforeBackward(pl.Callback):
    def __init__(self, change):
        self.change, self.seen = change, []

    def on_before_backward(self, trainer, pl_module, loss):
        self.seen.append(float(loss.detach()))
        self.change(loss)


@pytest.mark.parametrize("change", [normalized, flooded, hooked])
def test_a_loss_that_is_changed_before_the_backward_is_refused(change):
    """It scales the gradient of each record by all the others."""
    with pytest.raises(PrivacyError, match="one that `on_before_backward` changed"):
        fitted(Net(), BeforeBackward(change))


def test_a_loss_that_is_looked_at_before_the_backward_trains():
    fitted(Net(), BeforeBackward(lambda loss: None))


class Unpicklable:
    """A scheduler's part that cannot be copied."""

    def __deepcopy__(self, memo):
        raise TypeError("no copy of me")


class Decays(Net):
    """Moves the learning rate by hand."""

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=1.0)
        scheduler.part = Unpicklable()
        return [optimizer], [scheduler]

    def on_train_epoch_end(self):
        self.optimizers().param_groups[0]["lr"] *= 0.5


def test_where_optimizers_cannot_be_copied_no_hook_is_tried_on_the_fits_own():
    fit = fitted(Decays())
    assert fit.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**3)
