import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from scipy import stats

from defend import InputError
from defend.privacy import secure
from defend.privacy.secure import Keystream, gaussians_from, label_of, uniforms_from

KEY = bytes(range(32))
DRAWS = 2**21
REJECTED, KEPT = 1e-6, 1e-3


def keystream(stream=1, step=0, key=KEY):
    return Keystream(key, label_of(stream, step))


class Constant:
    """A keystream that repeats one byte."""

    def __init__(self, byte):
        self.byte = byte

    def take(self, size):
        return bytearray([self.byte]) * size


@pytest.fixture(scope="module")
def gaussians():
    return gaussians_from(keystream(), DRAWS)


@pytest.fixture(scope="module")
def uniforms():
    return uniforms_from(keystream(0), DRAWS)


# --- the bytes ---


def test_the_keystream_is_that_of_chacha20():
    label = bytes([3, 2, 1, 5, 4, 3, 2, 1])
    stream = Keystream(KEY, label)
    taken = stream.take(7) + stream.take(200) + stream.take(1)
    cipher = Cipher(ChaCha20(KEY, bytes(4) + bytes(4) + label), mode=None)
    assert bytes(taken) == cipher.encryptor().update(bytes(208))


def test_the_keystream_of_zeros_is_the_first_test_vector_of_the_rfc():
    first = Keystream(bytes(32), label_of(0, 0)).take(32)
    assert first.hex() == "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"


def test_a_long_stream_goes_on_under_another_nonce(monkeypatch):
    monkeypatch.setattr(secure, "_SEGMENT", 128)
    stream = keystream()
    taken = [bytes(stream.take(64)) for _ in range(5)]
    segments = [
        Cipher(ChaCha20(KEY, bytes(4) + i.to_bytes(4, "little") + label_of(1, 0)), mode=None)
        .encryptor()
        .update(bytes(128))
        for i in range(3)
    ]
    assert b"".join(taken) == b"".join(segments)[: 5 * 64]
    assert len(set(taken)) == 5


def test_a_segment_ends_where_the_counter_of_the_cipher_does():
    """The last block of a segment can be had, and the next has no number."""
    last = (2**32 - 1).to_bytes(4, "little")
    assert secure._SEGMENT == 2**32 * 64
    assert len(Cipher(ChaCha20(KEY, last + bytes(12)), mode=None).encryptor().update(bytes(64)))


def test_labels_can_be_read_back_so_no_two_uses_share_one():
    numbers = [0, 1, 2, 127]
    steps = [0, 1, 255, 256, 2**16, 2**32, 2**40 - 1]
    ranks = [0, 1, 255, 256, 2**16 - 1]
    seen = set()
    for stream in numbers:
        for step in steps:
            for rank in ranks:
                for seeds in (False, True):
                    label = label_of(stream, step, rank=rank, seeds=seeds)
                    assert len(label) == 8
                    assert (label[0] % 128, label[0] >= 128) == (stream, seeds)
                    assert int.from_bytes(label[1:3], "little") == rank
                    assert int.from_bytes(label[3:], "little") == step
                    seen.add(label)
    assert len(seen) == len(numbers) * len(steps) * len(ranks) * 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stream": 128, "step": 0}, r"`stream` to be in \[0, 2\^7\) .* got 128"),
        ({"stream": 1, "step": -1}, r"`step` to be in \[0, 2\^40\) .* got -1"),
        ({"stream": 1, "step": 2**40}, r"`step` to be in \[0, 2\^40\) .* got 1099511627776"),
        ({"stream": 1, "step": 0, "rank": 2**16}, r"`rank` to be in \[0, 2\^16\) .* got 65536"),
    ],
)
def test_a_number_that_does_not_fit_its_bytes_is_refused(settings, message):
    with pytest.raises(InputError, match=message):
        label_of(**settings)


def test_cryptography_is_asked_for_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.ciphers", None)
    with pytest.raises(InputError, match=r"got none. pip install 'lightning-defend\[secure\]'"):
        keystream()


def test_cryptography_comes_in_where_it_is_used():
    code = "import sys, defend.privacy; print('cryptography' in sys.modules)"
    root = Path(__file__).parents[2]
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True, text=True, check=True, cwd=root,
    )  # fmt: skip
    assert process.stdout.strip() == "False"


# --- uniforms ---


def integers_by_hand(data):
    return [int.from_bytes(data[i : i + 8], "little") >> 11 for i in range(0, len(data), 8)]


@pytest.mark.parametrize("size", [0, 1, 1000])
def test_uniforms_equal_a_loop_over_numbers(size):
    expected = [k / 2**53 for k in integers_by_hand(keystream().take(8 * size))]
    drawn = uniforms_from(keystream(), size)
    assert drawn.dtype == torch.float64
    assert drawn.tolist() == expected


def test_uniforms_reach_their_ends_and_no_further():
    assert uniforms_from(Constant(0x00), 3).tolist() == [0.0] * 3
    assert uniforms_from(Constant(0xFF), 3).tolist() == [1 - 2**-53] * 3


def test_uniforms_are_uniform(uniforms):
    assert stats.kstest(uniforms.numpy(), "uniform", method="asymp").pvalue > KEPT
    assert dependence(*uniforms.view(-1, 2).T) > KEPT
    shrunk = 0.998 * uniforms
    assert stats.kstest(shrunk.numpy(), "uniform", method="asymp").pvalue < REJECTED


def fine_mask(uniforms, q):
    """How likely is the number of records below q, among those that 24 bits leave undecided?

    They lie in the cell [j, j + 1) · 2⁻²⁴ that holds q, where a float32 knows only its lower end.
    The cell is alike for all numbers, so each one stands for a draw that fell into it.
    """
    cells = uniforms * 2**24
    within, rate = cells - cells.floor(), math.fmod(q * 2**24, 1.0)
    return stats.binomtest(int((within < rate).sum()), len(uniforms), rate).pvalue


def test_a_small_sample_rate_is_not_rounded(uniforms):
    q = 1.3e-7  # 2.18 · 2⁻²⁴
    assert fine_mask(uniforms, q) > KEPT
    assert fine_mask((uniforms * 2**24).floor() / 2**24, q) < REJECTED


@pytest.mark.parametrize("q", [0.5, 0.01, 1e-4])
def test_masks_are_binomial(uniforms, q):
    def p(rate):
        hits = (uniforms.view(-1, 2**13) < rate).sum(1)
        law = stats.binom(2**13, q)
        spread = (hits.double() - law.mean()).square().sum().item() / law.var()
        total = stats.binomtest(int(hits.sum()), DRAWS, q).pvalue
        chi2 = stats.chi2(len(hits))
        return min(total, 2 * chi2.sf(spread), 2 * chi2.cdf(spread))

    assert p(q) > KEPT
    assert p(1.5 * q) < REJECTED


# --- Gaussians ---


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


def dependence(a, b):
    """Smallest p-value of the correlations of a and b, and of their squares."""
    pairs = [(a, b), (a.square(), b.square()), (a.square(), b), (a, b.square())]
    return min(
        2 * stats.norm.sf(abs(torch.corrcoef(torch.stack(p))[0, 1].item()) * math.sqrt(len(a)))
        for p in pairs
    )


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


MEMORY = """
import torch
from defend.privacy import secure

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM"))

torch.set_num_threads(1)
def more(columns):
    secure._COLUMNS = columns
    stream = secure.Keystream(bytes(32), bytes(8))
    before = peak()
    drawn = secure.gaussians_from(stream, 2**22), secure.uniforms_from(stream, 2**22)
    return peak() - before

secure.gaussians_from(secure.Keystream(bytes(32), bytes(8)), 10)
print(more(secure._COLUMNS), more(2**30))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_a_large_draw_takes_little_more_than_its_result():
    root = Path(__file__).parents[2]
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEMORY],
        capture_output=True, text=True, check=True, cwd=root,
    )  # fmt: skip
    in_chunks, at_once = map(int, process.stdout.split())
    results = 2 * 32  # MiB
    assert in_chunks < results + 64
    assert at_once > results + 128
