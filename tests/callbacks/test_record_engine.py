"""`engine="record"`: the user's step on each record alone, under a Trainer and in own loops."""

import logging
import math
from collections import deque
from unittest import mock

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchmetrics import Accuracy

from defend import (
    PGD,
    AdversarialTraining,
    DifferentialPrivacy,
    InputSpace,
    Linf,
    Privacy,
    make_private,
)
from defend.errors import PrivacyError
from defend.objectives import AWP, MART, TRADES, Madry
from defend.privacy.checks.isolation import Isolation
from tests.helpers import ROOT_DIR, data, flat, trainer
from tests.reference.dpsgd import clipped_sum

C = 0.05
RECORDS = 12


def private(**settings):
    """Without noise, all records in each batch."""
    defaults = {"delta": 1e-3, "noise_multiplier": 0.0, "max_grad_norm": C, "insecure_seed": 1}
    return DifferentialPrivacy(**{**defaults, "ledger": False, **settings})


def fit(module, callback, dataset=None, *, extra=(), workers=0, collate=None, **settings):
    dataset = data(RECORDS) if dataset is None else dataset
    batches = DataLoader(dataset, batch_size=len(dataset), num_workers=workers, collate_fn=collate)
    settings = {"max_steps": 1, "max_epochs": None, **settings}
    run = trainer(callbacks=[callback, *extra], **settings)
    run.fit(module, batches)
    return run


class Cells(pl.LightningModule):
    """A cell's two outputs feed each other: no rule tells its rows apart."""

    def __init__(self, kind=nn.LSTMCell):
        super().__init__()
        torch.manual_seed(0)
        self.cell, self.head = kind(8, 6), nn.Linear(6, 3)
        self.accuracy = Accuracy(task="multiclass", num_classes=3)

    def forward(self, x):
        state = None
        for _ in range(2):
            state = self.cell(x, state)
        return self.head(state[0] if isinstance(state, tuple) else state)

    def loss(self, x, y):
        return F.cross_entropy(self(x), y)

    def training_step(self, batch, batch_idx):
        loss = self.loss(*batch)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.accuracy(self(batch[0]), batch[1])
        self.log("accuracy", self.accuracy)
        self.log("right", (self(batch[0]).argmax(1) == batch[1]).sum(), reduce_fx="sum")
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def expected_after_a_step(module, dataset=None):
    """The weights after the step of the reference."""
    dataset = data(RECORDS) if dataset is None else dataset
    records = [(x[None], y[None]) for x, y in dataset]
    sums = clipped_sum(module, module.loss, records, C)
    for p, total in zip(module.parameters(), sums, strict=True):
        p.data -= total / len(dataset)
    return flat(module)


# --- the gradient, and when auto takes it ---------------------------------------------------------


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell])
def test_auto_takes_it_where_rows_cannot_be_told_apart(kind, caplog):
    callback, module = private(), Cells(kind)
    with caplog.at_level(logging.WARNING, "defend"):
        run = fit(module, callback)
    torch.testing.assert_close(flat(module), expected_after_a_step(Cells(kind)))
    assert callback.settings()["engine"] == "record"
    said = [r.getMessage() for r in caplog.records if r.name == "defend"]
    assert len(said) == 1
    assert f"Expected {kind.__name__}" in said[0]
    assert "a forward and backward for each" in said[0]
    # One value a step, whatever the records: the mean, or what `reduce_fx` says.
    before = Cells(kind)
    x, y = data(RECORDS).tensors
    assert run.callback_metrics["loss_step"].item() == pytest.approx(before.loss(x, y).item())
    assert run.callback_metrics["loss_epoch"].item() == pytest.approx(before.loss(x, y).item())
    right = (before(x).argmax(1) == y).sum().item()
    assert run.callback_metrics["right"].item() == right
    assert run.callback_metrics["accuracy"].item() == pytest.approx(right / RECORDS)


def test_it_gives_what_the_hooks_give_and_auto_takes_hooks_where_it_can():
    def after(engine):
        module = Alike()
        callback = private(engine=engine, max_grad_norm=0.3, noise_multiplier=1.0)
        fit(module, callback, max_steps=3)
        return callback.settings()["engine"], flat(module)

    (one, hooks), (two, record), (three, auto) = map(after, ("hooks", "record", "auto"))
    assert (one, two, three) == ("hooks", "record", "hooks")
    torch.testing.assert_close(record, hooks)
    assert torch.equal(auto, hooks)


class Coupled(Cells):
    """The mean over all labelled records of the batch."""

    def loss(self, x, y):
        kept = (y != 0).float()
        return (F.cross_entropy(self(x), y, reduction="none") * kept).sum() / (kept.sum() + 1e-6)


def test_auto_takes_no_coupled_loss_apart_and_record_does():
    with pytest.raises(PrivacyError, match=r"engine='record'.* each record's own mean") as caught:
        fit(Coupled(), private())
    assert "LSTMCell" in caught.value.__notes__[0]
    module = Coupled()
    fit(module, private(engine="record"))
    torch.testing.assert_close(flat(module), expected_after_a_step(Coupled()))


def test_the_self_test_off_looks_at_the_set_up_alone():
    module = Cells()
    module.cell = nn.LSTM(8, 6, dropout=0.5, num_layers=2, batch_first=True)
    module.forward = lambda x: module.head(module.cell(x[:, None])[0][:, -1])
    callback = private(selftest=False)
    fit(module, callback)
    assert callback.settings()["engine"] == "record"


def test_a_record_without_a_loss_adds_zero():
    class Skips(Cells):
        def training_step(self, batch, batch_idx):
            if batch[1] == 0:
                return None
            if batch[1] == 1:
                return torch.zeros(())
            return {"loss": self.loss(*batch), "label": 2}

        def loss(self, x, y):
            return super().loss(x, y) * (y == 2)

    module = Skips()
    fit(module, private(engine="record"))
    torch.testing.assert_close(flat(module), expected_after_a_step(Skips()))


class Inner(Cells):
    """Runs a backward in its step, whose gradients plain training sets to zero before its own."""

    def training_step(self, batch, batch_idx):
        self.loss(3 * batch[0], batch[1]).backward()
        return self.loss(*batch)


def test_a_backward_within_the_step_is_dropped_as_in_plain_training():
    module = Inner()
    fit(module, private())
    torch.testing.assert_close(flat(module), expected_after_a_step(Cells()))


class Squeezed(Cells):
    def loss(self, x, y):
        return F.cross_entropy(self(x).squeeze(), y)


class Detached(Cells):
    def loss(self, x, y):
        return super().loss(x, y).detach()


@pytest.mark.parametrize(
    ("make", "engine", "message"),
    [
        (Squeezed, "record", "works on one record, got RuntimeError.* keep the batch dimension"),
        (Squeezed, "auto", "works on one record"),
        (Detached, "record", "got no finite gradient of 3 records"),
    ],
)
def test_a_step_that_gives_nothing_for_one_record_is_refused(make, engine, message):
    with pytest.raises(PrivacyError, match=message):
        fit(make(), private(engine=engine))


class Correlated(Cells):
    """One record alone has no deviation: its loss is no number."""

    def loss(self, x, y):
        p, t = self(x)[:, 0], y.float()
        p, t = p - p.mean(), t - t.mean()
        return 1 - (p * t).sum() / (p.square().sum().sqrt() * t.square().sum().sqrt())


class LargeBatches(Cells):
    """Couples records where there are many."""

    def loss(self, x, y):
        loss = super().loss(x, y)
        return loss + self(x).mean(0).square().sum() if len(x) >= 8 else loss


class Elsewhere(Cells):
    """Trains on the first records, whatever it is given."""

    def on_after_batch_transfer(self, batch, idx):
        return data(4).tensors


class Ragged(Dataset):
    """Bags of different length, one a batch."""

    def __len__(self):
        return RECORDS

    def __getitem__(self, i):
        return torch.full((2 + i % 4, 8), i / RECORDS), i % 3


class OneBag(Cells):
    def training_step(self, batch, batch_idx):
        bag, y = batch
        return F.cross_entropy(self(bag[0]).mean(0, keepdim=True), y)


@pytest.mark.parametrize(
    ("make", "engine", "message"),
    [
        (Correlated, "auto", "no finite gradient|plain mean over rows"),
        (Correlated, "record", "no finite gradient"),
        (LargeBatches, "auto", "plain mean over rows of what each record alone gives"),
        (Elsewhere, "auto", "another gradient for another record"),
        (Elsewhere, "record", "another gradient for another record"),
    ],
)
def test_what_no_record_alone_can_give_is_refused(make, engine, message):
    with pytest.raises(PrivacyError, match=message):
        fit(make(), private(engine=engine))


def test_bags_of_different_length_one_a_batch():
    callback = private(noise_multiplier=1.0)
    run = trainer(callbacks=[callback], max_steps=3, max_epochs=None)
    run.fit(OneBag(), DataLoader(Ragged(), batch_size=1))
    assert callback.settings()["engine"] == "record"
    assert callback.steps == 3


class Teacher(Cells):
    """A momentum teacher, moved in the step; and numbers in a list for the end of the epoch."""

    def __init__(self):
        super().__init__()
        self.teacher = nn.Linear(8, 3).requires_grad_(False)
        self.register_buffer("calls", torch.zeros(()))
        self.losses = []

    def training_step(self, batch, batch_idx):
        self.teacher.weight.data.mul_(0.5).add_(1.0)
        self.calls += 1
        loss = self.loss(*batch)
        self.losses.append(loss.item())
        return loss


def test_a_teacher_and_a_counter_move_once_a_step_and_lists_keep_every_record():
    module, start = Teacher(), Teacher().teacher.weight
    fit(module, private(engine="record"))
    torch.testing.assert_close(module.teacher.weight, 0.5 * start + 1.0)
    assert module.calls == 1
    assert len(module.losses) == RECORDS


class Padding(Dataset):
    """Gives all records of a batch at once, padded to the largest."""

    def __len__(self):
        return RECORDS

    def __getitem__(self, i):
        return data(RECORDS)[i]

    def __getitems__(self, indices):
        largest = max(float(data(RECORDS)[i][0].max()) for i in indices)
        return [(x / largest, y) for x, y in map(data(RECORDS).__getitem__, indices)]


@pytest.mark.parametrize("engine", ["record", "hooks"])
def test_records_do_not_meet_in_the_data_set(engine):
    make = Cells if engine == "record" else Alike
    module = make()
    fit(module, private(engine=engine), Padding())
    torch.testing.assert_close(flat(module), expected_after_a_step(make()))


def test_a_step_that_talks_to_other_processes_is_refused(tmp_path):
    class Reduces(Cells):
        def loss(self, x, y):
            count = torch.ones(1)
            torch.distributed.all_reduce(count)
            return super().loss(x, y) / count[0]

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        fit(Cells(), private(engine="record"))
        with pytest.raises(PrivacyError, match="talks to no other process"):
            fit(Reduces(), private(engine="record"))
    finally:
        torch.distributed.destroy_process_group()


def test_generators_that_a_hook_makes_draw_secret_numbers_at_every_step(tmp_path):
    class Makes(Cells):
        def on_train_batch_start(self, batch, batch_idx):
            self.rng = np.random.default_rng(1)

        def training_step(self, batch, batch_idx):
            if not type(self.trainer).__name__.startswith("Trial"):
                with (tmp_path / "drawn").open("a") as file:
                    print(self.rng.random(), file=file)
            return self.loss(*batch)

    callback = private(engine="record", insecure_seed=None, noise_multiplier=1.0)
    fit(Makes(), callback, max_steps=7)
    drawn = (tmp_path / "drawn").read_text().split()
    assert len(set(drawn)) == len(drawn) == 7 * RECORDS


# --- each record alone ----------------------------------------------------------------------------


class Watched(Cells):
    """Notes what the hooks and the step are given; augments after a transfer."""

    def __init__(self, file):
        super().__init__()
        self.file = file  # what is kept in memory is put back between records

    def on_before_batch_transfer(self, batch, idx):
        self.note("before", batch)
        return batch

    def on_after_batch_transfer(self, batch, idx):
        self.note("after", batch)
        return (batch[0] + 0.1, batch[1])

    def note(self, hook, batch):
        if self.trainer.training and not type(self.trainer).__name__.startswith("Trial"):
            with self.file.open("a") as file:
                print(hook, len(batch[0]), torch.rand(()).item(), file=file)

    def training_step(self, batch, batch_idx):
        self.note("step", batch)
        torch.manual_seed(0)
        return self.loss(*batch)

    def validation_step(self, batch, batch_idx):
        assert len(batch[0]) == 6


@pytest.mark.parametrize("workers", [0, 1])
def test_transfer_and_step_see_one_record_at_a_time_and_numbers_of_its_own(tmp_path, workers):
    module = Watched(tmp_path / "seen")
    batches = DataLoader(data(RECORDS), batch_size=RECORDS, num_workers=workers)
    callback = private(insecure_seed=None, noise_multiplier=1.0)
    run = trainer(callbacks=[callback], max_steps=2, max_epochs=None)
    run.fit(module, batches, DataLoader(data(6), batch_size=6))
    seen = [line.split() for line in module.file.read_text().splitlines()]
    assert [(hook, rows) for hook, rows, _ in seen] == 2 * RECORDS * [
        ("before", "1"), ("after", "1"), ("step", "1"),
    ]  # fmt: skip
    assert len({number for *_, number in seen}) == len(seen)  # though each step sets a seed
    assert not {"_on_before_batch_transfer", "_apply_batch_transfer_handler"} & set(vars(module))


class Remembers(Cells):
    """Adds to each record what it kept of the one before."""

    def __init__(self, where):
        super().__init__()
        self.where, self.kept = where, {"x": torch.zeros(1, 8)}
        self.register_buffer("mean", torch.zeros(1, 8), persistent=False)

    def training_step(self, batch, batch_idx):
        x, y = batch
        if self.where == "buffer":
            x = x + self.mean
            self.mean.copy_(x.detach().mean(0, keepdim=True))
        elif self.where == "attribute":
            x = x + self.kept["x"]
            self.kept["x"] = x.detach().mean(0, keepdim=True)
        elif self.where == "step":
            x = x + self.kept["x"]
            self.kept["x"] = x.detach().mean(0, keepdim=True)
            self.kept["x"] = torch.zeros(1, 8) if batch_idx % 2 else self.kept["x"]
        return self.loss(x, y)


@pytest.mark.parametrize("where", ["buffer", "attribute"])
def test_what_is_kept_from_step_to_step_is_refused(where):
    with pytest.raises(PrivacyError, match=r"fills from the records|batch before|keeps something"):
        fit(Remembers(where), private(engine="record"))


def test_what_a_record_leaves_is_put_back_before_the_next():
    class Forgets(Remembers):
        """At the start of each step it forgets, between its records it does not."""

        def on_train_batch_start(self, batch, batch_idx):
            self.kept["x"] = torch.zeros(1, 8)

    module = Forgets("attribute")
    fit(module, private(engine="record", selftest=False))
    torch.testing.assert_close(flat(module), expected_after_a_step(Cells()))
    with (
        mock.patch.object(Isolation, "next_record"),
        pytest.raises(PrivacyError, match=r"the step ran on before|keeps something"),
    ):
        fit(Forgets("attribute"), private(engine="record"))


# --- wherever a step keeps something --------------------------------------------------------------

KEPT_BY_THIS_FILE = {"x": torch.zeros(1, 8)}
LARGE = 2**21  # numbers: more than what is put back


class Box:
    x = torch.zeros(1, 8)


class Slotted:
    __slots__ = ("x",)

    def __init__(self):
        self.x = torch.zeros(1, 8)


def in_a_cell():
    kept = torch.zeros(1, 8)

    def swap(x):
        nonlocal kept
        before, kept = kept, x
        return before

    return swap


def in_an_array():
    kept = np.zeros((1, 8), np.float32)

    def swap(x):
        before = torch.from_numpy(kept.copy())
        kept[:] = x.numpy()
        return before

    return swap


def in_a_large_tensor():
    kept = torch.zeros(LARGE)

    def swap(x):
        before = kept[:8].clone()[None]
        kept[:8] = x[0]
        return before

    return swap


def in_a_file(folder):
    file = folder / "kept.pt"

    def swap(x):
        before = torch.load(file) if file.exists() else torch.zeros(1, 8)
        torch.serialization.save(x, file)
        return before

    return swap


def on(owner, name="x"):
    def swap(x):
        before = getattr(owner, name)
        setattr(owner, name, x)
        return before

    return swap


def in_items(owner, key="x"):
    def swap(x):
        before, owner[key] = owner[key], x
        return before

    return swap


PLACES = {
    "a global's items": lambda _: in_items(KEPT_BY_THIS_FILE),
    "a class": lambda _: on(Box),
    "an object": lambda _: on(type("Own", (Box,), {"__module__": __name__})()),
    "slots": lambda _: on(Slotted()),
    "a list": lambda _: in_items([torch.zeros(1, 8)], 0),
    "a deque": lambda _: in_items(deque([torch.zeros(1, 8)]), 0),
    "a cell": lambda _: in_a_cell(),
    "an array": lambda _: in_an_array(),
    "a large tensor": lambda _: in_a_large_tensor(),
    "a file": in_a_file,
}


FOUND_ONLY = ("a large tensor", "a file")  # by the self-test; they are not put back


class Keeps(Cells):
    """Mixes what was kept of the record before into each one; forgets between steps."""

    def __init__(self, swap):
        super().__init__()
        self.swap = swap

    def on_train_batch_start(self, batch, batch_idx):
        self.swap(torch.zeros(1, 8))

    def training_step(self, batch, batch_idx):
        x, y = batch
        kept = self.swap(x[-1:].detach().clone())
        return self.loss(x + kept, y)


@pytest.mark.parametrize("place", PLACES)
def test_nothing_goes_from_one_record_to_another(place, tmp_path):
    def keeps():
        module = Keeps(PLACES[place](tmp_path))
        module.swap(torch.zeros(1, 8))
        return module

    # Trials do not run a hook that was not seen to change anything: it keeps from step to step.
    with pytest.raises(PrivacyError, match=r"in the batch before|the step ran on before"):
        fit(keeps(), private(engine="record"))
    module = keeps()
    fit(module, private(engine="record", selftest=False))
    alone = torch.allclose(flat(module), expected_after_a_step(Cells()))
    assert alone == (place not in FOUND_ONLY)


def test_a_fit_that_fails_before_it_has_a_module_says_why(tmp_path):
    run = trainer(callbacks=[private()], default_root_dir=tmp_path)
    with pytest.raises(TypeError, match="LightningModule"):
        run.fit(nn.Linear(8, 3), DataLoader(data(RECORDS), batch_size=RECORDS))


# --- together with all else -----------------------------------------------------------------------


class Alike(Cells):
    def __init__(self):
        super().__init__()
        self.cell = nn.Linear(8, 6)

    def forward(self, x):
        return self.head(self.cell(x).tanh())


class Doubled(Dataset):
    """Another view of a record at each call."""

    def __init__(self):
        self.inner, self.calls = data(RECORDS), 0

    def __len__(self):
        return RECORDS

    def __getitem__(self, i):
        x, y = self.inner[i]
        self.calls += 1
        return x * (1 + 0.1 * (self.calls % 2)), y


def shifted(model, x, y, *, generator, chunk_size):
    """An attack without a gradient, so that nothing is drawn in another order."""
    return x + 0.05 * (2 * (y[:, None] % 2) - 1)


INNER = PGD(Linf(0.1), inputs=InputSpace(high=2.0), steps=2, random_start=False)


@pytest.mark.parametrize(
    ("attack", "objective"),
    [
        (
            PGD(Linf(0.1), inputs=InputSpace(high=2.0), steps=2, random_start=False),
            AWP(Madry(), gamma=0.01),
        ),
        (shifted, TRADES(2.0)),
        (shifted, AWP(MART(2.0), gamma=0.01)),
    ],
)
def test_views_and_adversarial_objectives_are_those_of_the_hooks(attack, objective):
    def after(engine):
        module = Alike()
        callback = private(engine=engine, views=2, max_grad_norm=0.3)
        adversary = AdversarialTraining(attack, objective=objective)
        fit(module, callback, Doubled(), extra=[adversary], max_steps=2)
        return flat(module)

    start = flat(Alike())
    hooks, record = after("hooks"), after("record")
    assert not torch.allclose(hooks, start, atol=1e-3)
    torch.testing.assert_close(record, hooks, atol=1e-5, rtol=1e-4)


def test_in_a_loop_of_ones_own():
    module = Cells()
    batches = DataLoader(data(RECORDS), batch_size=RECORDS)
    run = make_private(
        module,
        torch.optim.SGD(module.parameters(), lr=1.0),
        batches,
        loss=lambda m, b: m.loss(*b),
        epochs=1,
        privacy=Privacy(
            delta=1e-3, noise_multiplier=0.0, max_grad_norm=C, insecure_seed=1, ledger=False
        ),
    )
    with run as loop:
        for batch in loop.loader:
            with pytest.raises(AttributeError, match="one batch a record"):
                batch.items()
            loss = loop.step(batch)
    assert loss.item() == pytest.approx(Cells().loss(*data(RECORDS).tensors).item())
    torch.testing.assert_close(flat(module), expected_after_a_step(Cells()))


def test_complex_weights_get_noise_in_both_parts():
    class Rotation(pl.LightningModule):
        def __init__(self, size):
            super().__init__()
            self.w = nn.Parameter(torch.ones(size, dtype=torch.cfloat))

        def training_step(self, batch, batch_idx):
            x, _ = batch
            return (torch.complex(x, 2 * x) * self.w).real.square().sum(1).mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1.0)

    small = TensorDataset(torch.rand(8, 3), torch.zeros(8))
    plain, module = Rotation(3), Rotation(3)
    gradient = torch.autograd.grad(plain.training_step(small.tensors, 0), plain.w)[0]
    fit(module, private(max_grad_norm=1e9), small)
    torch.testing.assert_close(module.w.detach(), plain.w.detach() - gradient)

    zeros = TensorDataset(torch.zeros(8, 4000), torch.zeros(8))
    module = Rotation(4000)
    fit(module, private(max_grad_norm=0.5, noise_multiplier=1000.0), zeros)
    parts = torch.view_as_real(module.w.detach() - 1)
    for deviation in (*parts.std(0), parts.flatten().std()):
        assert deviation.item() == pytest.approx(1000 * 0.5 / 8, rel=5 / math.sqrt(2 * 4000))


def test_a_resumed_run_goes_on(tmp_path):
    callback = DifferentialPrivacy(delta=1e-3, noise_multiplier=1.0, max_grad_norm=C)
    run = fit(Cells(), callback, max_steps=2, default_root_dir=tmp_path)
    run.save_checkpoint(tmp_path / "half.ckpt")
    again = DifferentialPrivacy(delta=1e-3, noise_multiplier=1.0, max_grad_norm=C)
    second = trainer(callbacks=[again], max_steps=4, max_epochs=None, default_root_dir=tmp_path)
    batches = DataLoader(data(RECORDS), batch_size=RECORDS)
    second.fit(Cells(), batches, ckpt_path=tmp_path / "half.ckpt")
    assert again.steps == 4
    assert again.epsilon > callback.epsilon
    assert ROOT_DIR not in str(tmp_path)
