"""TRADES, MART and AWP under a Trainer: each is the loop that one would write by hand."""

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback

from defend import AdversarialTraining, InputError
from defend.attacks.free import Free
from defend.objectives import AWP, MART, TRADES, Madry
from tests.callbacks.by_hand import ATTACK, Rich, batches, fit, train
from tests.helpers import Net, flat, loader, trainer
from tests.training.adversarial_cases import GAMMA, OBJECTIVES, state_of

PAIRED = [TRADES(4.0), MART(3.0), AWP(Madry(), GAMMA), AWP(TRADES(4.0), GAMMA)]


def name(objective):
    return objective.name


class States(Callback):
    """Weights and buffers after each batch."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(state_of(pl_module))


@pytest.mark.parametrize(("accumulate", "output"), [(1, "loss"), (2, "dict")])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=name)
def test_equals_the_loop_by_hand(objective, accumulate, output):
    """In float64, step by step, with batch normalization, dropout and a loss in a dict."""
    states = States()
    fit(
        objective,
        Rich(output),
        callbacks=[states],
        precision="64-true",
        accumulate_grad_batches=accumulate,
        max_epochs=2,
    )
    model = Rich().double()
    expected = train(model, objective, epochs=2, accumulate=accumulate, dtype=torch.float64)
    assert len(states.seen) == 8
    torch.testing.assert_close(states.seen, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("objective", "wrong"),
    [
        (TRADES(4.0), {"swapped": True}),
        (MART(3.0), {"swapped": True}),
        (AWP(Madry(), GAMMA), {"gamma": 1.1 * GAMMA}),
    ],
)
def test_and_not_a_loop_that_is_slightly_wrong(objective, wrong):
    """Forwards in the other order, weights moved a little further."""
    found = state_of(fit(objective, precision="64-true"))
    states = train(Rich().double(), objective, dtype=torch.float64, **wrong)
    assert (found - states[-1]).abs().max() > 1e-5


@pytest.mark.parametrize("objective", PAIRED, ids=name)
def test_in_mixed_precision(objective):
    found = state_of(fit(objective, precision="bf16-mixed"))
    torch.testing.assert_close(found, train(Rich(), objective, half=True)[-1], rtol=0, atol=1e-6)
    assert not torch.allclose(found, train(Rich(), objective)[-1], rtol=0, atol=1e-5)


class Weights(Callback):
    """What the weights are before a step, in it, and where others look at them."""

    def __init__(self):
        self.before, self.inside, self.after = [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before.append(flat(pl_module).clone())

    def on_before_backward(self, trainer, pl_module, loss):
        self.inside.append(flat(pl_module).clone())

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.after.append(flat(pl_module).clone())


class Looking(Rich):
    def on_after_backward(self):
        self.seen = flat(self).clone()


@pytest.mark.parametrize("objective", [AWP(Madry(), GAMMA), AWP(MART(), GAMMA)], ids=name)
def test_awp_puts_weights_back_bit_for_bit_before_the_step(objective):
    weights, module = Weights(), Looking()
    fit(objective, module, callbacks=[weights])
    assert len(weights.before) == len(weights.after) == 4
    for before, inside, after in zip(weights.before, weights.inside, weights.after, strict=True):
        assert torch.equal(before, after)
        assert not torch.equal(before, inside)
    assert torch.equal(module.seen, weights.after[-1])


class StopError(Exception):
    pass


class Unlucky(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise StopError


class Failing(Rich):
    """Fails in its second step, at one of the places that a step goes through."""

    def __init__(self, place):
        super().__init__()
        self.place, self.forwards = place, 0

    def fail_at(self, place):
        if place == self.place and self.trainer.global_step == 1:
            raise StopError

    def forward(self, x):
        if self.training:
            self.forwards += 1
            # 1: AWP's on the clean batch, 2: on the other, 3: the step's own, 4: the penalty's
            self.fail_at(f"forward {self.forwards}")
        return super().forward(x)

    def on_train_batch_start(self, batch, batch_idx):
        super().on_train_batch_start(batch, batch_idx)
        self.forwards, self.kept = 0, flat(self).clone()

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.fail_at("training_step")
        if self.place == "backward" and self.trainer.global_step == 1:
            return Unlucky.apply(loss)
        return loss

    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        self.fail_at("zero_grad")
        super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    def on_before_backward(self, loss):
        self.fail_at("on_before_backward")

    def on_after_backward(self):
        self.fail_at("on_after_backward")


class Saving(Callback):
    """What a callback before ours would save when a fit fails."""

    def on_exception(self, trainer, pl_module, exception):
        self.weights = flat(pl_module).clone()


PLACES = ["forward 1", "forward 2", "forward 3", "forward 4", "training_step", "zero_grad"]
PLACES += ["on_before_backward", "backward", "on_after_backward"]


@pytest.mark.parametrize("place", PLACES)
def test_awp_puts_weights_back_after_an_exception(place):
    module, saving = Failing(place), Saving()
    with pytest.raises(StopError):
        fit(AWP(MART(), GAMMA), module, first=[saving])
    if place != "zero_grad":  # between the step and the backward nobody but Lightning acts
        assert torch.equal(saving.weights, module.kept)
    assert len(module._forward_hooks) == 0
    assert torch.equal(flat(module), module.kept)
    module.place = None  # and a new fit works
    fit(AWP(MART(), GAMMA), module)


def test_a_step_that_is_skipped_leaves_weights_where_they_were():
    class Skipping(Rich):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx == 1 else loss

    states = States()
    fit(AWP(Madry(), GAMMA), Skipping(layers=Net().net), callbacks=[states])
    assert torch.equal(states.seen[0], states.seen[1])
    assert not torch.equal(states.seen[1], states.seen[2])


class Outputs(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.last = outputs


@pytest.mark.parametrize("objective", PAIRED, ids=name)
def test_what_the_step_logs_is_its_own_and_is_logged_once(objective):
    calls = []

    class Logging(Rich):
        def log(self, name, value, **kwargs):
            calls.append(name)
            super().log(name, value, **kwargs)

    outputs, module = Outputs(), Logging("dict")
    callback = AdversarialTraining(ATTACK, objective=objective)
    run = trainer(callbacks=[callback, outputs])
    run.fit(module, batches())
    assert calls.count("train_loss") == len(module.own) == 4
    mean = sum(module.own) / 4
    assert float(run.callback_metrics["train_loss_epoch"]) == pytest.approx(mean, abs=1e-6)
    assert outputs.last["extra"] == 3
    more = float(outputs.last["loss"]) - module.own[-1]
    assert more == pytest.approx(0, abs=1e-6) if not objective.pairs else more > 1e-5


def test_a_dict_without_a_loss_is_lightnings_to_refuse():
    class Lossless(Rich):
        def training_step(self, batch, batch_idx):
            return {"logits": self(batch[0])}

    with pytest.raises(Exception, match="the 'loss' key needs to be present"):
        fit(TRADES(), Lossless())


def test_validation_sees_clean_records_and_the_weights_of_the_optimizer():
    weights, seen = Weights(), []

    class Validating(Rich):
        def validation_step(self, batch, batch_idx):
            seen.append((self.trainer.global_step, batch[0].clone(), flat(self).clone()))

    module = Validating()
    callback = AdversarialTraining(ATTACK, objective=AWP(TRADES(), GAMMA))
    run = trainer(callbacks=[callback, weights], val_check_interval=2, num_sanity_val_steps=1)
    run.fit(module, batches(4), batches(1))
    assert [step for step, _, _ in seen] == [0, 2, 4]
    assert all(torch.equal(x, batches(1).dataset.tensors[0]) for _, x, _ in seen)
    assert torch.equal(seen[1][2], weights.before[2])
    assert torch.equal(seen[2][2], flat(module))


def test_which_batch_the_step_sees():
    class Spy(Rich):
        def training_step(self, batch, batch_idx):
            self.batch = batch[0].detach().clone()
            return super().training_step(batch, batch_idx)

    clean = batches(1).dataset.tensors[0]
    for objective in OBJECTIVES:
        module = Spy()
        fit(objective, module, count=1)
        assert torch.equal(module.batch, clean) == ("trades" in objective.name)


def test_a_loss_of_the_users_own_keeps_its_place():
    """Label smoothing and weights by hand: only the penalty is ours."""

    class Own(Rich):
        def training_step(self, batch, batch_idx):
            logits = self(batch[0])
            return F.cross_entropy(logits, batch[1], label_smoothing=0.1) + logits.square().mean()

    module, outputs = Own(layers=Net().net), Outputs()
    before = Own(layers=Net().net)
    before.load_state_dict(module.state_dict())
    fit(TRADES(0.0), module, count=1, callbacks=[outputs])
    x, y = batches(1).dataset.tensors
    logits = before(x)
    expected = F.cross_entropy(logits, y, label_smoothing=0.1) + logits.square().mean()
    torch.testing.assert_close(outputs.last["loss"], expected.detach())


class Manual(Net):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


@pytest.mark.parametrize(
    ("attack", "settings", "message"),
    [
        (ATTACK, {"objective": TRADES()}, "automatic optimization with trades"),
        (ATTACK, {"objective": MART()}, "automatic optimization with mart"),
        (ATTACK, {"objective": AWP()}, r"automatic optimization with awp\(madry\)"),
        (Free(ATTACK.ball), {}, "automatic optimization with Free"),
    ],
)
def test_refuses_a_module_that_steps_by_itself(attack, settings, message):
    with pytest.raises(InputError, match=message):
        trainer(callbacks=[AdversarialTraining(attack, **settings)]).fit(Manual(), loader())
