"""The alarm for catastrophic overfitting under a Trainer."""

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from defend import PGD, AdversarialTraining, DifferentialPrivacy, InputError, Linf, PrivacyError
from defend.attacks.free import Free
from defend.attacks.presets import fgsm_rs, n_fgsm
from defend.evaluation.overfitting import OverfittingAlarm
from defend.objectives import TRADES
from tests.callbacks.by_hand import Rich
from tests.evaluation import test_overfitting_seen as overfitting
from tests.helpers import Net, flat, loader, trainer

EPS = 0.1
FGSM = PGD(Linf(EPS), steps=1, step_size=EPS, random_start=False)
OFTEN = OverfittingAlarm(every_n_steps=1)
SWITCH = OverfittingAlarm(every_n_steps=1, switch=True)


class Overfitting(pl.LightningModule):
    """Learns, from step `when` on, to be right at x and at the end of FGSM's step, and only there.

    Class 0 lies at 0.2, class 1 at 0.8. Before, the model is right within EPS around both.
    """

    def __init__(self, when=6):
        super().__init__()
        self.when = when
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.register_buffer("steps", torch.zeros(()))
        self.own = []

    def forward(self, x):
        side = torch.where(x < 0.5, -1.0, 1.0)
        inward = -side * (x - (0.5 + 0.3 * side))  # towards the other class
        if self.steps < self.when:
            right = 1 - inward  # sure of itself, a little less near the other class
        else:
            seen = (inward.abs() < 0.01) | (inward < -0.09)
            right = torch.where(seen, 4 + inward, -4 + inward)
        logit = self.scale * side * right
        return torch.cat([-logit, logit], 1)

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.own.append(float(loss.detach()))
        self.steps += 1
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-4)


def two_classes():
    x = torch.cat([torch.full((256, 1), 0.2), torch.full((256, 1), 0.8)])
    y = torch.arange(2).repeat_interleave(256)
    order = torch.randperm(512, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x[order], y[order]), batch_size=64)


class Kept(Logger):
    """A logger that keeps everything."""

    name, version = "kept", 0

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, *args, **kwargs):
        pass

    def of(self, name):
        return {step: row[name] for step, row in self.rows if name in row}


class Attacks(Callback):
    """The attack of each step, as it was when the step began."""

    def __init__(self, callback):
        self.callback, self.seen = callback, []

    def on_before_backward(self, trainer, pl_module, loss):
        self.seen.append(self.callback.attack)


def overfit(alarm, attack=FGSM, *, when=6, ckpt=None, module=None, **settings):
    pl.seed_everything(0)
    callback = AdversarialTraining(attack, alarm=alarm)
    attacks, kept = Attacks(callback), Kept()
    run = trainer(callbacks=[callback, attacks], logger=kept, **{"max_epochs": 2, **settings})
    module = module or Overfitting(when)
    run.fit(module, two_classes(), ckpt_path=ckpt)
    return callback, attacks.seen, kept, run


def test_it_goes_off_and_says_so_once_where_the_training_loss_falls():
    with pytest.warns(UserWarning, match="Catastrophic overfitting") as warned:
        callback, attacks, kept, run = overfit(OFTEN)
    assert sum("Catastrophic" in str(w.message) for w in warned) == 1
    accuracy, alarm = kept.of("attack/pgd_accuracy"), kept.of("attack/overfitting")
    assert [accuracy[step] for step in range(6)] == [1.0] * 6
    assert max(accuracy[step] for step in range(6, 16)) < 0.25
    # 128 records are needed: the look at step 6 has half of them.
    assert [alarm[step] for step in range(16)] == [0.0] * 7 + [1.0] * 9
    assert run.callback_metrics["attack/overfitting"] == 1
    assert run.callback_metrics["attack/pgd_accuracy"] == pytest.approx(accuracy[15])
    own = run.lightning_module.own
    assert max(own[6:]) < min(own[:6])  # what the training itself shows
    assert attacks == [FGSM] * 16
    assert callback.attack == FGSM


def test_it_stays_silent_where_nothing_collapses():
    _, _, kept, _ = overfit(OFTEN, when=1000)
    assert set(kept.of("attack/overfitting").values()) == {0.0}
    assert set(kept.of("attack/pgd_accuracy").values()) == {1.0}


def test_on_request_training_goes_on_with_pgd():
    with pytest.warns(UserWarning, match="training goes on with PGD"):
        callback, attacks, kept, _ = overfit(SWITCH)
    assert attacks[:7] == [FGSM] * 7
    assert all(attack == callback.attack for attack in attacks[7:])
    assert (callback.attack.steps, callback.attack.ball) == (10, Linf(EPS))
    assert max(kept.of("attack/overfitting")) == 7  # no more looks
    assert callback.settings()["attack_steps"] == 1  # what was asked for


def test_a_resumed_run_has_switched_already(tmp_path):
    _, _, _, run = overfit(SWITCH)
    run.save_checkpoint(tmp_path / "a.ckpt")
    callback, attacks, kept, _ = overfit(SWITCH, ckpt=tmp_path / "a.ckpt", max_epochs=3)
    assert [attack.steps for attack in attacks] == [10] * 8
    assert callback.state_dict()["switched"]
    assert not kept.of("attack/overfitting")
    # Unless this is not what the resumed run asks for.
    callback, attacks, _, _ = overfit(OFTEN, ckpt=tmp_path / "a.ckpt", max_epochs=3)
    assert attacks == [FGSM] * 8


def test_a_resumed_run_remembers_how_robust_it_was(tmp_path):
    """Stopped just before the collapse: the best so far is in the checkpoint."""
    _, _, _, run = overfit(OFTEN, when=8, max_epochs=1)
    run.save_checkpoint(tmp_path / "a.ckpt")
    for ckpt, expected in ((tmp_path / "a.ckpt", 1.0), (None, 0.0)):
        module = Overfitting(8)
        module.steps += 8
        epochs = 1 if ckpt is None else 2
        _, _, kept, _ = overfit(OFTEN, ckpt=ckpt, module=module, max_epochs=epochs)
        assert max(kept.of("attack/overfitting").values()) == expected


def test_a_new_fit_begins_with_the_attack_that_was_asked_for():
    """The next fold of a cross-validation, with the same callback and another model."""
    callback = AdversarialTraining(FGSM, alarm=SWITCH)
    folds = []
    for _ in range(2):
        pl.seed_everything(0)
        attacks, kept, module = Attacks(callback), Kept(), Overfitting()
        run = trainer(callbacks=[callback, attacks], logger=kept, max_epochs=2)
        with pytest.warns(UserWarning, match="Catastrophic overfitting"):
            run.fit(module, two_classes())
        folds.append((attacks.seen, kept.of("attack/overfitting"), flat(module)))
    assert folds[0][:2] == folds[1][:2]
    assert torch.equal(folds[0][2], folds[1][2])
    assert folds[1][0][0] == FGSM
    # The same fit taken up again by its trainer goes on as it was.
    attacks.seen.clear()
    run.fit_loop.max_epochs = 3
    run.fit(module, two_classes())
    assert attacks.seen == [callback.attack] * 8
    assert callback.attack != FGSM


def test_the_seed_is_that_of_each_fit():
    callback, starts = AdversarialTraining(fgsm_rs(EPS), alarm=None), []
    for seed in (1, 2, 1):
        pl.seed_everything(seed)
        torch.manual_seed(0)
        module = Net()
        pl.seed_everything(seed)
        trainer(callbacks=[callback]).fit(module, loader(32, 16))
        starts.append(flat(module))
    assert torch.equal(starts[0], starts[2])
    assert not torch.equal(starts[0], starts[1])


def test_a_state_sets_the_switch_both_ways():
    callback = AdversarialTraining(FGSM, alarm=SWITCH)
    before = callback.state_dict()
    for carry in (callback.load_state_dict, callback.receive_state):
        carry({**before, "switched": True})
        assert callback.attack.steps == 10
        carry(before)
        assert callback.attack == FGSM


def test_the_state_of_a_checkpoint_that_is_validated_is_not_taken_up(tmp_path):
    _, _, _, run = overfit(SWITCH)
    run.save_checkpoint(tmp_path / "a.ckpt")

    class Validating(Overfitting):
        def validation_step(self, batch, batch_idx):
            pass

    callback = AdversarialTraining(FGSM, alarm=SWITCH)
    before = callback.state_dict()
    run = trainer(callbacks=[callback])
    run.validate(Validating(), two_classes(), ckpt_path=tmp_path / "a.ckpt", verbose=False)
    assert callback.state_dict() == before
    callback.load_state_dict({**before, "switched": True})  # by hand, at any other time
    assert callback.state_dict()["switched"]


def test_looks_draw_other_numbers_than_the_attack():
    seeds = []

    def noting(model, x, y, *, generator=None, chunk_size=None):
        seeds.append(generator.initial_seed())
        return x

    alarm = OverfittingAlarm(PGD(Linf(EPS), steps=1), every_n_steps=1)
    trainer(callbacks=[AdversarialTraining(noting, alarm=alarm)]).fit(Net(), loader(64, 16))
    assert len(seeds) == len(set(seeds)) == 8


class Bits(pl.LightningModule):
    """The model and optimizer of the task that overfits."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(27, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 8)
        )

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 5e-3)


class StopAtAlarm(Callback):
    def on_train_batch_end(self, trainer, pl_module, *args):
        trainer.should_stop = trainer.callback_metrics["attack/overfitting"] > 0


def test_in_a_training_that_truly_overfits():
    pl.seed_everything(3)
    alarm, kept = OverfittingAlarm(every_n_steps=25), Kept()
    callback = AdversarialTraining(overfitting.FGSM, alarm=alarm)
    records = TensorDataset(*overfitting.frail_and_robust())
    run = trainer(callbacks=[callback, StopAtAlarm()], logger=kept, max_steps=1500, max_epochs=-1)
    run.fit(Bits(), DataLoader(records, batch_size=128, shuffle=True))
    accuracy, loss = kept.of("attack/pgd_accuracy"), kept.of("loss")
    assert run.global_step < 1500
    best = max(accuracy, key=accuracy.get)
    assert accuracy[best] > 0.65
    assert list(accuracy.values())[-1] < 0.5 * accuracy[best]
    assert loss[max(loss)] < loss[min(loss)]


def test_looks_leave_no_trace_in_training():
    weights = []
    for alarm in (None, OFTEN):
        module = Rich()
        pl.seed_everything(3)
        callback = AdversarialTraining(fgsm_rs(EPS), alarm=alarm)
        trainer(callbacks=[callback]).fit(module, loader(64, 16))
        weights.append(flat(module))
        assert module.net[1].num_batches_tracked == 4
    assert torch.equal(*weights)


@pytest.mark.parametrize(
    ("attack", "settings", "looks"),
    [
        (fgsm_rs(EPS), {}, True),
        (n_fgsm(EPS), {}, True),
        (fgsm_rs(EPS), {"objective": TRADES()}, True),
        (fgsm_rs(EPS), {"alarm": None}, False),
        (PGD(Linf(EPS), steps=2), {}, False),
        (PGD(Linf(EPS), steps=2), {"alarm": OFTEN}, True),
        (Free(Linf(EPS), replays=2), {}, False),
        (Free(Linf(EPS), replays=2), {"alarm": OFTEN}, True),
        (PGD(Linf(EPS), steps=1, loss=lambda z, y: F.cross_entropy(z, y, reduction="none")), {}, 0),
    ],
)
def test_which_trainings_are_watched(attack, settings, looks):
    run = trainer(callbacks=[AdversarialTraining(attack, **settings)])
    run.fit(Net(), loader(64, 16))
    assert ("attack/pgd_accuracy" in run.callback_metrics) == looks


def test_an_attack_of_ones_own_is_watched_by_an_attack_of_ones_own():
    def noise(model, x, y, *, generator=None, chunk_size=None):
        return (x + EPS * torch.rand(x.shape, generator=generator)).clamp(0, 1)

    alarm = OverfittingAlarm(PGD(Linf(EPS), steps=3), every_n_steps=1)
    run = trainer(callbacks=[AdversarialTraining(noise, alarm=alarm)])
    run.fit(Net(), loader(64, 16))
    assert "attack/pgd_accuracy" in run.callback_metrics
    with pytest.raises(InputError, match=r"OverfittingAlarm\(attack=PGD"):
        AdversarialTraining(noise, alarm=OFTEN)


@pytest.mark.parametrize(
    ("attack", "alarm", "message"),
    [
        (FGSM, "always", "`alarm` to be 'auto', None or an OverfittingAlarm, got 'always'"),
        (FGSM, True, "`alarm` to be 'auto'"),
        (Free(Linf(EPS)), SWITCH, "switch=False with Free"),
    ],
)
def test_refuses_other_alarms(attack, alarm, message):
    with pytest.raises(InputError, match=message):
        AdversarialTraining(attack, alarm=alarm)


def test_not_beside_differential_privacy():
    private = DifferentialPrivacy(delta=1e-3, max_grad_norm=0.5, noise_multiplier=1.0)
    run = trainer(callbacks=[AdversarialTraining(FGSM), private])
    run.fit(Net(), loader(64, 16))  # "auto" looks away
    assert "attack/pgd_accuracy" not in run.callback_metrics
    private = DifferentialPrivacy(delta=1e-3, max_grad_norm=0.5, noise_multiplier=1.0)
    with pytest.raises(PrivacyError, match="no alarm beside DifferentialPrivacy"):
        trainer(callbacks=[private, AdversarialTraining(FGSM, alarm=OFTEN)]).fit(Net(), loader())
