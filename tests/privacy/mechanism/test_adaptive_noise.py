"""Adaptive clipping end to end: how much noise its gradients and its count are released with.

The weights stand still, so the same records have the same gradients at every step: what a step
without noise would release is known, and the rest of what was released is noise.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from defend.privacy import AdaptiveClipping, clip_and_sum

from .test_step import B, C, make, networks, records

SIGMA, COUNT_NOISE, RATE, QUANTILE, STEPS = 8.0, 5.0, 0.5, 0.5, 300
# By the definition: what is left of 1/σ² when the count, of sensitivity ½, took its part.
SIGMA_DELTA = 1 / math.sqrt(1 / SIGMA**2 - (0.5 / COUNT_NOISE) ** 2)
SETTINGS = {"target_quantile": QUANTILE, "learning_rate": RATE, "count_noise": COUNT_NOISE}


class GradientLikeSigma(AdaptiveClipping):
    """Planted: the count is released for nothing."""

    def noise(self, noise_multiplier, expected_batch_size):
        return noise_multiplier, super().noise(noise_multiplier, expected_batch_size)[1]


class NoCountNoise(AdaptiveClipping):
    """Planted: the count is released nearly as it is; as it is, it would be refused."""

    def noise(self, noise_multiplier, expected_batch_size):
        return SIGMA_DELTA, 1e-12


class HalfCountNoise(AdaptiveClipping):
    """Planted: half of the count's noise."""

    def noise(self, noise_multiplier, expected_batch_size):
        return SIGMA_DELTA, COUNT_NOISE / 2


def gradients_of_records(module):
    """One row of the gradient for each record, parameter by parameter, by a loop."""
    rows = [
        torch.autograd.grad(F.cross_entropy(module(a[None]), b[None]), list(module.parameters()))
        for a, b in zip(*records(), strict=True)
    ]
    return [torch.stack(parts) for parts in zip(*rows, strict=True)]


def released(clipping, steps=STEPS):
    """The gradients' noise [steps, coordinates], the count's noise [steps], C before each step."""
    module = networks()["mlp"]
    known = gradients_of_records(module)
    norms = torch.sqrt(sum(g.flatten(1).double().square().sum(1) for g in known))
    x, y = records()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    step, _ = make(module, SIGMA, optimizer, clipping=clipping)
    noise, count_noise, bounds = [], [], []
    for _ in range(steps):
        bound = step.max_grad_norm
        step.begin()
        step.expect(7, 7)
        F.cross_entropy(module(x), y).backward()
        step.release()
        sums = clip_and_sum(known, bound)
        found = [p.grad * B - s for p, s in zip(step.parameters, sums, strict=True)]
        noise.append(torch.cat([f.flatten() for f in found]).double())
        # C' = C · exp(−η (½ + count / B − γ)), solved for the count.
        count = B * (math.log(bound / step.max_grad_norm) / RATE + QUANTILE - 0.5)
        count_noise.append(count - float(((norms <= bound).double() - 0.5).sum()))
        bounds.append(bound)
        optimizer.step()
    step.close()
    return torch.stack(noise), torch.tensor(count_noise), torch.tensor(bounds).double()


def deviation_is(noise, promised):
    """Mean 0 and the promised deviation, each within four standard errors."""
    root = noise.square().mean().sqrt().item()
    right = abs(root - promised) < 4 * promised / math.sqrt(2 * noise.numel())
    return right and abs(noise.mean().item()) < 4 * promised / math.sqrt(noise.numel())


@pytest.fixture(scope="module")
def honest():
    return released(AdaptiveClipping(**SETTINGS))


def test_the_gradient_has_the_noise_that_the_count_leaves_it(honest):
    noise, _, bounds = honest
    assert bounds.log().std() > 0.2  # C moves, or C_t could not be told from C
    assert deviation_is(noise / bounds[:, None], SIGMA_DELTA)
    # σ·C_t, noise for the first C, and noise for the C after the step.
    assert not deviation_is(noise / bounds[:, None], SIGMA)
    assert not deviation_is(noise / C, SIGMA_DELTA)
    assert not deviation_is(noise[:-1] / bounds[1:, None], SIGMA_DELTA)


def test_the_count_has_the_noise_it_was_charged_for(honest):
    _, noise, _ = honest
    assert deviation_is(noise, COUNT_NOISE)
    assert not deviation_is(noise, COUNT_NOISE / 2)
    assert not deviation_is(noise, 2 * COUNT_NOISE)


def test_the_two_noises_are_independent(honest):
    noise, count_noise, bounds = honest
    noise, count_noise = noise / bounds[:, None] / SIGMA_DELTA, count_noise / COUNT_NOISE

    def largest(values):
        """The largest correlation with the count, in standard errors; 5 is rare among 83."""
        return (values * count_noise[:, None]).mean(0).abs().max().item() * math.sqrt(STEPS)

    assert largest(noise) < 5
    shared = noise.clone()
    shared[:, 3] = 0.8 * shared[:, 3] + 0.6 * count_noise
    assert largest(shared) > 5


@pytest.mark.parametrize(
    ("planted", "wrong"),
    [(GradientLikeSigma, "gradient"), (NoCountNoise, "count"), (HalfCountNoise, "count")],
)
def test_a_planted_wrong_noise_is_rejected(planted, wrong):
    noise, count_noise, bounds = released(planted(**SETTINGS), steps=100)
    found = {
        "gradient": deviation_is(noise / bounds[:, None], SIGMA_DELTA),
        "count": deviation_is(count_noise, COUNT_NOISE),
    }
    assert found == {"gradient": wrong != "gradient", "count": wrong != "count"}
    if planted is NoCountNoise:  # what is left is rounding of C
        assert count_noise.abs().max() < 1e-9
