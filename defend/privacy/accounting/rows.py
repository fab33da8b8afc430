"""Digests of records whatever their order: shuffled data are the same data.

A record has a hash h of 64 bits; the digest is of Σ h modulo 2⁶⁴, and of how many there are.
"""

import hashlib
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_BLOCK = 2**18  # bytes that are hashed at a time
_PRIMES = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_STEP = np.uint64(0x9E3779B97F4A7C15)

Hashes = NDArray[np.uint64]  # one for each record


def row_hashes(value: Tensor | NDArray[np.generic]) -> Hashes:
    """A hash for each row of a tensor or an array of plain values, from its bytes."""
    found = [_of_bytes(block) for block in _blocks(value)]
    return np.concatenate(found) if found else np.zeros(0, np.uint64)


def text_hashes(texts: Iterable[bytes]) -> Hashes:
    """A hash for each piece of text."""
    found = [hashlib.blake2b(text, digest_size=8).digest() for text in texts]
    return np.frombuffer(b"".join(found), dtype="<u8").astype(np.uint64)


def joined_hashes(columns: Iterable[Hashes]) -> Hashes:
    """A hash for each record, of all its columns."""
    return _of_words(np.stack(list(columns), axis=1))


def order_free(kind: str, rows: Hashes) -> str:
    """64 hexadecimal digits that do not depend on the order of the records.

    Args:
        kind: what else has to be equal.
        rows: a hash for each record.
    """
    total = int(rows.sum(dtype=np.uint64))
    return hashlib.sha256(f"rows {kind} {len(rows)} {total}".encode()).hexdigest()


def _blocks(value: Tensor | NDArray[np.generic]) -> Iterator[NDArray[np.uint8]]:
    """Some rows at a time, as bytes."""
    if isinstance(value, Tensor):
        value = value.detach().resolve_conj().resolve_neg()
        size = value.numel() * value.element_size()
    else:
        size = value.nbytes
    count = max(1, _BLOCK * len(value) // max(1, size))
    for first in range(0, len(value), count):
        rows = value[first : first + count]
        if isinstance(rows, Tensor):
            flat = rows.cpu().contiguous().flatten().view(torch.uint8).numpy()
        else:
            flat = np.frombuffer(np.ascontiguousarray(rows).tobytes(), np.uint8)
        yield flat.reshape(len(rows), flat.size // len(rows))


def _of_bytes(rows: NDArray[np.uint8]) -> Hashes:
    if rows.shape[1] == 0:
        return np.zeros(len(rows), np.uint64)
    if rows.shape[1] % 8:
        rows = np.ascontiguousarray(np.pad(rows, ((0, 0), (0, -rows.shape[1] % 8))))
    return _of_words(rows.view("<u8").astype(np.uint64, copy=False))


def _of_words(words: Hashes) -> Hashes:
    """Of rows of words: each is mixed with its place, so that neither is lost in the sum."""
    places = _mixed(np.arange(1, words.shape[1] + 1, dtype=np.uint64) * _STEP)
    mixed: Hashes = _mixed(words ^ places).sum(axis=1, dtype=np.uint64)
    return _mixed(mixed + _STEP)


def _mixed(x: Hashes) -> Hashes:
    """A permutation of 64 bits in which each bit of x turns about half of them (splitmix64)."""
    x = x.copy()
    for shift, prime in zip((30, 27), _PRIMES, strict=True):
        x ^= x >> np.uint64(shift)
        x *= prime
    x ^= x >> np.uint64(31)
    return x
