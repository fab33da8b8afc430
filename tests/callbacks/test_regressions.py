"""Breaks and false alarms that reviews found, each with the program that showed it."""

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, EarlyStopping
from torch import nn
from torch.utils.data import DataLoader, random_split

from defend import Decay, DifferentialPrivacy, PrivacyError
from defend.privacy import epsilon
from tests.helpers import Net, data, flat, loader, trainer
from tests.loops import private_loop


def private(**settings):
    return DifferentialPrivacy(
        **{"delta": 1e-3, "max_grad_norm": 0.5, "noise_multiplier": 1.0, **settings}
    )


def fit(callback, module=None, batches=None, extra=(), ckpt=None, **settings):
    pl.seed_everything(0)
    module = module or Net()
    run = trainer(callbacks=[callback, *extra], **settings)
    run.fit(module, batches or loader(64, 8), ckpt_path=ckpt)
    return module, run


def test_a_schedule_that_answers_differently_each_time_is_charged_as_it_was_used():
    answers = iter([1.0, 0.5] * 1000)
    callback = private(noise_schedule=lambda step: next(answers))
    released = []

    class Sigma(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            released.append(callback.fit.step.noise_multiplier)

    fit(callback, extra=[Sigma()])
    charged = [sigma for sigma, _, steps in callback.history for _ in range(steps)]
    assert charged == released
    assert callback.epsilon == epsilon(callback.history, 1e-3)


def test_a_resume_with_another_schedule_still_meets_the_target(tmp_path):
    settings = {"noise_multiplier": None, "target_epsilon": 3.0, "accountant": "rdp"}

    class Save(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 3:
                trainer.save_checkpoint(tmp_path / "a.ckpt")

    fit(private(**settings, ledger=False), extra=[Save()], max_epochs=8)
    changed = private(**settings, noise_schedule=Decay(0.8, every=4), ledger=False)
    fit(changed, ckpt=tmp_path / "a.ckpt", max_epochs=8)
    assert changed.steps == 64
    assert 2.9 < changed.epsilon <= 3.0


def test_the_norm_that_is_asked_for_at_a_resume_is_the_one_that_is_used(tmp_path):
    _, run = fit(private(max_grad_norm=1.0))
    run.save_checkpoint(tmp_path / "a.ckpt")
    norms = []

    class Norm(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            norms.append(callback.fit.step.max_grad_norm)

    callback = private(max_grad_norm=0.1)
    fit(callback, extra=[Norm()], ckpt=tmp_path / "a.ckpt", max_epochs=2)
    assert set(norms) == {0.1}
    assert callback.settings()["max_grad_norm"] == 0.1


def test_a_split_drawn_from_the_seed_is_the_same_in_every_run():
    """The global RNGs become secret only after the data was put together."""
    splits = []

    class Splitting(pl.LightningDataModule):
        def setup(self, stage):
            self.train, rest = random_split(data(64), [48, 16])
            splits.append(list(rest.indices))

        def train_dataloader(self):
            return DataLoader(self.train, batch_size=8)

    for _ in range(2):
        pl.seed_everything(42)
        trainer(callbacks=[private()]).fit(Net(), datamodule=Splitting())
    assert splits[0] == splits[1]


def test_another_account_for_the_same_model_and_data_is_refused(tmp_path):
    """Where the first has no ledger; `tests/training/test_one_account.py` has those with one."""
    first = private(ledger=False)
    module, run = fit(first)
    with pytest.raises(PrivacyError, match=r"the account of this model to go on"):
        fit(private(), module)
    fit(first, module)  # its own account goes on
    run.save_checkpoint(tmp_path / "a.ckpt")
    heir = private(ledger=False)
    heir.load_state_dict(first.state_dict())
    fit(heir, module)
    assert heir.steps == 24
    fit(private(), module, DataLoader(data(64, seed=1), batch_size=8))  # other data: its own


class Plateau(Net):
    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        watch = {"scheduler": scheduler, "monitor": "train_loss"}
        return {"optimizer": optimizer, "lr_scheduler": watch}


@pytest.mark.parametrize(
    ("module", "extra", "who"),
    [
        (Plateau, (), "ReduceLROnPlateau"),
        (Net, (EarlyStopping(monitor="train_loss_epoch", check_on_train_epoch_end=True),), "Early"),
    ],
)
def test_the_raw_training_loss_may_not_steer(module, extra, who):
    instance = module()
    before = flat(instance)
    with pytest.raises(PrivacyError, match=f"{who}.* that monitors `train_loss"):
        fit(private(), instance, extra=extra)
    assert torch.equal(flat(instance), before)


class Projected(torch.optim.SGD):
    """Projects the weights inside the step, as our own error recommends."""

    def step(self, closure=None):
        loss = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                p.data.clamp_(-1, 1)
        return loss


def test_an_optimizer_whose_step_calls_its_base():
    torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)  # torch then hooks the base's step too

    class Module(Net):
        def configure_optimizers(self):
            return Projected(self.parameters(), lr=0.1)

    callback = private()
    fit(callback, Module())
    assert callback.steps == 8


def test_a_step_on_a_swallowed_error_inside_an_optimizer_is_refused():
    class Failing(torch.optim.SGD):
        def step(self, closure=None):
            raise RuntimeError("out of luck")

    model = nn.Linear(8, 3)
    optimizer = Failing(model.parameters(), lr=0.1)
    loop = private_loop(
        model, optimizer, loader(64, 8), loss=lambda m, b: F.cross_entropy(m(b[0]), b[1]),
        epochs=1, delta=1e-3, max_grad_norm=1.0, noise_multiplier=1.0, ledger=False,
    )  # fmt: skip
    *_, fit = loop._open
    batch = next(iter(loop.loader))

    def compute(chunk, rows):
        (F.cross_entropy(model(chunk[0]), chunk[1]) * rows).backward()

    for chunk in fit.chunks(batch):
        with chunk:
            compute(chunk.batch, chunk.rows)
    fit.release()
    with pytest.raises(RuntimeError, match="out of luck"):
        optimizer.step()
    with pytest.raises(PrivacyError, match="no backward between the release"):
        compute(batch, len(batch[0]))
    with pytest.raises(PrivacyError, match="one noised gradient for each optimizer step"):
        torch.optim.SGD.step(optimizer)
    loop.close()


class Keeping(Net):
    """Keeps outputs with their graphs, as Lightning's own documents show."""

    def __init__(self):
        super().__init__()
        self.outputs = []

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.outputs.append(loss)
        return loss

    def on_train_epoch_end(self):
        self.outputs.clear()


def test_outputs_that_are_kept_do_not_stop_a_later_look():
    callback = private()
    fit(callback, Keeping(), max_epochs=3)
    assert callback.steps == 24


class ChannelsLast(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 6))

    def forward(self, x):
        return self.net(x.view(-1, 2, 2, 2).repeat(1, 1, 3, 3)[:, [0, 1, 0]]).flatten(1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x.contiguous()), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_channels_last_gives_what_the_usual_layout_gives():
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        pl.seed_everything(0)
        module = ChannelsLast().to(memory_format=layout)
        fit(private(noise_multiplier=0.0, insecure_seed=1), module)
        results.append(flat(module))
    torch.testing.assert_close(*results, rtol=0, atol=1e-6)
