"""`make_private(adversarial=…)`: attack, objective and one clip in a loop of your own."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from defend import PGD, AdversarialTraining, InputError, Linf, PrivacyError
from defend.attacks.attack import Attack, Perturber
from defend.attacks.free import Free
from defend.attacks.result import AttackResult
from defend.attacks.torchattacks.adapter import TorchAttack
from defend.privacy import FlatClipping
from defend.training import Adversarial
from defend.training.step import TrainingStep
from tests.callbacks.test_private_objectives import ATTACK, BATCH, OBJECTIVES, fit, name
from tests.callbacks.test_together import private as callback
from tests.helpers import Net, data, flat
from tests.loops import private_loop
from tests.training.loops import assert_closed, mean_loss, net, private, sgd, some_steps


def batches():
    return DataLoader(data(256), batch_size=BATCH, shuffle=True)


def settings(objective, **more):
    return Adversarial(ATTACK, objective=objective, **more)


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=name)
def test_ends_where_the_callbacks_end(objective, views):
    shared = {"noise_multiplier": 0.7, "insecure_seed": 7, "views": views, "chunk_size": 20}
    module = fit(
        [AdversarialTraining(ATTACK, objective=objective), callback(**shared)],
        batches=batches(),
        max_steps=4,
    )
    torch.manual_seed(0)
    model = net()
    adversarial = settings(objective)
    with private(model, batches=batches(), adversarial=adversarial, **shared) as loop:
        assert loop.selftest.passed
        some_steps(loop, 4)
    assert_closed_but_gradients(model)
    torch.testing.assert_close(flat(model), flat(module), rtol=0, atol=1e-5)


def assert_closed_but_gradients(model):
    assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())


def test_the_warm_up_counts_epochs():
    sizes = []

    def looking(model, batch):
        if model is real:
            sizes.append(float((batch[0] - seen[-1]).abs().max()))
        return mean_loss(model, batch)

    real, seen = net(), []
    adversarial = Adversarial(PGD(Linf(0.2), steps=1, step_size=0.2), warmup_epochs=0.5)
    with private(real, batches=batches(), loss=looking, adversarial=adversarial,
                 chunk_size=None, selftest=False) as loop:  # fmt: skip
        for batch in loop.loader:
            seen.append(batch[0])
            loop.step(batch)
    assert sizes[:4] == pytest.approx([0.05, 0.10, 0.15, 0.2], abs=1e-6)
    assert max(sizes[4:]) == pytest.approx(0.2, abs=1e-6)  # of 8 batches in an epoch


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (Free(Linf(0.1)), "got Free: its perturbation is carried on"),
        (TorchAttack("CW"), "got TorchAttack, in which records of a chunk move each other"),
    ],
)
def test_refuses_what_one_clip_does_not_bound(attack, message):
    model = net()
    with pytest.raises(PrivacyError, match=message):
        private(model, adversarial=Adversarial(attack))
    assert_closed(model)


class Momentum(Attack):
    """Begins from where it ended with the batch before."""

    class Carried(Perturber):
        def perturb(self, model, x, y, *, generator=None, chunk_size="auto", eps=None):
            self.last = x + 0.5 * getattr(self, "last", x).mean(0)
            return AttackResult(self.last)

    def begin(self):
        return self.Carried()

    def _perturb(self, model, x, y, **_):
        return AttackResult(x)


def test_an_attack_that_carries_something_on_is_refused_whoever_wrote_it():
    with pytest.raises(PrivacyError, match="got Momentum: its perturbation is carried on"):
        private(net(), adversarial=Adversarial(Momentum()))


def test_a_rule_that_would_tell_a_statistic_without_noise_is_refused_before_the_first_step():
    class Telling(FlatClipping):
        def statistic(self, norms, max_grad_norm):
            return norms.clamp(max=1.0)

    model = net()
    with pytest.raises(PrivacyError, match="released as it is"):
        private(model, clipping=Telling())
    assert_closed(model)


def test_a_batch_without_such_fields_is_told_so():
    with pytest.raises(InputError, match="input_key"):
        private(net(), adversarial=Adversarial(ATTACK, input_key="image"))


def test_a_loss_that_mixes_records_is_found():
    def mixing(model, batch):
        x, y = batch
        return F.cross_entropy(model(x - x.mean(0)), y)

    for objective in OBJECTIVES:
        with pytest.raises(PrivacyError, match="would not be private"):
            private(net(), loss=mixing, adversarial=settings(objective))


def test_after_an_error_the_weights_are_where_they_were():
    model, calls = Net(), []

    def failing(module, batch):
        if module is model:
            calls.append(1)
            if len(calls) == 3:
                raise KeyError("here")
        return mean_loss(module, batch)

    objective = OBJECTIVES[-1]
    loop = private_loop(
        model, sgd(model), batches(), loss=failing, epochs=1, delta=1e-3, max_grad_norm=0.5,
        noise_multiplier=0.7, chunk_size=None, adversarial=settings(objective),
    )  # fmt: skip
    drawn = iter(loop.loader)
    loop.step(next(drawn))
    loop.step(next(drawn))
    before = flat(model).clone()
    with pytest.raises(KeyError, match="here"):
        loop.step(next(drawn))
    assert torch.equal(flat(model), before)
    assert_closed(model)


@pytest.mark.parametrize(
    "wrong", [ATTACK, OBJECTIVES[1], "pgd"], ids=["attack", "objective", "str"]
)
def test_anything_but_settings_is_refused(wrong):
    with pytest.raises(InputError, match="`adversarial` to be Adversarial"):
        private(net(), adversarial=wrong)


def test_closing_puts_the_weights_back(monkeypatch):
    """An interrupt may come between the forward and the backward."""
    model = net()
    adversarial = settings(OBJECTIVES[-1])
    loop = private(model, batches=batches(), adversarial=adversarial, selftest=False)
    drawn = iter(loop.loader)
    loop.step(next(drawn))
    before = flat(model).clone()

    def interrupted(self, loss):
        raise KeyboardInterrupt

    monkeypatch.setattr(TrainingStep, "backward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        loop.step(next(drawn))
    assert torch.equal(flat(model), before)


def test_useless_gradients_are_counted():
    with private(net(), adversarial=Adversarial(ATTACK), selftest=False) as loop:
        assert loop.rates() == {}
        some_steps(loop, 1)
        assert loop.rates() == {"attack/zero_grad_rate": 0.0, "attack/nonfinite_grad_rate": 0.0}
    with private(net()) as loop:
        assert loop.rates() == {}
