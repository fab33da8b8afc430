"""Per-record gradients, and the slow and obvious way to them: each record in a batch of its own."""

import math

import torch
import torch.nn.functional as F

from defend.privacy.gradients.per_record import PerRecordGradients
from tests.reference.dpsgd import clipped_sum

T = 4  # positions; also one of the batch sizes, so that the two may be mixed up
ROWS = (1, 2, T, 7)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def loss(module, x, y):
    return F.cross_entropy(module(x).flatten(1), y)


def each_alone(module, x, y):
    """gᵢ from record i in a batch of its own, `[rows, *shape]` for each parameter."""
    alone = [
        clipped_sum(
            module, lambda a, b: loss(module, a, b), [(x[i : i + 1], y[i : i + 1])], math.inf
        )
        for i in range(len(x))
    ]
    return [torch.stack(g) for g in zip(*alone, strict=True)]


def together(module, x, y, expect=True):
    per_record = PerRecordGradients(module)
    try:
        if expect:
            per_record.expect(len(x))
        loss(module, x, y).backward()
        return per_record.read(len(x))
    finally:
        per_record.remove()


def inputs(kind, rows):
    generator = torch.Generator().manual_seed(rows)
    if kind == "ids":
        return torch.randint(0, 5, (rows, T), generator=generator)
    shape = {
        "vector": (6,),
        "sequence": (T, 6),
        "signal": (4, 9),
        "image": (4, 7, 6),
        "volume": (2, 4, 4, 3),
    }
    return torch.randn(rows, *shape[kind], generator=generator)


def targets(rows):
    return torch.arange(rows) % 3


def check_equal(module, x, **settings):
    y = targets(len(x))
    expected = each_alone(module, x, y)
    for found, wanted in zip(together(module, x, y, **settings), expected, strict=True):
        torch.testing.assert_close(found, wanted, **CLOSE)
    assert sum(float(g.norm()) for g in expected) > 0
