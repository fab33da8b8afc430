import math

import pytest
import torch
from scipy import stats

from defend.privacy.mechanism import secure
from defend.privacy.mechanism.secure import gaussians_from, uniforms_from

from .keystreams import DRAWS, KEPT, REJECTED, Constant, dependence, integers_by_hand, keystream


@pytest.fixture(scope="module")
def gaussians():
    return gaussians_from(keystream(), DRAWS)


# --- the formula ----------------------------------------------------------------------------------


def gaussians_by_hand(data):
    """The formula, number by number, for one chunk of `len(data) / 32` numbers."""
    k = integers_by_hand(data)
    pairs = len(k) // 8
    z, w = [], []
    for column in range(pairs):
        u = [(k[row * pairs + column] + 1) / 2**53 for row in range(4)]
        v = [k[(row + 4) * pairs + column] / 2**53 for row in range(4)]
        radii = [math.sqrt(-2 * math.log(x)) for x in u]
        z.append(sum(r * math.cos(2 * math.pi * x) for r, x in zip(radii, v, strict=True)) / 2)
        w.append(sum(r * math.sin(2 * math.pi * x) for r, x in zip(radii, v, strict=True)) / 2)
    return z + w


@pytest.mark.parametrize("size", [0, 1, 2, 7, 1000])
def test_gaussians_equal_a_loop_over_numbers(size):
    pairs = (size + 1) // 2
    expected = gaussians_by_hand(keystream().take(64 * pairs))[:size]
    exact = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(gaussians_from(keystream(), size), exact, rtol=1e-12, atol=1e-14)


def test_chunks_go_on_in_the_stream(monkeypatch):
    monkeypatch.setattr(secure, "_COLUMNS", 4)
    stream = keystream()
    expected = gaussians_by_hand(stream.take(64 * 4)) + gaussians_by_hand(stream.take(64 * 2))
    exact = torch.tensor(expected[:11], dtype=torch.float64)
    torch.testing.assert_close(gaussians_from(keystream(), 11), exact, rtol=1e-12, atol=1e-14)
    integers = integers_by_hand(keystream().take(8 * 70))
    assert uniforms_from(keystream(), 70).tolist() == [k / 2**53 for k in integers]


def test_the_logarithm_never_meets_zero():
    """k = 0 gives the largest radius, k = 2⁵³ − 1 the radius 0."""
    largest = gaussians_from(Constant(0x00), 2)  # cos 0 = 1, sin 0 = 0
    assert largest.tolist() == pytest.approx([2 * math.sqrt(106 * math.log(2)), 0])
    assert gaussians_from(Constant(0xFF), 4).tolist() == [0.0] * 4


# --- the law --------------------------------------------------------------------------------------


def moments(z):
    """Smallest p-value of the first four moments; N(0, 1) has variances 1, 2, 15 and 96."""
    expected = {1: (0, 1), 2: (1, 2), 3: (0, 15), 4: (3, 96)}
    return min(
        2 * stats.norm.sf(abs((z**k).mean().item() - mean) / math.sqrt(variance / len(z)))
        for k, (mean, variance) in expected.items()
    )


def shape(z):
    return stats.kstest(z.numpy(), "norm", method="asymp").pvalue


def tails(z):
    """p-value of the number of draws beyond 4σ, where 63 in a million lie."""
    return stats.binomtest(int((z.abs() > 4).sum()), len(z), 2 * stats.norm.sf(4)).pvalue


def box_muller(count, seed=5):
    generator = torch.Generator().manual_seed(seed)
    u, v = torch.rand(2, count, DRAWS // 2, generator=generator, dtype=torch.float64)
    return (-2 * torch.log1p(-u)).sqrt(), 2 * math.pi * v


def test_gaussians_are_standard_normal(gaussians):
    assert moments(gaussians) > KEPT
    assert shape(gaussians) > KEPT
    assert tails(gaussians) > KEPT


@pytest.mark.parametrize("scale", [0.98, 1.02])
def test_a_scale_wrong_by_two_percent_is_rejected(gaussians, scale):
    assert moments(scale * gaussians) < REJECTED
    assert shape(scale * gaussians) < REJECTED


def test_a_sum_of_four_that_depend_is_rejected():
    """No two of them correlate, so mean and variance are right; the shape is not."""
    (r,), (θ,) = box_muller(1)
    wrong = r * (θ.cos() + θ.sin() + (2 * θ).cos() + (2 * θ).sin()) / 2
    assert wrong.var().item() == pytest.approx(1, abs=0.01)
    assert moments(wrong) < REJECTED
    assert shape(wrong) < REJECTED


def test_thin_tails_are_rejected():
    """Twelve uniforms, less 6: mean and variance of N(0, 1), and a fifth of its tails."""
    generator = torch.Generator().manual_seed(5)
    twelve = torch.rand(12, DRAWS // 2, generator=generator, dtype=torch.float64).sum(0) - 6
    assert tails(twelve) < REJECTED


@pytest.mark.parametrize("lag", [1, 2, 4, secure._COLUMNS // 2, secure._COLUMNS])
def test_gaussians_at_a_distance_are_independent(gaussians, lag):
    assert dependence(gaussians[:-lag], gaussians[lag:]) > KEPT


def test_the_members_of_a_pair_are_independent(gaussians):
    """Z and W of the same eight uniforms lie half a chunk apart."""
    pairs = gaussians.view(-1, 2, secure._COLUMNS)
    z, w = pairs[:, 0].flatten(), pairs[:, 1].flatten()
    assert dependence(z, w) > KEPT
    assert shape((z + w) / math.sqrt(2)) > KEPT


def test_members_that_share_more_than_a_right_angle_are_rejected():
    """Equal radii at unrelated angles: not correlated, but large where the other is large."""
    r, θ = box_muller(4)
    _, other = box_muller(4, seed=6)
    z, w = (r * θ.cos()).sum(0) / 2, (r * other.cos()).sum(0) / 2
    assert moments(torch.cat([z, w])) > KEPT
    assert dependence(z, w) < REJECTED


def test_one_pair_gives_its_cosine_to_one_sum_and_its_sine_to_the_other():
    """With the other three radii at 0, each number is half a member of the first pair."""
    data = keystream().take(64)
    data[8:32] = bytes([0xFF]) * 24

    class Given:
        def take(self, size):
            return data[:size]

    k = integers_by_hand(data)
    radius = math.sqrt(-2 * math.log((k[0] + 1) / 2**53))
    angle = 2 * math.pi * k[4] / 2**53
    members = [radius * math.cos(angle) / 2, radius * math.sin(angle) / 2]
    assert gaussians_from(Given(), 2).tolist() == pytest.approx(members, rel=1e-12)
