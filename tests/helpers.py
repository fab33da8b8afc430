"""Small models, data and trainers that the tests share. Importable by spawned processes."""

import tempfile

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(pl.LightningModule):
    """An ordinary module: it knows nothing of defend."""

    def __init__(self, lr=0.05, schedule=False, features=8, classes=3):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(features, 16), nn.ReLU(), nn.Linear(16, classes))

    def forward(self, x):
        return self.net(x.flatten(1))

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", F.cross_entropy(self(x), y))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams.lr, momentum=0.9)
        if not self.hparams.schedule:
            return optimizer
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, 0.1, total_steps=self.trainer.estimated_stepping_batches
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


class ConvNet(pl.LightningModule):
    """Convolutions, GroupNorm and dropout, on [0, 1] images."""

    def __init__(self, channels=1, classes=3):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(channels, 4, 3, padding=1),
            nn.GroupNorm(2, 4),
            nn.ReLU(inplace=True),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(4 * 36, classes),
        )

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def data(records=64, features=8, seed=0):
    """Learnable points in the box [0, 1] with three classes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(records, features, generator=generator)
    weights = torch.randn(features, 3, generator=generator)
    return TensorDataset(x, ((x - 0.5) @ weights).argmax(1))


def loader(records=64, batch_size=8, seed=0, **settings):
    return DataLoader(data(records, seed=seed), batch_size=batch_size, shuffle=True, **settings)


# Ledgers go here, so that resumed runs of one test process find them.
ROOT_DIR = tempfile.mkdtemp(prefix="defend-tests-")


def trainer(**settings):
    defaults = {
        "default_root_dir": ROOT_DIR,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 1,
    }
    return pl.Trainer(**{**defaults, **settings})


def flat(module):
    """All parameters in one vector."""
    return torch.cat([p.detach().flatten() for p in module.parameters()])
