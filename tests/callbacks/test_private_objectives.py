"""Every objective beside DifferentialPrivacy, one view or several, against a loop over records."""

import threading

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, TensorDataset

from defend import PGD, AdversarialTraining, Linf, PrivacyError
from defend.objectives import AWP, MART, TRADES, Madry
from defend.objectives.awp import ascent
from defend.objectives.base import Objective
from tests.callbacks.test_together import C, Mixing, fit, private
from tests.helpers import Net, data, flat, loader
from tests.reference.dpsgd import clipped_sum

ATTACK = PGD(Linf(0.2), steps=2)
OBJECTIVES = [Madry(), TRADES(6.0), MART(5.0), AWP(gamma=0.3), AWP(TRADES(6.0), gamma=0.3)]
BATCH = 32


def name(objective):
    return objective.name


class Recording(AdversarialTraining):
    """Keeps what each logical batch was made of."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.made = []

    def setup(self, trainer, pl_module, stage):
        super().setup(trainer, pl_module, stage)
        attack = self.steps.attacked

        def attacked(*args, **settings):
            self.made.append(attack(*args, **settings))
            return self.made[-1]

        self.steps.attacked = attacked


class Augmented(TensorDataset):
    """Another image each time a record is asked for."""

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return (x + 0.1 * torch.rand(x.shape)).clamp(0, 1), y


def whole_loss(module, objective, x, x_adv, y):
    """Mean over rows, from the papers' formulas."""
    adv, clean = module(x_adv), module(x)
    if "trades" in objective.name:
        kl = F.kl_div(adv.log_softmax(1), clean.log_softmax(1), log_target=True, reduction="none")
        return F.cross_entropy(clean, y) + 6.0 * kl.sum(1).mean()
    if "mart" in objective.name:
        p, q, rows = adv.softmax(1), clean.softmax(1), torch.arange(len(y))
        others = p.clone()
        others[rows, y] = 0
        boost = -(1.0001 - others.max(1).values + 1e-12).log()
        kl = (q * (q.log() - p.log())).sum(1)
        return F.cross_entropy(adv, y) + (boost + 5.0 * (1 - q[rows, y]) * kl).mean()
    return F.cross_entropy(adv, y)


def by_hand(objective, recorded, views):
    """Weights after a loop over records: no hooks, no chunks, weights moved by hand for AWP."""
    pl.seed_everything(0, verbose=False)
    module = Net()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
    for made in recorded:
        count = len(made.x) // views
        kept = [p.detach().clone() for p in module.parameters()]
        with torch.no_grad():
            for p in module.parameters():
                if isinstance(objective, AWP) and p.grad is not None and p.ndim > 1:
                    p.add_(ascent(p, p.grad, objective.gamma))
        rows = [slice(i * views, (i + 1) * views) for i in range(count)]
        records = [((made.x[r], made.x_adv[r]), made.y[r]) for r in rows]
        total = clipped_sum(module, lambda xs, y: whole_loss(module, objective, *xs, y), records, C)
        with torch.no_grad():
            for p, before, t in zip(module.parameters(), kept, total, strict=True):
                p.copy_(before)
                p.grad = t / BATCH
        optimizer.step()
    return flat(module)


def batches():
    return DataLoader(Augmented(*data(256).tensors), batch_size=BATCH, shuffle=True)


@pytest.mark.parametrize("chunk_size", [None, 7])
@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=name)
def test_equals_the_slow_reference(objective, views, chunk_size):
    callback = Recording(ATTACK, objective=objective)
    noiseless = private(noise_multiplier=0.0, views=views, chunk_size=chunk_size, selftest=False)
    module = fit([callback, noiseless], batches=batches(), max_steps=3)
    assert len(callback.made) == 3
    assert all(len(made.x) % views == 0 for made in callback.made)
    expected = by_hand(objective, callback.made, views)
    torch.testing.assert_close(flat(module), expected, rtol=0, atol=2e-5)
    # Not vacuous: another objective, or merging other rows, ends elsewhere.
    other = TRADES(6.0) if objective.name == "madry" else Madry()
    assert (by_hand(other, callback.made, views) - expected).abs().max() > 1e-3
    if views > 1:
        assert (by_hand(objective, callback.made, 1) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=name)
def test_passes_the_selftest_and_trains_with_noise(objective, views):
    callback = private(insecure_seed=None, views=views)
    module = fit(
        [AdversarialTraining(ATTACK, objective=objective, warmup_epochs=0.5), callback],
        batches=batches(),
    )
    assert callback.steps == 8
    assert callback._training.selftest.passed
    assert torch.isfinite(flat(module)).all()
    assert all(p.grad is None for p in module.parameters())


class Watch(Callback):
    """Weights at each optimizer step, and at each release."""

    def __init__(self):
        self.stepped, self.seen = [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.stepped.append(flat(pl_module).clone())

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append(flat(pl_module).clone())


def test_awp_moves_the_weights_for_the_gradient_only():
    inside = []

    class Looking(Net):
        def training_step(self, batch, batch_idx):
            inside.append(flat(self).clone())
            return super().training_step(batch, batch_idx)

    watch = Watch()
    callbacks = [
        AdversarialTraining(ATTACK, objective=AWP(gamma=0.3)),
        private(chunk_size=None, selftest=False),
        watch,
    ]
    fit(callbacks, Looking, max_steps=3)
    for before, stepped in zip(watch.seen, watch.stepped, strict=True):
        assert torch.equal(before, stepped)  # bit for bit
    assert torch.equal(inside[0], watch.seen[0])  # nothing was released yet
    for moved, at in zip(inside[1:], watch.seen[1:], strict=True):
        assert (moved - at).norm() > 0.1 * at.norm()


def test_awp_follows_the_release_and_no_raw_gradient():
    """With huge noise the direction is that of the noise, whatever the data."""
    moves = []
    for seed in (0, 1):
        inside, at = [], []

        class Looking(Net):
            def on_train_batch_start(self, batch, batch_idx, at=at):
                at.append(flat(self).clone())

            def training_step(self, batch, batch_idx, inside=inside):
                inside.append(flat(self).clone())
                return super().training_step(batch, batch_idx)

        records = data(256, seed=seed)
        callbacks = [
            AdversarialTraining(ATTACK, objective=AWP(gamma=0.3)),
            private(chunk_size=None, selftest=False, noise_multiplier=1e5),
        ]
        fit(callbacks, Looking, DataLoader(records, batch_size=BATCH), max_steps=2)
        moves.append((inside[1] - at[1]) / at[1].norm())
    torch.testing.assert_close(moves[0], moves[1], rtol=0, atol=1e-4)


def test_a_backward_between_steps_is_not_what_awp_follows():
    """`p.grad` is anybody's after the step; what was released is not."""
    inside, at, released = [], [], []

    class Looking(Net):
        def training_step(self, batch, batch_idx):
            inside.append(flat(self).clone())
            return super().training_step(batch, batch_idx)

    class Monitor(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            at.append(flat(pl_module).clone())

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            released.append([p.grad.clone() for p in pl_module.parameters()])

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            with torch.enable_grad():
                (1000 * F.cross_entropy(pl_module(batch[0]), batch[1])).backward()

    callbacks = [
        AdversarialTraining(ATTACK, objective=AWP(gamma=0.3)),
        private(chunk_size=None, selftest=False),
        Monitor(),
    ]
    fit(callbacks, Looking, max_steps=2)
    module, expected = Net(), []
    torch.nn.utils.vector_to_parameters(at[1], module.parameters())
    for p, g in zip(module.parameters(), released[0], strict=True):
        expected.append(ascent(p.detach(), g, 0.3) if p.ndim > 1 else torch.zeros_like(p))
    expected = torch.cat([step.flatten() for step in expected])
    torch.testing.assert_close(inside[1] - at[1], expected, rtol=0, atol=1e-6)


class Centred(Objective):
    """A planted wrong answer: a running mean of logits, which batches after it see."""

    name, inner_loss, start_radius, trains_on, pairs = "centred", "ce", None, "clean", True

    def __init__(self):
        self.centre = torch.zeros(3)

    def _penalty(self, clean_logits, adv_logits, y):
        self.centre = self.centre + 0.01 * (clean_logits.detach().mean(0) - self.centre)
        return (adv_logits - self.centre).pow(2).sum(1)


def test_an_objective_that_keeps_something_is_found():
    for objective in (Centred(), AWP(Centred(), gamma=0.1)):
        with pytest.raises(PrivacyError, match="keeps nothing of a batch, got "):
            fit([AdversarialTraining(ATTACK, objective=objective), private()])


class Counting(Objective):
    """Keeps what does not show in its loss: a lock, a counter, the last loss with its graph."""

    name, inner_loss, start_radius, trains_on, pairs = "counting", "ce", None, "clean", True

    def __init__(self):
        self.lock, self.calls, self.nan, self.last = threading.Lock(), 0, float("nan"), None

    def _penalty(self, clean_logits, adv_logits, y):
        with self.lock:
            self.calls += 1
        self.last = (clean_logits - adv_logits).pow(2).sum(1)
        return self.last * (torch.rand(len(self.last)) < 2)


def test_an_objective_that_keeps_what_does_not_show_is_no_matter():
    for objective in (Counting(), AWP(Counting(), gamma=0.1)):
        callback = private()
        fit([AdversarialTraining(ATTACK, objective=objective), callback], max_steps=1)
        assert callback.steps == 1


@pytest.mark.parametrize("records", [3, 64])
def test_coins_are_not_mistaken_for_known_numbers(records):
    """An attack without random start depends on its numbers by the coins alone."""
    attack = PGD(Linf(0.2), steps=1, random_start=False)
    for seed in range(12):
        guard = private(insecure_seed=seed)
        callbacks = [AdversarialTraining(attack, clean_fraction=0.2), guard]
        fit(callbacks, batches=loader(records, records), max_steps=1)
        assert guard.steps == 1


@pytest.mark.parametrize("objective", [Madry(), TRADES()], ids=name)
def test_known_dropout_masks_are_found_beside_an_attack(objective):
    class Seeded(Net):
        def forward(self, x):
            known = torch.Generator().manual_seed(5)
            return super().forward(x * (torch.rand(x.shape, generator=known) > 0.3))

    with pytest.raises(PrivacyError, match="random numbers from the global generators"):
        fit([AdversarialTraining(ATTACK, objective=objective), private()], Seeded)


@pytest.mark.parametrize("known", [True, False])
def test_an_attack_with_known_starts_is_found(known):
    def starting(model, x, y, *, generator=None, chunk_size=None):
        own = torch.Generator().manual_seed(5) if known else generator
        return (x + 0.2 * (torch.rand(x.shape, generator=own) - 0.5)).clamp(0, 1)

    callbacks = [AdversarialTraining(starting), private()]
    if not known:
        fit(callbacks)
        return
    with pytest.raises(PrivacyError, match="the generator that the attack is given"):
        fit(callbacks)


def test_an_attack_that_turns_bad_later_is_found():
    calls = []

    def late(model, x, y, *, generator=None, chunk_size=None):
        if model.training is False or len(x) > 6:
            calls.append(len(x))
        mixed = x - x.mean(0) if len(calls) > 8 else x
        return (x + 0.2 * mixed.sign()).clamp(0, 1)

    callback = private()
    with pytest.raises(PrivacyError, match="adversarial version of a record"):
        fit([AdversarialTraining(late), callback], max_epochs=4)
    assert callback.steps <= 20  # by steps in a row at the start, or by a look


class Rolled(Objective):
    """A planted wrong answer: the penalty of a record is that of its neighbour."""

    name, inner_loss, start_radius, trains_on, pairs = "rolled", "ce", None, "clean", True

    def _penalty(self, clean_logits, adv_logits, y):
        return ((clean_logits - adv_logits.roll(1, 0)) ** 2).sum(1)


@pytest.mark.parametrize("views", [1, 2])
def test_a_penalty_that_mixes_records_is_found(views):
    with pytest.raises(PrivacyError, match="would not be private"):
        fit([AdversarialTraining(ATTACK, objective=Rolled()), private(views=views)])


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=name)
def test_a_forward_that_mixes_records_is_found(objective, views):
    with pytest.raises(PrivacyError, match="would not be private"):
        fit([AdversarialTraining(ATTACK, objective=objective), private(views=views)], Mixing)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=name)
@pytest.mark.parametrize("universal", [True, False])
def test_an_attack_that_mixes_records_is_found(objective, universal):
    def mixing(model, x, y, *, generator=None, chunk_size=None):
        if universal:  # one perturbation for all, up the mean gradient
            x = x.detach().requires_grad_()
            with torch.enable_grad():
                (g,) = torch.autograd.grad(F.cross_entropy(model(x), y), x)
            return (x.detach() + 20 * g.sum(0)).clamp(0, 1)
        return (x + 0.2 * (x - x.mean(0)).sign()).clamp(0, 1)

    with pytest.raises(PrivacyError, match="would not be private"):
        fit([AdversarialTraining(mixing, objective=objective), private()])


def test_no_private_gradient_stays_after_an_error():
    class Broken(Net):
        def training_step(self, batch, batch_idx):
            if self.trainer.lightning_module is self and self.trainer.global_step == 1:
                raise KeyError("here")
            return super().training_step(batch, batch_idx)

    callback = AdversarialTraining(ATTACK, objective=AWP(TRADES(), gamma=0.3))
    guard = private()
    modules = []

    def make():
        modules.append(Broken())
        return modules[0]

    with pytest.raises(KeyError, match="here"):
        fit([callback, guard], make, loader(256, BATCH))
    assert all(p.grad is None and vars(p) == {} for p in modules[0].parameters())
    assert not any(m._forward_hooks for m in modules[0].modules())


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=name)
def test_on_cuda(objective, precision):
    results = []
    for chunk_size in (None, 10):
        callback = private(chunk_size=chunk_size, views=2)
        adversarial = AdversarialTraining(ATTACK, objective=objective)
        module = fit([adversarial, callback], batches=loader(256, BATCH), max_steps=4,
                     accelerator="gpu", precision=precision)  # fmt: skip
        results.append(flat(module).cpu())
        assert callback.steps == 4
    tolerance = 1e-4 if precision == "32-true" else 2e-2
    torch.testing.assert_close(*results, rtol=0, atol=tolerance)


class Talkative(Net):
    """Writes to the logger in its forward."""

    def forward(self, x):
        if self.logger is not None:
            self.logger.log_metrics({"forward": 1.0})
        return super().forward(x)


def test_trying_a_step_out_logs_nothing(tmp_path):
    """Neither its own forward nor the objective's: what is in the log is the step itself."""

    class Counting(CSVLogger):
        calls = 0

        def log_metrics(self, metrics, step=None):
            self.calls += "forward" in metrics

    logger = Counting(tmp_path)
    callbacks = [AdversarialTraining(ATTACK, objective=TRADES()), private(noise_multiplier=1.0)]
    quiet = {"limit_val_batches": 0, "num_sanity_val_steps": 0}
    fit(callbacks, Talkative, max_steps=1, logger=logger, **quiet)
    attack, step, other = 1 + ATTACK.steps, 1, 1  # the divergence starts from clean logits
    assert logger.calls == attack + step + other
