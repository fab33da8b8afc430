"""What a step, a loss or a hook keeps of the records, and the next step uses."""

import collections

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from defend import DifferentialPrivacy, PrivacyError
from defend.privacy.checks.kept_state import remember
from defend.privacy.mechanism.generators import objects_in
from tests.helpers import data, trainer


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))

    def losses(self, batch):
        return F.cross_entropy(self.net(batch[0]), batch[1], reduction="none")

    def training_step(self, batch, batch_idx):
        return self.losses(batch).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class RunningMean(Net):
    mean = torch.zeros(8)

    def training_step(self, batch, batch_idx):
        x = batch[0] - self.mean
        self.mean = 0.5 * self.mean + 0.5 * batch[0].mean(0)
        return super().training_step([x, batch[1]], batch_idx)


class InPlace(Net):
    """An array that is written to."""

    def __init__(self):
        super().__init__()
        self.mean = np.zeros(8, np.float32)

    def training_step(self, batch, batch_idx):
        x = batch[0] - torch.from_numpy(self.mean.copy())
        self.mean += 0.1 * batch[0].mean(0).numpy()
        return super().training_step([x, batch[1]], batch_idx)


class LastLosses(Net):
    """Weights each step by the losses before it: a plain number."""

    def __init__(self):
        super().__init__()
        self.recent = collections.deque(maxlen=3)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.recent.append(float(loss.detach()))
        return loss * self.recent[0]


class OtherRecords(Net):
    """Mixes with the batch before."""

    before = None

    def training_step(self, batch, batch_idx):
        x, y = batch
        if self.before is not None:
            x = 0.7 * x + 0.3 * self.before
        self.before = batch[0].mean(0)
        return super().training_step([x, y], batch_idx)


class InAClosure(Net):
    def __init__(self):
        super().__init__()
        kept = {}

        def scale(x):
            found = kept.get("mean", 1.0)
            kept["mean"] = float(x.abs().mean())
            return x / found

        self.scale = scale

    def training_step(self, batch, batch_idx):
        return super().training_step([self.scale(batch[0]), batch[1]], batch_idx)


MEAN = None


class InAGlobal(Net):
    def training_step(self, batch, batch_idx):
        global MEAN
        x = batch[0] if MEAN is None else batch[0] - MEAN
        MEAN = batch[0].mean(0)
        return super().training_step([x, batch[1]], batch_idx)


class InAClass(Net):
    means = ()

    def training_step(self, batch, batch_idx):
        for mean in type(self).means:
            batch = [batch[0] - mean, batch[1]]
        type(self).means = (batch[0].mean(0),)
        return super().training_step(batch, batch_idx)


class Counts(Net):
    """A warm-up by the number of calls, and figures that nothing is made of."""

    def __init__(self):
        super().__init__()
        self.calls, self.history, self.last = 0, [], None

    def training_step(self, batch, batch_idx):
        self.calls += 1
        loss = super().training_step(batch, batch_idx) * min(1.0, self.calls / 4)
        self.history.append(loss.detach())
        self.last = batch[0].mean(0)
        return loss


def run(module):
    dp = DifferentialPrivacy(noise_multiplier=1.0, delta=1e-3, max_grad_norm=1.0, ledger=False)
    trainer(callbacks=[dp], max_epochs=2).fit(module, DataLoader(data(24), batch_size=24))
    return dp


KEEPING = (RunningMean, InPlace, LastLosses, OtherRecords, InAClosure, InAGlobal, InAClass)


@pytest.mark.parametrize("kind", KEEPING)
def test_what_is_carried_from_batch_to_batch_is_found(kind):
    with pytest.raises(PrivacyError, match=r"nor in the batch before|alone and in a"):
        run(kind())


@pytest.mark.parametrize("kind", [Net, Counts])
def test_counters_and_figures_pass(kind):
    assert run(kind()).steps == 2


def test_state_is_put_back():
    class Part:
        shared = 0

        def __init__(self):
            self.numbers, self.tensor = [1, {"a": 2}], torch.arange(3.0)
            self.array, self.seen, self.line = np.arange(3), {1}, collections.deque([1])

    kept = [0]

    def function():
        global MEAN
        kept[0] += 1
        Part.shared = MEAN = 1

    part, module = Part(), nn.BatchNorm1d(2)
    module.part, module.call = part, function
    put_back = remember(objects_in([module]))
    for _ in range(2):
        part.numbers.append(2)
        part.numbers[1]["a"] = 3
        part.tensor += 1
        part.array[0] = 7
        part.seen.add(2)
        part.line.append(2)
        part.new, part.array = 1, part.array
        function()
        module(torch.randn(4, 2))
        module.count = 1
        put_back()
        assert part.numbers == [1, {"a": 2}]
        assert part.tensor.tolist() == [0, 1, 2]
        assert part.array.tolist() == [0, 1, 2]
        assert (part.seen, list(part.line), kept) == ({1}, [1], [0])
        assert not hasattr(part, "new")
        assert (Part.shared, MEAN) == (0, None)
        assert not hasattr(module, "count")
        assert module.running_mean.tolist() == [0, 0]
        assert int(module.num_batches_tracked) == 0
