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
from defend.privacy.mechanism import secure
from defend.privacy.mechanism.secure import Keystream, label_of, uniforms_from

from .keystreams import (
    DRAWS,
    KEPT,
    KEY,
    REJECTED,
    Constant,
    dependence,
    integers_by_hand,
    keystream,
)

# --- the bytes ------------------------------------------------------------------------------------


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
    root = Path(__file__).parents[3]
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True, text=True, check=True, cwd=root,
    )  # fmt: skip
    assert process.stdout.strip() == "False"


# --- uniforms -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uniforms():
    return uniforms_from(keystream(0), DRAWS)


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


# --- memory ---------------------------------------------------------------------------------------


MEMORY = """
import torch
from defend.privacy.mechanism import secure

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
    root = Path(__file__).parents[3]
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEMORY],
        capture_output=True, text=True, check=True, cwd=root,
    )  # fmt: skip
    in_chunks, at_once = map(int, process.stdout.split())
    results = 2 * 32  # MiB
    assert in_chunks < results + 64
    assert at_once > results + 128
