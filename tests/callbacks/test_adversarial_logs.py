"""What AdversarialTraining logs and leaves as evidence."""

import dataclasses
import pickle

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from defend import L2, PGD, AdversarialTraining, DifferentialPrivacy, InputSpace, Linf
from defend.attacks.free import Free
from defend.attacks.presets import fgsm_rs
from defend.attacks.torchattacks.adapter import TorchAttack
from defend.callbacks._base import brief, describe_attack
from defend.objectives import AWP, MART, TRADES, Madry
from tests.callbacks.by_hand import ATTACK, EPS
from tests.helpers import Net, loader, trainer

RATES = {"attack/zero_grad_rate", "attack/nonfinite_grad_rate"}


class Broken(torch.autograd.Function):
    """x as it is, with a gradient that is not finite."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * float("nan")


class Masked(Net):
    """For attacks, no gradient for the first records of a batch, and a broken one for the last."""

    def __init__(self, first=0.25):
        super().__init__()
        self.first = first

    def forward(self, x):
        if not self.training:
            n = int(self.first * len(x))
            x = torch.cat([x[:n].detach(), x[n:-1], Broken.apply(x[-1:])])
        return super().forward(x)


def metrics(callback, module=None, *others, **settings):
    pl.seed_everything(0)
    run = trainer(callbacks=[callback, *others], **settings)
    run.fit(module or Net(), loader(64, 16))
    return {k: float(v) for k, v in run.callback_metrics.items()}


def test_rates_of_useless_gradients():
    found = metrics(AdversarialTraining(ATTACK), Masked())
    assert found["attack/zero_grad_rate"] == 0.25
    assert found["attack/nonfinite_grad_rate"] == 1 / 16
    found = metrics(AdversarialTraining(ATTACK))
    assert {name: found[name] for name in RATES} == dict.fromkeys(RATES, 0.0)


class EachEpoch(Callback):
    def __init__(self):
        self.rates = []

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch:
            pl_module.first = 0.5
            self.rates.append(float(trainer.callback_metrics["attack/zero_grad_rate"]))


def test_rates_are_of_one_epoch():
    epochs = EachEpoch()
    found = metrics(AdversarialTraining(ATTACK), Masked(0.25), epochs, max_epochs=2)
    assert epochs.rates == [0.25]
    assert found["attack/zero_grad_rate"] == 0.5


@pytest.mark.parametrize(
    ("attack", "counted"),
    [
        (ATTACK, True),
        (Free(Linf(EPS), replays=2), True),
        (TorchAttack("FGSM", {"eps": EPS}), False),
        (lambda model, x, y, **_: x, False),
    ],
    ids=["pgd", "free", "torchattacks", "own"],
)
def test_which_figures_there_are(attack, counted):
    found = metrics(AdversarialTraining(attack))
    assert (set(found) >= RATES) == counted
    assert 0 < found["attack/seconds_share"] < 1
    assert "attack/eps_share" not in found


def test_the_share_of_seconds_and_of_eps():
    slow = metrics(AdversarialTraining(dataclasses.replace(ATTACK, steps=200)))
    assert slow["attack/seconds_share"] > 0.5
    warm = metrics(AdversarialTraining(ATTACK, warmup_epochs=8), max_epochs=2)
    assert warm["attack/eps_share"] == 0.25


class SaveAt(Callback):
    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def test_the_share_of_seconds_of_an_epoch_that_is_taken_up_in_its_middle(tmp_path):
    saving = SaveAt(2, tmp_path / "a.ckpt")
    metrics(AdversarialTraining(ATTACK), None, saving)
    run = trainer(callbacks=[AdversarialTraining(ATTACK)])
    run.fit(Net(), loader(64, 16), ckpt_path=tmp_path / "a.ckpt")
    assert 0 < float(run.callback_metrics["attack/seconds_share"]) < 1


@pytest.mark.parametrize("release", ["tag", "withhold"])
def test_beside_privacy_the_rates_are_unnoised_metrics(release):
    private = DifferentialPrivacy(
        delta=1e-3, max_grad_norm=0.5, noise_multiplier=1.0, release=release
    )
    found = metrics(AdversarialTraining(ATTACK, warmup_epochs=1), None, private)
    assert (set(found) >= RATES) == (release == "tag")
    unnoised = private.results()["unnoised_metrics"]
    if release == "tag":
        assert set(unnoised) >= RATES
    else:
        assert unnoised == "withheld"
        assert not any(name.startswith("attack/") for name in found)


# --- evidence -------------------------------------------------------------------------------------


SOME = TorchAttack("PGD", {"eps": 8 / 255, "alpha": 2 / 255, "steps": 10})


@pytest.mark.parametrize(
    ("attack", "expected"),
    [
        (
            PGD(Linf(0.5), steps=7, restarts=3),
            {
                "attack": "PGD",
                "ball": "linf",
                "eps": 0.5,
                "attack_steps": 7,
                "attack_step_size": 2.5 * 0.5 / 7,
                "attack_loss": "ce",
                "attack_restarts": 3,
                "inputs": "InputSpace()",
                "attack_settings": "PGD(Linf(0.5), steps=7, restarts=3)",
            },
        ),
        (
            Free(L2(0.5), replays=4, inputs=InputSpace(low=-1.0)),
            {
                "attack": "Free",
                "ball": "l2",
                "eps": 0.5,
                "replays": 4,
                "inputs": "InputSpace(low=-1.0)",
                "attack_settings": "Free(L2(0.5), replays=4, inputs=InputSpace(low=-1.0))",
            },
        ),
        (
            TorchAttack("FGSM", {"eps": 0.5}),
            {
                "attack": "TorchAttack(FGSM)",
                "eps": 0.5,
                "inputs": "InputSpace()",
                "attack_settings": "TorchAttack('FGSM', settings={'eps': 0.5})",
            },
        ),
        (test_rates_are_of_one_epoch, {"attack": "test_rates_are_of_one_epoch"}),
    ],
    ids=["pgd", "free", "torchattacks", "own"],
)
def test_what_is_said_of_an_attack(attack, expected):
    assert describe_attack(attack) == expected


def ce_of_the_second(logits, y):
    return logits[:, 1]


@pytest.mark.parametrize(
    "callback",
    [
        AdversarialTraining(ATTACK, objective=AWP(TRADES(), 0.005), warmup_epochs=5),
        AdversarialTraining(PGD(Linf(EPS), loss=ce_of_the_second), clean_fraction=0.5),
        AdversarialTraining(fgsm_rs(8 / 255, inputs=InputSpace(mean=(0.49, 0.48, 0.45),
                                                               std=(0.25, 0.24, 0.26)))),
        AdversarialTraining(Free(Linf(8 / 255))),
        AdversarialTraining(SOME),
    ],
)  # fmt: skip
def test_values_are_short_enough_for_mlflow(callback):
    facts = callback.settings()
    assert facts["adversarial_training"] is True
    assert all(len(str(value)) < 250 for value in facts.values())
    assert not any("0x" in str(value) for value in facts.values())  # no addresses


def test_objective_and_warm_up_are_told():
    facts = AdversarialTraining(ATTACK, objective=AWP(TRADES(5.0)), warmup_epochs=2.0).settings()
    assert facts["objective"] == "AWP(objective=TRADES(beta=5.0))"
    assert facts["attack_loss"] == "kl"  # of the attack that is run
    assert facts["warmup_epochs"] == 2.0
    assert "clean_fraction" not in facts
    assert AdversarialTraining(ATTACK).settings()["objective"] == "Madry()"


def test_brief():
    assert brief(ATTACK) == "PGD(Linf(0.1), steps=2)"
    assert brief(PGD(Linf(1), loss=ce_of_the_second)) == "PGD(Linf(1), loss=ce_of_the_second)"
    assert brief(AWP(MART(), 0.1)) == "AWP(objective=MART(), gamma=0.1)"
    assert brief(0.5) == "0.5"


class Pickling(Callback):
    def on_train_batch_end(self, trainer, pl_module, *args):
        ours = next(c for c in trainer.callbacks if isinstance(c, AdversarialTraining))
        self.copy = pickle.loads(pickle.dumps(ours))


@pytest.mark.parametrize("attack", [ATTACK, Free(Linf(EPS), replays=2)], ids=["pgd", "free"])
def test_a_copy_in_the_middle_of_a_fit_holds_nothing_of_it(attack):
    pickling = Pickling()
    metrics(AdversarialTraining(attack, objective=Madry()), None, pickling)
    assert pickling.copy._trainer is pickling.copy._stopwatch is None
    assert pickling.copy.attack == attack
