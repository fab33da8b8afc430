"""Numbers and categories as two inputs, as in the UCI tables: `python docs/examples/tabular.py`."""

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from defend import DifferentialPrivacy

CATEGORIES = (7, 4, 2)  # of occupation, region and contract


def people(count=4000, seed=0):
    """A made-up table: five numbers, three categories, and whether the income is high."""
    g = torch.Generator().manual_seed(seed)
    numbers = torch.randn(count, 5, generator=g)
    categories = torch.stack([torch.randint(n, (count,), generator=g) for n in CATEGORIES], 1)
    score = numbers[:, 0] + numbers[:, 1] * (categories[:, 1] - 1.5) + (categories[:, 0] > 3)
    return TensorDataset(numbers, categories, (score > 0.5).float())


class Income(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(n, 4) for n in CATEGORIES)
        self.scale = nn.Parameter(torch.ones(5))
        self.net = nn.Sequential(nn.Linear(5 + 4 * 3, 32), nn.GELU(), nn.Linear(32, 1))

    def forward(self, numbers, categories):
        embedded = [table(categories[:, i]) for i, table in enumerate(self.tables)]
        return self.net(torch.cat([numbers * self.scale, *embedded], 1)).squeeze(1)

    def training_step(self, batch, batch_idx):
        numbers, categories, high = batch
        return F.binary_cross_entropy_with_logits(self(numbers, categories), high)

    def validation_step(self, batch, batch_idx):
        numbers, categories, high = batch
        right = (self(numbers, categories) > 0) == high.bool()
        self.log("val_accuracy", right.float().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def main(count=4000, epochs=3):
    privacy = DifferentialPrivacy(target_epsilon=3.0, delta=1e-5, max_grad_norm=1.0)
    trainer = pl.Trainer(max_epochs=epochs, callbacks=[privacy], accelerator="auto")
    train = DataLoader(people(count), batch_size=256, shuffle=True)
    trainer.fit(Income(), train, DataLoader(people(1000, seed=1), batch_size=500))
    accuracy = float(trainer.callback_metrics["val_accuracy"])
    print(f"accuracy {accuracy:.3f} at epsilon {privacy.epsilon:.2f}")
    return accuracy, privacy


if __name__ == "__main__":
    main()
