"""What users bring to a private fit: schedules, and ways to clip."""

import math

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback

from defend.privacy import PoissonBatchSampler, Randomness, epsilon
from defend.privacy.mechanism.clipping import AdaptiveClipping, PerLayerClipping
from defend.privacy.mechanism.schedules import Decay
from tests.callbacks.users import SEED, C, fit, private
from tests.helpers import Net, data, flat


class Releases(Callback):
    """Keeps the gradients that reach the optimizer."""

    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen.append(torch.cat([p.grad.flatten() for p in pl_module.parameters()]))


class Silent(Net):
    """A loss that does not depend on the data: the released gradients are noise alone."""

    def training_step(self, batch, batch_idx):
        return 0.0 * self(batch[0]).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def deviations(**settings):
    """The deviation of the noise on the sum, in units of C, step by step."""
    spy = Releases()
    fit(private(**settings), Silent, extra=[spy], max_epochs=2)
    return (torch.stack(spy.seen).double() * 32 / C).std(1)


# --- schedules --------------------------------------------------------------------------------


def test_a_noise_schedule_is_what_is_charged():
    callback = private(noise_multiplier=4.0, noise_schedule=Decay(0.5, every=3), accountant="prv")
    fit(callback)
    assert callback.history == ((4.0, 1 / 8, 3), (2.0, 1 / 8, 3), (1.0, 1 / 8, 2))
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, pld

    def composed(noises):
        accountant = pld.PLDAccountant(value_discretization_interval=1e-3)
        for noise in noises:
            accountant.compose(PoissonSampledDpEvent(1 / 8, GaussianDpEvent(noise)))
        return accountant.get_epsilon(1e-3)

    noises = [4.0 * 0.5 ** (t // 3) for t in range(8)]
    assert callback.epsilon == pytest.approx(composed(noises), rel=2e-2)
    # The same figure rejects a constant σ, and a schedule that is a step late.
    for wrong in ([4.0] * 8, [4.0, *noises[:-1]]):
        assert callback.epsilon != pytest.approx(composed(wrong), rel=2e-2)


def test_a_noise_schedule_is_what_is_added():
    expected = torch.tensor([2.0 * 0.8 ** (t // 4) for t in range(16)], dtype=torch.float64)
    found = deviations(noise_multiplier=2.0, noise_schedule=Decay(0.8, every=4))
    stairs = (found / expected).view(4, 4).pow(2).mean(1).sqrt()
    error = 1 / (2 * 4 * flat(Net()).numel()) ** 0.5
    assert ((stairs - 1).abs() < 4 * error).all()
    late = torch.tensor([1.0, 1 / 0.8, 1 / 0.8, 1 / 0.8])
    assert not ((stairs * late - 1).abs() < 4 * error).all()


def test_a_target_is_met_with_a_schedule():
    callback = private(noise_multiplier=None, target_epsilon=3.0, noise_schedule=Decay(0.95))
    fit(callback, max_epochs=2)
    first = callback.noise_multiplier
    assert [s.noise_multiplier for s in callback.history] == pytest.approx(
        [first * 0.95**t for t in range(16)]
    )
    steps = [(first * 0.95**t, 1 / 8, 1) for t in range(16)]
    assert 2.95 < callback.epsilon <= 3.0
    assert callback.epsilon == pytest.approx(epsilon(steps, 1e-3, "rdp"))


def test_a_resume_goes_on_at_its_place_in_the_schedules(tmp_path):
    """Noise, C and weights of a run in two parts are those of a run in one."""

    def run(ckpt=None, **settings):
        callback = private(noise_schedule=Decay(0.9, every=2), clip_schedule=Decay(0.8, every=3))
        module, program = fit(callback, ckpt=ckpt, **settings)
        return callback, module, program

    straight, module, _ = run(max_epochs=2)
    _, _, half = run(max_epochs=1)
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed, other, _ = run(tmp_path / "half.ckpt", max_epochs=2)
    noises = [s.noise_multiplier for s in resumed.history for _ in range(s.steps)]
    assert noises == pytest.approx([0.7 * 0.9 ** (t // 2) for t in range(16)])
    assert resumed.epsilon == pytest.approx(straight.epsilon)
    assert resumed.max_grad_norm == straight.max_grad_norm == C * 0.8**5
    torch.testing.assert_close(flat(other), flat(module), rtol=0, atol=1e-6)


def test_noise_follows_a_clip_schedule():
    found = deviations(noise_multiplier=2.0, clip_schedule=Decay(0.5, every=8))
    expected = torch.tensor([2.0] * 8 + [1.0] * 8, dtype=torch.float64)
    error = 1 / (2 * 8 * flat(Net()).numel()) ** 0.5
    halves = (found / expected).view(2, 8).pow(2).mean(1).sqrt()
    assert ((halves - 1).abs() < 4 * error).all()
    assert abs(0.5 * halves[0] - 1) > 4 * error  # noise of the second half in the first


# --- ways to clip, against a slow reference -----------------------------------------------------


def record_gradients(module, records):
    """One backward a record."""
    gradients = []
    for x, y in records:
        loss = F.cross_entropy(module(x), y)
        gradients.append(torch.autograd.grad(loss, list(module.parameters())))
    return gradients


def cut(tensors, norm):
    """The tensors, scaled to at most this norm together."""
    length = float(torch.cat([t.flatten() for t in tensors]).norm())
    return [t * min(1.0, norm / length) for t in tensors]


def slow_training(clip_batch, steps):
    """`Net` as `fit` trains it, without noise. clip_batch(step, gradients) → clipped ones."""
    pl.seed_everything(0)
    module = Net()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
    x, y = data(256).tensors
    sampler = PoissonBatchSampler(256, 1 / 8, 8, Randomness(insecure_seed=SEED))
    for step in range(steps):
        hits = sampler.sample(step)
        records = [(x[i : i + 1], y[i : i + 1]) for i in hits]
        clipped = clip_batch(step, record_gradients(module, records))
        for p, of_records in zip(module.parameters(), zip(*clipped, strict=True), strict=True):
            p.grad = sum(of_records) / 32
        optimizer.step()
    return module


def equal(one, other):
    return torch.allclose(flat(one), flat(other), rtol=0, atol=1e-5)


@pytest.mark.parametrize("chunk_size", [None, 7])
def test_a_clip_schedule_equals_the_slow_reference(chunk_size):
    settings = {"noise_multiplier": 0.0, "clip_schedule": Decay(0.5, every=2)}
    module, _ = fit(private(**settings, chunk_size=chunk_size), max_steps=5)
    norms = [C, C, C / 2, C / 2, C / 4]
    assert equal(module, slow_training(lambda t, gs: [cut(g, norms[t]) for g in gs], 5))
    assert not equal(module, slow_training(lambda t, gs: [cut(g, C) for g in gs], 5))


@pytest.mark.parametrize("chunk_size", [None, 7])
def test_per_layer_clipping_equals_the_slow_reference(chunk_size):
    callback = private(noise_multiplier=0.0, clipping=PerLayerClipping(), chunk_size=chunk_size)
    module, _ = fit(callback, max_steps=4)

    def by_layer(share):
        return lambda t, gs: [[cut([p], share)[0] for p in g] for g in gs]

    assert equal(module, slow_training(by_layer(C / 2), 4))  # 4 parameters: C / √4
    assert not equal(module, slow_training(by_layer(C), 4))
    assert not equal(module, slow_training(lambda t, gs: [cut(g, C) for g in gs], 4))


def slow_adaptive(steps, rate, quantile):
    """Adaptive clipping; also gives C after the last step."""
    norm = C

    def clip_batch(t, gradients):
        nonlocal norm
        clipped = [cut(g, norm) for g in gradients]
        lengths = [float(torch.cat([p.flatten() for p in g]).norm()) for g in gradients]
        below = 0.5 + sum((1 if length <= norm else 0) - 0.5 for length in lengths) / 32
        norm *= math.exp(-rate * (below - quantile))
        return clipped

    return slow_training(clip_batch, steps), norm


@pytest.mark.parametrize("chunk_size", [None, 7])
def test_adaptive_clipping_equals_the_slow_reference(chunk_size):
    clipping = AdaptiveClipping(target_quantile=0.7, learning_rate=0.3)
    callback = private(noise_multiplier=0.0, clipping=clipping, chunk_size=chunk_size)
    module, _ = fit(callback, max_epochs=1)
    reference, norm = slow_adaptive(8, rate=0.3, quantile=0.7)
    assert equal(module, reference)
    assert callback.max_grad_norm == pytest.approx(norm, rel=1e-5)
    other, wrong = slow_adaptive(8, rate=0.3, quantile=0.5)
    assert not equal(module, other)
    assert callback.max_grad_norm != pytest.approx(wrong, rel=1e-5)


class Fixed(Net):
    """Never moves, so the gradient norms stay what they are."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.mark.parametrize("start", [0.01, 50.0])
def test_adaptive_clipping_finds_the_quantile(start):
    clipping = AdaptiveClipping(target_quantile=0.75, learning_rate=0.3)
    callback = private(max_grad_norm=start, noise_multiplier=1.0, clipping=clipping)
    module, _ = fit(callback, Fixed, max_epochs=8)
    x, y = data(256).tensors
    pairs = [(x[i : i + 1], y[i : i + 1]) for i in range(256)]
    norms = [
        float(torch.cat([p.flatten() for p in g]).norm()) for g in record_gradients(module, pairs)
    ]
    share = sum(n <= callback.max_grad_norm for n in norms) / 256
    assert abs(share - 0.75) < 0.2  # at the start it is 0 or 1


def test_adaptive_clipping_costs_what_flat_clipping_costs():
    flatly, adaptively = private(), private(clipping=AdaptiveClipping())
    fit(flatly)
    fit(adaptively)
    assert adaptively.history == flatly.history
    assert adaptively.epsilon == flatly.epsilon
    assert adaptively.max_grad_norm != C


def test_a_checkpoint_keeps_what_adaptive_clipping_learned(tmp_path):
    straight, first, second = (private(clipping=AdaptiveClipping()) for _ in range(3))
    module, _ = fit(straight, max_epochs=2)
    _, half = fit(first, max_epochs=1)
    half.save_checkpoint(tmp_path / "half.ckpt")
    learned = torch.load(tmp_path / "half.ckpt", weights_only=True)["callbacks"]
    assert learned[first.state_key]["max_grad_norm"] == first.max_grad_norm != C
    resumed, _ = fit(second, ckpt=tmp_path / "half.ckpt", max_epochs=2)
    assert second.max_grad_norm == pytest.approx(straight.max_grad_norm, rel=1e-6)
    torch.testing.assert_close(flat(resumed), flat(module), rtol=0, atol=1e-6)
