"""What the tests of users' schedules, models, modules and runs share.

Models are checked against plain training. With all records in each batch (q = 1), no noise and a C
that clips nothing, a private step is the plain full-batch step, whatever its chunks.
"""

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from defend import DifferentialPrivacy
from tests.helpers import Net, data, flat, loader, trainer

C, SEED = 0.5, 5


def private(**settings):
    """Noised, but repeatable."""
    fixed = {"delta": 1e-3, "max_grad_norm": C, "noise_multiplier": 0.7, "accountant": "rdp"}
    return DifferentialPrivacy(**{**fixed, "insecure_seed": SEED, **settings})


def fit(callback, module=None, batches=None, *, val=None, ckpt=None, extra=(), **settings):
    """From the weights of seed 0; 256 records in expected batches of 32 unless told otherwise."""
    pl.seed_everything(0)
    module = Net() if module is None else module() if isinstance(module, type) else module
    run = trainer(callbacks=[callback, *extra], **settings)
    run.fit(module, batches or loader(256, 32), val, ckpt_path=ckpt)
    assert callback.steps == run.global_step
    return module, run


def plain_and_private(make, batches, *, epochs=3, chunk_size=5, weights=flat, **settings):
    """The weights after training on all records at each step, plainly and privately.

    Args:
        make: gives a module; called under the same seed.
        batches: gives a loader whose batch holds all records, or a data module.
    """
    found = []
    for callback in (
        None,
        private(noise_multiplier=0.0, max_grad_norm=1e9, chunk_size=chunk_size, selftest=True),
    ):
        pl.seed_everything(0)
        module = make()
        before = weights(module)
        run = trainer(callbacks=[callback] if callback else [], max_epochs=epochs, **settings)
        run.fit(module, batches())
        assert run.global_step == epochs
        assert not torch.equal(weights(module), before)
        found.append(weights(module))
    assert callback.steps == epochs
    assert callback.selftest.passed
    return found


def assert_equal_to_plain(make, batches, *, atol=1e-5, **settings):
    plain, privately = plain_and_private(make, batches, **settings)
    torch.testing.assert_close(privately, plain, rtol=0, atol=atol)


def everything(records=24):
    return DataLoader(data(records), batch_size=records)


class Bare(pl.LightningModule):
    """A module whose parts are given; cross-entropy on (input, class)."""

    def __init__(self, *parts):
        super().__init__()
        self.net = nn.Sequential(*parts)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.2)


def words(records=24, length=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 11, (records, length), generator=generator)
    return TensorDataset(ids, ids.sum(1) % 3)


def all_words():
    return DataLoader(words(), batch_size=24)
