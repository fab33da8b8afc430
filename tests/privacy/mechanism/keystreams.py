"""What the tests of the secure keystream share."""

import math

import torch
from scipy import stats

from defend.privacy.mechanism.secure import Keystream, label_of

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


def integers_by_hand(data):
    return [int.from_bytes(data[i : i + 8], "little") >> 11 for i in range(0, len(data), 8)]


def dependence(a, b):
    """Smallest p-value of the correlations of a and b, and of their squares."""
    pairs = [(a, b), (a.square(), b.square()), (a.square(), b), (a, b.square())]
    return min(
        2 * stats.norm.sf(abs(torch.corrcoef(torch.stack(p))[0, 1].item()) * math.sqrt(len(a)))
        for p in pairs
    )
