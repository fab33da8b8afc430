"""Noise and masks from a cryptographic keystream, with Gaussians that rounding does not betray.

An ordinary generator is fast and looks random, yet its state follows from enough of its output. A
keystream of ChaCha20 cannot be told from random bits by anyone who lacks the 256-bit key, however
much of it is known. The package `cryptography` computes it and comes in only where it is used.
"""

import math
from typing import Any

import torch
from torch import Tensor

from defend.errors import InputError

# A Gaussian takes 32 bytes of keystream. A chunk of 2¹⁶ of them takes 2 MiB, and some 15 MiB with
# the intermediate results, however large the tensor is. On an idle machine 2¹³ to 2¹⁷ are about
# as fast; on a busy one fewer chunks are better, as torch's threads wait for each other less often.
_COLUMNS = 2**15
_SEGMENT = 2**38  # bytes that a nonce gives: 2³² blocks of 64
_BITS = 53
_ULP = 2.0**-_BITS


class Keystream:
    """The bytes of ChaCha20 (RFC 8439) under one key and one label, in order, each given out once.

    The nonce has 12 bytes: 4 count segments of 2³⁸ bytes, so that a stream never runs into the end
    of the cipher's 32-bit block counter, and 8 are the label.

    Args:
        key: 32 secret bytes.
        label: 8 bytes, from `label_of`. Two streams under one key need two labels.

    Raises:
        InputError: if the package `cryptography` is not installed.
    """

    def __init__(self, key: bytes, label: bytes) -> None:
        self._cipher, self._chacha20 = require_cryptography()
        self._key, self._label = key, label
        self._open(segment=0)

    def take(self, size: int) -> bytearray:
        """The next `size` bytes, at most 2³⁸; what is left of a segment too short is skipped."""
        if size > self._left:
            self._open(self._segment + 1)
        self._left -= size
        stream = bytearray(size)
        self._encryptor.update_into(bytes(size), stream)  # the keystream is what zeros turn into
        return stream

    def _open(self, segment: int) -> None:
        self._segment, self._left = segment, _SEGMENT
        nonce = segment.to_bytes(4, "little") + self._label
        algorithm = self._chacha20(self._key, bytes(4) + nonce)  # the counter of blocks, from 0
        self._encryptor = self._cipher(algorithm, mode=None).encryptor()


def label_of(stream: int, step: int, *, rank: int = 0, seeds: bool = False) -> bytes:
    """The label of one use of a key: 1 byte for stream and `seeds`, 2 for rank, 5 for step.

    Args:
        stream: number of the stream, in [0, 128).
        step: number of the step, in [0, 2⁴⁰).
        rank: the process, in [0, 2¹⁶).
        seeds: True where the bytes fill another generator, False where they are the numbers.

    Returns:
        8 bytes.

    Raises:
        InputError: for a number that does not fit its bytes.

    *Guarantees.* Different arguments give different labels, so no keystream is ever used twice.
    """
    # Each number has bytes of its own, and one that does not fit is refused, not cut: the numbers
    # can be read back from the label, and two uses that differ cannot share it.
    for name, number, bits in (("stream", stream, 7), ("step", step, 40), ("rank", rank, 16)):
        if not 0 <= number < 2**bits:
            raise InputError(
                f"Expected `{name}` to be in [0, 2^{bits}) with secure noise, got {number}. "
                "Count from 0; a number that does not fit its bytes would repeat noise."
            )
    use = stream + 128 * seeds
    return use.to_bytes(1, "little") + rank.to_bytes(2, "little") + step.to_bytes(5, "little")


def uniforms_from(keystream: Keystream, size: int) -> Tensor:
    """Numbers k · 2⁻⁵³ with k uniform in {0, …, 2⁵³ − 1}.

    Args:
        keystream: where the bits come from, 8 bytes a number.
        size: how many, ≥ 0.

    Returns:
        float64 on the CPU, shape `[size]`, in [0, 1).

    *Guarantees.* No rounding: `u < q` has probability ⌈q · 2⁵³⌉ · 2⁻⁵³.
    """
    uniforms = torch.empty(size, dtype=torch.float64)
    for part in uniforms.split(8 * _COLUMNS):
        part.copy_(_integers(keystream, part.numel())).mul_(_ULP)
    return uniforms


def gaussians_from(keystream: Keystream, size: int) -> Tensor:
    """Standard normals, each half the sum of four independent ones.

    With u in (0, 1] and v in [0, 1), eight uniforms for each two numbers,

        Z = ½ Σₖ √(−2 ln uₖ) cos 2πvₖ        W = ½ Σₖ √(−2 ln uₖ) sin 2πvₖ        k = 1, …, 4

    A single Box-Muller number in floating point takes some values and never others, which may tell
    what it was added to. With sums of four, whoever holds both Z and W would have to search the
    values of six uniforms of 53 bits to learn whether the two could have come up.

    Args:
        keystream: where the bits come from, 32 bytes a number.
        size: how many, ≥ 0. Of an odd number's last pair, W is thrown away.

    Returns:
        float64 on the CPU, shape `[size]`.

    *Guarantees.* The numbers are independent, Z from W too, and N(0, 1) but for the 53 bits of the
    uniforms and the rounding of float64; none exceeds 2√(106 ln 2) < 17.2, beyond which N(0, 1)
    has a mass below 1e-65. That rounding gives nothing away rests on the cost of the search; it is
    not a proof.

    Source: Holohan & Braghin 2021, arXiv 2107.10138, with n = 2 (2n numbers in a sum, as each
    shares its uniforms with another).
    """
    gaussians = torch.empty(size, dtype=torch.float64)
    for part in gaussians.split(2 * _COLUMNS):
        columns = (part.numel() + 1) // 2
        integers = _integers(keystream, 8 * columns).double().view(8, columns)
        # u = (k + 1) · 2⁻⁵³ is never 0, and exact: k + 1 ≤ 2⁵³.
        radii = integers[:4].add_(1).mul_(_ULP).log_().mul_(-2).sqrt_()
        angles = integers[4:].mul_(2 * math.pi * _ULP)
        # The cosines of four pairs in one sum, their sines in the other. Cosine and sine of a pair
        # are independent, hence Z and W are. In one sum they would be independent as well, but
        # of no use: r cos θ + r sin θ = √2 r cos(θ − π/4) is a single Box-Muller number again.
        part[:columns] = (radii * angles.cos()).sum(0).div_(2)
        part[columns:] = (radii * angles.sin()).sum(0).div_(2)[: part.numel() - columns]
    return gaussians


def require_cryptography() -> tuple[Any, Any]:
    """`Cipher` and `ChaCha20` of the package `cryptography`.

    Raises:
        InputError: if it is not installed.
    """
    try:
        from cryptography.hazmat.primitives.ciphers import Cipher
        from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
    except ImportError as error:
        raise InputError(
            "Expected the package `cryptography` for secure noise, got none. "
            "pip install 'lightning-defend[secure]'"
        ) from error
    return Cipher, ChaCha20


def _integers(keystream: Keystream, size: int) -> Tensor:
    """Uniform integers in [0, 2⁵³): the upper bits of 8 bytes each."""
    if size == 0:
        return torch.empty(0, dtype=torch.int64)
    words = torch.frombuffer(keystream.take(8 * size), dtype=torch.int64)
    # The shift repeats the sign; the mask takes it off.
    return words.bitwise_right_shift_(64 - _BITS).bitwise_and_(2**_BITS - 1)
