"""DifferentialPrivacy under the Trainer."""

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, LearningRateFinder
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from defend import BudgetError, DifferentialPrivacy, InputError, PrivacyError
from defend.privacy import PoissonBatchSampler, Randomness, epsilon
from tests.helpers import ConvNet, Net, data, flat, loader, trainer
from tests.reference.dpsgd import clipped_sum

SETTINGS = {"delta": 1e-3, "max_grad_norm": 0.5, "noise_multiplier": 0.7}


def private(**settings):
    return DifferentialPrivacy(**{**SETTINGS, **settings})


class Another(DifferentialPrivacy):
    """Lightning itself refuses two of the very same class."""


def fit(callback, module=None, batches=None, seed=0, val=None, ckpt=None, extra=(), **settings):
    pl.seed_everything(seed)
    module = Net() if module is None else module() if isinstance(module, type) else module
    run = trainer(callbacks=[callback, *extra], **settings)
    run.fit(module, batches or loader(256, 32), val, ckpt_path=ckpt)
    return module, run


@pytest.mark.parametrize("chunk_size", [None, 8, 3])
def test_equals_the_slow_reference(chunk_size):
    """Three steps, noise off: Poisson batch, clip per record, sum, ÷ expected batch, momentum."""
    module, _ = fit(
        private(noise_multiplier=0.0, insecure_seed=5, chunk_size=chunk_size), max_steps=3
    )
    pl.seed_everything(0)
    reference = Net()
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.05, momentum=0.9)
    x, y = data(256).tensors
    sampler = PoissonBatchSampler(256, 32 / 256, 8, Randomness(insecure_seed=5))
    for step in range(3):
        hits = sampler.sample(step)
        total = clipped_sum(
            reference,
            lambda a, b: F.cross_entropy(reference(a), b),
            [(x[i : i + 1], y[i : i + 1]) for i in hits],
            0.5,
        )
        for p, t in zip(reference.parameters(), total, strict=True):
            p.grad = t / 32
        optimizer.step()
    torch.testing.assert_close(flat(module), flat(reference), rtol=0, atol=1e-5)


class Releases(Callback):
    """Keeps the gradients that reach the optimizer."""

    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen.append(torch.cat([p.grad.flatten() for p in pl_module.parameters()]))


class Still(Net):
    """Never moves: every step starts from the same weights."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def released(sigma, **settings):
    spy = Releases()
    fit(
        private(noise_multiplier=sigma, insecure_seed=1, **settings),
        Still,
        extra=[spy],
        max_epochs=8,
    )
    return torch.stack(spy.seen) * 32  # undo ÷ expected batch


@pytest.mark.parametrize("chunk_size", [None, 8])
def test_noise_on_the_released_gradient_has_the_promised_deviation(chunk_size):
    sigma, C = 1.5, 0.5
    noise = (released(sigma, chunk_size=chunk_size) - released(0.0, chunk_size=chunk_size)).double()
    error = sigma * C / (2 * noise.numel()) ** 0.5
    assert abs(noise.std() - sigma * C) < 4 * error
    assert abs(noise.mean()) < 4 * sigma * C / noise.numel() ** 0.5
    # The same test rejects noise added once a chunk, or 3% too little.
    assert abs(noise.std() - sigma * C * 4**0.5) > 4 * error
    assert abs(0.97 * noise.std() - sigma * C) > 4 * error


def test_two_runs_of_one_seed_draw_different_noise_and_batches():
    one, two = (fit(private())[0] for _ in range(2))
    assert not torch.equal(flat(one), flat(two))
    one, two = (fit(private(noise_multiplier=0.0))[0] for _ in range(2))
    assert not torch.equal(flat(one), flat(two))


def test_batches_are_poisson_sampled_from_the_first_epoch_on():
    sizes = []

    class Counting(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            sizes.append(len(batch[0]))

    callback = private(insecure_seed=3)
    fit(callback, extra=[Counting()], max_epochs=4)
    sampler = PoissonBatchSampler(256, 1 / 8, 8, Randomness(insecure_seed=3))
    assert sizes == [len(sampler.sample(step)) for step in range(32)]
    assert len(set(sizes[:8])) > 3
    assert callback.sample_rate == 32 / 256
    assert callback.steps == 32


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_limits_and_schedulers(workers):
    callback = private()
    batches = loader(256, 32, num_workers=workers, persistent_workers=workers > 0)
    _, run = fit(callback, Net(schedule=True), batches, max_epochs=2, limit_train_batches=3)
    assert callback.steps == run.global_step == 6


def test_empty_batches_take_their_noised_step():
    callback = private(noise_multiplier=1.0)
    module, _ = fit(callback, batches=loader(16, 1), max_epochs=4)
    assert callback.steps == 64  # q = 1/16: a third of the batches are empty
    assert flat(module).isfinite().all()


def test_epoch_means_in_the_log_do_not_depend_on_chunks():
    means = []
    for chunk_size in (None, 5):
        _, run = fit(private(noise_multiplier=0.0, insecure_seed=2, chunk_size=chunk_size))
        means.append(run.callback_metrics["train_loss_epoch"])
    torch.testing.assert_close(*means, rtol=1e-5, atol=1e-6)


# --- ε ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
def test_a_target_is_met_over_the_plan(accountant):
    callback = DifferentialPrivacy(
        delta=1e-3, max_grad_norm=1.0, target_epsilon=3.0, accountant=accountant
    )
    _, run = fit(callback, max_epochs=3)
    assert callback.steps == run.global_step == 24
    assert 2.9 < callback.epsilon <= 3.0
    expected = epsilon([(callback.noise_multiplier, 1 / 8, 24)], 1e-3, accountant)
    assert callback.epsilon == expected


def test_training_ends_before_the_step_that_would_exceed_the_target():
    callback = private(target_epsilon=2.0, noise_multiplier=1.0)
    _, run = fit(callback, max_epochs=20)
    assert callback.epsilon <= 2.0
    assert epsilon([(1.0, 1 / 8, callback.steps + 1)], 1e-3) > 2.0
    assert 0 < run.global_step == callback.steps < 160


def test_a_budget_too_small_for_one_step_trains_none():
    callback = private(target_epsilon=0.1, noise_multiplier=0.5)
    module, run = fit(callback)
    pl.seed_everything(0)
    assert torch.equal(flat(module), flat(Net()))
    assert (run.global_step, callback.epsilon) == (0, 0.0)


def test_min_epochs_cannot_force_a_step_beyond_the_budget():
    callback = private(target_epsilon=2.0, noise_multiplier=1.0)
    with pytest.raises(BudgetError, match=r"stop at ε = 2.0, got a further step"):
        fit(callback, max_epochs=20, min_epochs=20)
    assert callback.epsilon <= 2.0


class Logged(Callback):
    def __init__(self, callback):
        self.callback, self.pairs = callback, []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.pairs.append(
            (float(trainer.callback_metrics["privacy/epsilon"]), self.callback.epsilon)
        )


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
def test_the_logged_epsilon_is_never_below_the_spent_and_ends_exact(accountant):
    callback = private(accountant=accountant)
    spy = Logged(callback)
    fit(callback, extra=[spy], max_epochs=5)
    assert len(spy.pairs) == 40
    # Both are upper bounds, on meshes that differ a little; the log holds float32.
    assert all(spent - 1e-5 <= logged <= spent + 0.05 for logged, spent in spy.pairs)
    assert spy.pairs[-1][0] == pytest.approx(spy.pairs[-1][1], abs=1e-5)


def test_before_a_fit_nothing_is_known_and_nothing_spent():
    callback = DifferentialPrivacy(delta=1e-3, max_grad_norm=1.0, target_epsilon=1.0)
    assert (callback.epsilon, callback.steps) == (0.0, 0)
    assert callback.noise_multiplier is None
    assert callback.sample_rate is None


def test_a_second_fit_adds_to_what_was_spent():
    callback = private()
    module = Net()
    pl.seed_everything(0)
    trainer(callbacks=[callback]).fit(module, loader(256, 32))
    first = callback.epsilon
    trainer(callbacks=[callback]).fit(module, loader(256, 32))
    assert callback.steps == 16
    assert callback.epsilon > first


def test_a_second_fit_stays_within_the_target_too_and_says_what_it_costs():
    callback = DifferentialPrivacy(delta=1e-3, max_grad_norm=1.0, target_epsilon=2.0)
    module = Net()
    trainer(callbacks=[callback]).fit(module, loader(256, 32))
    first = callback.noise_multiplier
    with pytest.warns(UserWarning, match=r"ε = 1.9\d+ of 2.0 was spent by 8 earlier steps"):
        trainer(callbacks=[callback]).fit(module, loader(256, 32))
    assert callback.epsilon <= 2.0
    assert callback.noise_multiplier > 5 * first


# --- what users bring ---------------------------------------------------------------------------


class Images(pl.LightningDataModule):
    def train_dataloader(self):
        x = torch.rand(40, 1, 6, 6, generator=torch.Generator().manual_seed(0))
        full = TensorDataset(x, torch.arange(40) % 3)
        return DataLoader(Subset(full, range(30)), batch_size=10, drop_last=True)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "64-true"])
def test_convolutions_group_norm_dropout_in_place_and_precision(precision):
    pl.seed_everything(0)
    module, callback = ConvNet(), private(chunk_size=4)
    before = flat(module)
    trainer(callbacks=[callback], precision=precision, max_epochs=2).fit(
        module, datamodule=Images()
    )
    assert callback.steps == 6
    assert callback.sample_rate == 10 / 30
    assert not torch.equal(flat(module).float(), before)
    assert module.net[2].inplace  # restored


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop])
def test_any_optimizer_and_parameter_groups(optimizer):
    class Groups(Net):
        def configure_optimizers(self):
            return optimizer([
                {"params": self.net[0].parameters(), "lr": 1e-2},
                {"params": self.net[2].parameters(), "lr": 1e-3},
            ])  # fmt: skip

    callback = private()
    _, run = fit(callback, Groups())
    assert type(run.optimizers[0]) is optimizer  # the user's own, not a wrapper
    assert callback.steps == 8


def test_dict_batches_and_dict_outputs():
    class Dicts(Net):
        def training_step(self, batch, batch_idx):
            loss = F.cross_entropy(self(batch["x"]), batch["y"])
            return {"loss": loss, "extra": batch["name"]}

    def collate(rows):
        return {
            "x": torch.stack([r[0] for r in rows]),
            "y": torch.stack([r[1] for r in rows]),
            "name": [f"record {int(r[1])}" for r in rows],
        }

    callback = private(chunk_size=8)
    fit(callback, Dicts(), DataLoader(data(64), batch_size=32, collate_fn=collate))
    assert callback.steps == 2


def test_buffers_and_metrics_on_the_module_are_fine():
    class Measured(Net):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(8))

        def forward(self, x):
            return super().forward(x - self.mean)

    callback = private()
    fit(callback, Measured())
    assert callback.steps == 8


# --- nothing leaks, nothing is lost -------------------------------------------------------------


def test_nobody_sees_a_gradient_without_noise():
    """Hooks that run between backward and step see the noised gradient, or none."""
    sigma_only = 1e6  # the noise drowns everything: a small gradient would be the data's
    seen = []

    class Nosy(Net):
        def on_before_optimizer_step(self, optimizer):
            seen.append([p.grad for p in self.parameters()])

    class NosyCallback(Callback):
        def look(self, trainer, pl_module, *args):
            seen.append([p.grad for p in pl_module.parameters()])
            assert not callback.fit.step.engine.holds_any

        on_after_backward = on_before_optimizer_step = look

    pl.seed_everything(0)
    callback = private(noise_multiplier=sigma_only)
    trainer(callbacks=[NosyCallback(), callback, NosyCallback()], max_steps=1).fit(
        Nosy(), loader(256, 32)
    )
    assert len(seen) == 5
    for gradients in seen:
        assert all(g is None or g.abs().mean() > 1.0 for g in gradients)


def test_after_the_fit_the_module_is_as_it_was():
    module = Net()
    callback = private()
    keys = list(module.state_dict())
    _, run = fit(callback, module)
    assert list(module.state_dict()) == keys
    assert all(vars(p) == {} and p.grad is None for p in module.parameters())
    assert not any(m._forward_hooks or m._backward_hooks for m in module.modules())
    assert not set(vars(run.strategy)) & {"training_step", "process_dataloader"}
    assert not run.optimizers[0]._optimizer_step_pre_hooks
    run.validate(module, loader(16, 16), verbose=False)


def test_after_an_exception_too():
    class Failing(Net):
        def training_step(self, batch, batch_idx):
            if batch_idx == 2:
                raise RuntimeError("out of luck")
            return super().training_step(batch, batch_idx)

    module = Failing()
    callback = private(chunk_size=8)
    with pytest.raises(RuntimeError, match="out of luck"):
        fit(callback, module)
    assert callback.steps == 2
    assert all(vars(p) == {} and p.grad is None for p in module.parameters())
    assert not any(m._forward_hooks or m._backward_hooks for m in module.modules())


def test_no_step_can_be_taken_behind_its_back():
    class Sly(Net):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            F.cross_entropy(self(batch[0]), batch[1]).backward()
            self.trainer.optimizers[0].step()

    with pytest.raises(PrivacyError, match="one noised gradient for each optimizer step"):
        fit(private(), Sly())


class Skipping(Net):
    def training_step(self, batch, batch_idx):
        return None


class Concatenating(Net):
    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(torch.cat([x, x + 0.1])), torch.cat([y, y]))


class OutsideItsModule(Net):
    def forward(self, x):
        return F.linear(self.net[:2](x), self.net[2].weight, self.net[2].bias)


class Normalizing(Net):
    def __init__(self):
        super().__init__()
        self.net.insert(0, nn.BatchNorm1d(8))


class TwoOptimizers(Net):
    def configure_optimizers(self):
        return [
            torch.optim.SGD(self.net[0].parameters(), lr=0.1),
            torch.optim.SGD(self.net[2].parameters(), lr=0.1),
        ]

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class OwnBackward(Net):
    def backward(self, loss):
        loss.backward()


class HalfTrained(Net):
    def configure_optimizers(self):
        return torch.optim.SGD(self.net[0].parameters(), lr=0.1)


class TakesIterator(Net):
    def training_step(self, dataloader_iter):
        return None


def dropping(rows):
    return [torch.stack([r[0] for r in rows[1:]]), torch.stack([r[1] for r in rows[1:]])]


@pytest.mark.parametrize(
    ("module", "batches", "settings", "message"),
    [
        (Normalizing, None, {}, "BatchNorm1d at `net.0`"),
        (TwoOptimizers, None, {}, "automatic optimization"),
        (HalfTrained, None, {}, "`net.2.weight` left out"),
        (TakesIterator, None, {}, "dataloader_iter"),
        (OwnBackward, None, {}, "overrides it"),
        (Skipping, None, {}, "a loss for every batch, got None"),
        (Concatenating, None, {"engine": "hooks"}, "in the gradient of `net.0.weight`"),
        (
            OutsideItsModule,
            None,
            {"engine": "hooks"},
            "gradient per record for `net.2.weight`.*Or take engine='record'",
        ),
        (Net, None, {"accumulate_grad_batches": 2}, "accumulate_grad_batches=1, got 2"),
        (Net, None, {"gradient_clip_val": 1.0}, "gradient_clip_val=None, got 1.0"),
        (Net, None, {"overfit_batches": 2}, "overfit_batches=0"),
        (Net, None, {"reload_dataloaders_every_n_epochs": 1}, "reload_dataloaders"),
        (Net, None, {"precision": "bf16-true"}, "got 'bf16-true'"),
        (Net, None, {"extra": [LearningRateFinder()]}, "got LearningRateFinder"),
        (Net, lambda: [loader(), loader()], {}, "one training loader, got 2"),
        (Net, lambda: DataLoader(data(8), batch_size=16), {}, "16 from 8 records"),
        (Net, lambda: DataLoader(data(64), 32, collate_fn=dropping), {}, "6 rows, .* got 5"),
        (Net, None, {"extra": [Another(**SETTINGS)]}, "one DifferentialPrivacy callback, got two"),
    ],
)
def test_refused_under_the_trainer(module, batches, settings, message):
    instance = module()
    before = flat(instance)
    settings = {**settings}
    callback = private(engine=settings.pop("engine", "auto"))
    with pytest.raises((PrivacyError, InputError), match=f"(?s){message}"):
        fit(callback, instance, batches() if batches else None, **settings)
    assert torch.equal(flat(instance), before)  # refused before the first step


def test_a_skipped_chunk_is_refused():
    with pytest.raises(PrivacyError, match="a loss for every batch, got None"):
        fit(private(chunk_size=4), Skipping)


def test_gradual_unfreezing_is_refused():
    class Unfreezing(Net):
        def __init__(self):
            super().__init__()
            self.net[0].requires_grad_(False)

        def on_train_epoch_start(self):
            self.net[0].requires_grad_(self.current_epoch > 0)

    callback = private()
    with pytest.raises(PrivacyError, match="trainable at the start, got 2 more"):
        fit(callback, Unfreezing, max_epochs=2)
    assert callback.steps == 8


def test_accumulating_by_hand_is_refused():
    class EverySecond(Net):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
            if batch_idx % 2:
                super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
            else:
                optimizer_closure()

    with pytest.raises(PrivacyError, match="one optimizer step for each batch"):
        fit(private(), EverySecond)


def test_a_plan_in_steps_alone():
    callback = private()
    _, run = fit(callback, max_steps=5, max_epochs=None)
    assert callback.steps == run.global_step == 5


def test_a_fit_works_after_one_whose_clean_up_was_cut_short():
    class Spoiling(Callback):
        def on_exception(self, trainer, pl_module, exception):
            raise RuntimeError("worse luck")

        def on_train_batch_end(self, *args):
            raise RuntimeError("out of luck")

    callback, module = private(), Net()
    run = trainer(callbacks=[Spoiling(), callback])
    with pytest.raises(RuntimeError):
        run.fit(module, loader(256, 32))
    fit(callback, module)
    assert callback.steps == 1 + 8


def test_a_delta_that_means_nothing_is_warned_about():
    with pytest.warns(UserWarning, match=r"delta=0.1 is not below 1 / 256 records"):
        fit(private(delta=0.1))


def test_no_noise_is_not_private():
    callback = private(noise_multiplier=0.0)
    fit(callback, max_steps=1)
    assert callback.epsilon == float("inf")
    assert not callback.private


def test_an_endless_plan_needs_the_noise():
    callback = DifferentialPrivacy(delta=1e-3, max_grad_norm=1.0, target_epsilon=1.0)
    with pytest.raises(InputError, match="a plan with an end to find the noise"):
        fit(callback, max_epochs=-1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"delta": 0.0}, r"`delta` to be in \(0, 1\), got 0.0"),
        ({"delta": 2}, r"`delta` to be in \(0, 1\), got 2"),
        ({"max_grad_norm": 0.0}, "`max_grad_norm` to be > 0"),
        ({"noise_multiplier": None}, "`target_epsilon`, `noise_multiplier` or both"),
        ({"noise_multiplier": -1.0}, "`noise_multiplier` to be ≥ 0"),
        ({"target_epsilon": 0.0}, "`target_epsilon` to be > 0"),
        ({"accountant": "gdp"}, "`accountant` to be one of"),
        ({"chunk_size": 0}, "`chunk_size` to be 'auto'"),
    ],
)
def test_refuses_bad_settings(settings, message):
    with pytest.raises(InputError, match=message):
        private(**settings)
