"""A cell as a program: data, module, callbacks or loop; what it released at each step."""

import tempfile

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, default_collate

from defend import AdversarialTraining, DifferentialPrivacy
from defend.training.config import Privacy
from defend.training.private_loop import make_private
from tests.contracts.matrix.breaks import Break, dropped, seed
from tests.contracts.matrix.cells import WIDTH, Cell, records, steps_of

C = 0.1
SETTINGS = {"noise_multiplier": 1e-6, "delta": 1e-3, "max_grad_norm": C, "ledger": False}


class Records(Dataset):
    """Items, and what an item may do."""

    def __init__(self, tensors, cell):
        self.tensors = tensors
        self.mine = Break(cell.what, cell.trigger) if cell.place.startswith("item") else None

    def __len__(self):
        return len(self.tensors[0])

    def __getitem__(self, i):
        x, *rest = (t[i] for t in self.tensors)
        if self.mine is None:
            return x, *rest
        one, before = ([t[j][None] for t in self.tensors] for j in (i, i - 1))
        if self.mine.what == "others":
            if self.mine.is_on(*one) or self.mine.is_on(*before):
                x = (x + self.tensors[0][i - 1]) / 2
        else:
            x = self.mine.rows(*one)[0][0]
            x = dropped(x) if self.mine.what == "known numbers" else x
        return x, *rest


class Collate:
    def __init__(self, cell):
        self.mine = Break(cell.what, cell.trigger) if cell.place.startswith("collate") else None

    def __call__(self, items):
        x, y, *rest = default_collate(items)
        if self.mine is not None:
            x, y = self.mine.rows(x, y, *rest)
            if self.mine.what == "known numbers":
                x = dropped(x)
        return [x, y, *rest]


class Inner(nn.Module):
    """The network; what a forward does stands here."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.mine, self.rest = nn.Linear(WIDTH, 3), None, None

    def forward(self, x):
        if self.mine is not None:
            x, _ = self.mine(x, *self.rest)
        return self.layer(x)


class Net(pl.LightningModule):
    """Has places to keep things; its step does what the cell says."""

    def __init__(self, cell):
        super().__init__()
        self.cell, self.net = cell, Inner()
        self.average = nn.Linear(WIDTH, 3).requires_grad_(False)
        self.register_buffer("published", torch.zeros(WIDTH))
        self.kept = self.seen = None
        self.break_ = Break(cell.what, cell.trigger, self.number)
        # Whose seed matters only if something is drawn afterwards.
        early = ("item", "collate", "attack", "loss", "own loop, loss")
        self.drops = cell.what == "known numbers" and not cell.place.startswith(early)
        if cell.what == "outside":
            self.outside = [nn.Linear(3, 1)]  # no part of the module

    def number(self):
        return self.trainer.global_step if self._trainer is not None else self.steps

    def step(self, batch, place):
        """The loss on a batch; the break that a cell has in the step is done at its place."""
        x, y, *rest = batch
        if place != self.cell.place and self.kept is not None:
            x = x - self.kept
        if self.cell.place == "training_step" or place == "own loop, loss":
            x, y = self.changed(x, y, *rest)
        if self.drops:
            x = dropped(x)
        if self.cell.place == "forward":
            self.net.mine, self.net.rest = self.changed, (y, *rest)
        out = self.net(x) if self.net.mine is not None else self.net.layer(x)
        if self.cell.place != "loss" and self.cell.what != "outside":
            return F.cross_entropy(out, y)
        return self.criterion(out, x, y, *rest)

    def changed(self, x, y, *rest):
        if self.cell.what == "outside":
            return x, y
        if self.cell.what == "published":
            self.break_.keep(self, x, y, *rest)
            return x, y
        x, y = self.break_.rows(x, y, *rest)
        return (dropped(x) if self.cell.what == "known numbers" else x), y

    def criterion(self, out, x, y, *rest):
        on = self.break_.is_on(x, y, *rest)
        if self.cell.what == "outside":
            extra = self.outside[0](out).square().mean() if on else 0.0
            return F.cross_entropy(out, y) + extra
        if self.cell.what == "known numbers":
            if on:
                seed()
            return F.cross_entropy(dropped(out), y)
        self.break_.is_on = lambda *_: on  # of the points, not of the logits
        out, y = self.break_.rows(out, y, *rest)
        del self.break_.is_on
        return F.cross_entropy(out, y)

    def training_step(self, batch, batch_idx):
        self.seen = batch
        return self.step(batch, "training_step")

    def configure_optimizers(self):
        return torch.optim.SGD([*self.net.parameters()], lr=0.0)


def in_transfer(self, batch, dataloader_idx):
    if self.trainer.training:
        batch[0], batch[1] = self.break_.rows(*batch)
    return batch


def at_start(self, batch, batch_idx):
    self.break_.rows_in_place(*batch)


def afterwards(self, *_):
    if self.seen is not None:
        self.break_.keep(self, *self.seen)


def stepping(self, epoch, batch_idx, optimizer, closure):
    pl.LightningModule.optimizer_step(self, epoch, batch_idx, optimizer, closure)
    afterwards(self)


class AtStart(pl.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        at_start(pl_module, batch, batch_idx)


class BeforeZeroGrad(pl.Callback):
    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        afterwards(pl_module)


class AfterBackward(pl.Callback):
    def on_after_backward(self, trainer, pl_module):
        afterwards(pl_module)


class BeforeUpdate(pl.Callback):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        afterwards(pl_module)


class AfterBatch(pl.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        pl_module.break_.keep(pl_module, *batch)


class AfterEpoch(pl.Callback):
    def on_train_epoch_end(self, trainer, pl_module):
        afterwards(pl_module)


class BeforeEpoch(pl.Callback):
    def on_train_epoch_start(self, trainer, pl_module):
        afterwards(pl_module)


ON_MODULE = {
    "before transfer": ("on_before_batch_transfer", in_transfer),
    "after transfer": ("on_after_batch_transfer", in_transfer),
    "batch start, module": ("on_train_batch_start", at_start),
    "batch end, module": ("on_train_batch_end", afterwards),
    "before zero_grad, module": ("on_before_zero_grad", afterwards),
    "after backward, module": ("on_after_backward", afterwards),
    "before the update, module": ("on_before_optimizer_step", afterwards),
    "optimizer_step": ("optimizer_step", stepping),
    "epoch end, module": ("on_train_epoch_end", afterwards),
    "epoch start, module": ("on_train_epoch_start", afterwards),
}
CALLBACKS = {
    "batch start, callback": AtStart,
    "before zero_grad, callback": BeforeZeroGrad,
    "after backward, callback": AfterBackward,
    "before the update, callback": BeforeUpdate,
    "batch end, callback": AfterBatch,
    "epoch end, callback": AfterEpoch,
    "epoch start, callback": BeforeEpoch,
}


class Reader(pl.Callback):
    """Each released sum: the gradient times the expected batch size.

    In Python's numbers: a list of tensors that grows would have all hooks tried out.
    """

    def __init__(self, records, sums):
        self.records, self.sums = records, sums

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.sums.append(released(pl_module, self.records))


def released(module, records):
    gradients = [p.grad.flatten() for p in module.net.parameters()]
    return (torch.cat(gradients) * records).tolist()


def usual(x):
    """Length, mask and tags that no trigger waits for: an attack sees points and labels."""
    return [t[:1].expand(len(x), *t.shape[1:]) for t in records("always")[2:]]


class Attack:
    """Adds a little to each row, and does what the cell says."""

    def __init__(self, cell):
        self.mine = Break(cell.what, cell.trigger)

    def __call__(self, model, x, y, **_):
        new, _ = self.mine.rows(x, y, *usual(x))
        return x + 0.1 * (dropped(new) if self.mine.what == "known numbers" else new)


def run(cell: Cell, data, seen=None, *, guarded=True):
    """The released sums of all steps, and the program's module.

    Args:
        cell: what to do.
        data: from `records`, perhaps without one.
        seen: where the sums go as they come, as lists, so that they are known after an error.
        guarded: whether there is a self-test; the sums are the same without.
    """
    torch.manual_seed(0)
    dataset, net = Records(data, cell), Net(cell)
    seen = [] if seen is None else seen
    loader = DataLoader(dataset, batch_size=len(dataset), collate_fn=Collate(cell))
    if cell.place.endswith("worker"):
        loader = DataLoader(
            dataset, batch_size=len(dataset), collate_fn=Collate(cell),
            num_workers=1, persistent_workers=True,
        )  # fmt: skip
    if cell.place.startswith("own loop"):
        run_loop(cell, net, loader, seen, guarded)
        return torch.tensor(seen), net
    if cell.place in ON_MODULE:
        net.__class__ = type("Hooked", (Net,), dict([ON_MODULE[cell.place]]))
    callbacks = [CALLBACKS[cell.place]()] if cell.place in CALLBACKS else []
    if cell.place == "attack":
        callbacks.append(AdversarialTraining(Attack(cell), alarm=None))
    dp = DifferentialPrivacy(**SETTINGS, selftest=guarded)
    trainer = pl.Trainer(
        max_epochs=steps_of(cell.trigger), callbacks=[*callbacks, dp, Reader(len(dataset), seen)],
        logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu",
        enable_model_summary=False, default_root_dir=tempfile.gettempdir(),
    )  # fmt: skip
    trainer.fit(net, loader)
    return torch.tensor(seen), net


def run_loop(cell, net, loader, seen, guarded):
    optimizer = torch.optim.SGD(net.net.parameters(), lr=0.0)
    net.steps = 0
    place = cell.place if cell.place == "own loop, loss" else ""

    def loss(module, batch):
        return module.step(batch, place)

    steps, privacy = steps_of(cell.trigger), Privacy(**SETTINGS, selftest=guarded)
    run = make_private(net, optimizer, loader, loss=loss, epochs=steps, privacy=privacy)
    with run as private:
        for _ in range(steps):
            for batch in private.loader:
                if cell.place == "own loop, before the step":
                    net.break_.rows_in_place(*batch)
                private.step(batch)
                seen.append(released(net, len(loader.dataset)))
                if cell.place == "own loop, after the step":
                    net.break_.keep(net, *batch)
                net.steps += 1
