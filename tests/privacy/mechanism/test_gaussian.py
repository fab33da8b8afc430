import math

import pytest
import torch

from defend.privacy.mechanism.gaussian import (
    add_noise_,
    clip_and_sum,
    clip_factors,
    per_record_norms,
)

SHAPES = [(3, 2), (5,), (2, 3, 4)]


def gradients(rows=6, dtype=torch.float32, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = scale * torch.logspace(-2, 2, rows)
    return [
        (torch.randn((rows, *shape), generator=generator) * sizes.view(-1, *[1] * len(shape))).to(
            dtype
        )
        for shape in SHAPES
    ]


def row_vector(grads, i):
    return torch.cat([g[i].flatten().double() for g in grads])


def as_vector(tensors):
    return torch.cat([t.flatten().double() for t in tensors])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_clipped_sum_equals_a_loop_over_records(dtype):
    grads, C = gradients(dtype=dtype), 0.7
    expected = torch.zeros_like(row_vector(grads, 0))
    for i in range(6):
        row = row_vector(grads, i)
        expected += row * min(1.0, C / row.norm().item())
    result = clip_and_sum(grads, C)
    assert all(r.dtype == torch.promote_types(dtype, torch.float32) for r in result)
    torch.testing.assert_close(as_vector(result), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("C", [1e-3, 1.0, 50.0])
def test_one_record_moves_the_sum_by_at_most_the_clipping_norm(dtype, C):
    grads = gradients(dtype=dtype)
    full = as_vector(clip_and_sum(grads, C))
    moves = []
    for i in range(6):
        rest = [torch.cat([g[:i], g[i + 1 :]]) for g in grads]
        moves.append((full - as_vector(clip_and_sum(rest, C))).norm().item())
    assert max(moves) <= C * (1 + 1e-4)
    assert max(moves) >= C * (1 - 1e-4)  # the largest record does use its share


def test_padding_counts_for_nothing():
    grads = gradients()
    weights = torch.tensor([1.0, 1, 1, 0, 0, 0])
    expected = clip_and_sum([g[:3] for g in grads], 0.5)
    torch.testing.assert_close(clip_and_sum(grads, 0.5, weights), expected)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_broken_record_contributes_nothing_and_spoils_nothing(value):
    grads = gradients()
    grads[1][2, 3] = value
    keep = [0, 1, 3, 4, 5]
    expected = clip_and_sum([g[keep] for g in grads], 0.5)
    torch.testing.assert_close(clip_and_sum(grads, 0.5), expected)


def test_factors():
    norms = torch.tensor([0.0, 0.5, 1.0, 2.0, math.nan, math.inf])
    expected = torch.tensor([1.0, 1.0, 1.0, 0.5, 0.0, 0.0])
    assert torch.equal(clip_factors(norms, 1.0), expected)


def test_norms_of_bfloat16_are_taken_in_float32():
    grads = [torch.full((1, 10_000), 0.01, dtype=torch.bfloat16)]
    exact = grads[0].double().norm()
    torch.testing.assert_close(per_record_norms(grads)[0].double(), exact, rtol=1e-6, atol=0)


def deviation_is_promised(noise, promised):
    """The sample deviation within four standard errors of what was promised."""
    error = promised / math.sqrt(2 * noise.numel())
    return abs(noise.std().item() - promised) < 4 * error


def draw(noise_multiplier, C, seed=0):
    sums = [torch.zeros(200, 100), torch.zeros(500)]
    generator = torch.Generator().manual_seed(seed)

    def normal(like):
        return torch.empty_like(like).normal_(generator=generator)

    add_noise_(sums, deviation=noise_multiplier * C, draw=normal)
    return as_vector(sums)


def test_noise_has_the_promised_deviation_and_a_wrong_scale_is_rejected():
    sigma, C = 1.3, 0.4
    noise = draw(sigma, C)
    assert deviation_is_promised(noise, sigma * C)
    assert abs(noise.mean()) < 4 * sigma * C / math.sqrt(noise.numel())
    # Kolmogorov-Smirnov: Gaussian, not just of the right width.
    from scipy.stats import kstest

    assert kstest(noise.numpy() / (sigma * C), "norm").pvalue > 1e-4

    for wrong in (sigma, C, 0.95 * sigma * C, sigma * C / math.sqrt(2), sigma**2 * C):
        assert not deviation_is_promised(noise, wrong)
        assert not deviation_is_promised(draw(wrong, 1.0), sigma * C)


def test_noise_is_independent_between_parameters_and_steps():
    first, second = draw(1.0, 1.0, seed=0), draw(1.0, 1.0, seed=1)
    n = len(first)
    assert abs((first * second).mean()) < 4 / math.sqrt(n)
    assert abs((first[:-1] * first[1:]).mean()) < 4 / math.sqrt(n)


def test_no_noise_leaves_the_sum_as_it_is():
    assert draw(0.0, 1.0).abs().max() == 0
