"""The digest of a batch: it changes with whatever a step would see."""

import dataclasses
import enum

import numpy as np
import pytest
import torch

from defend.batching.digest import digest, same

CHANGES = {
    "a value": lambda b: b[0][1, 2].add_(1e-6),
    "behind the version": lambda b: b[0].data[5, 0].mul_(1.5),
    "rows": lambda b: b[0].copy_(b[0].flip(0)),
    "labels": lambda b: b[1].copy_(b[1].flip(0)),
    "a flag": lambda b: b[2]["flags"][3].logical_not_(),
    "another tensor": lambda b: b.__setitem__(0, b[0] + 1),
    "a name": lambda b: b[2]["names"].__setitem__(0, "c"),
    "an array": lambda b: b[2]["array"].__setitem__(1, 7),
    "one more field": lambda b: b.append(torch.zeros(6)),
    "another shape": lambda b: b.__setitem__(0, b[0][:, :2]),
    "another dtype": lambda b: b.__setitem__(1, b[1].int()),
}


def batch(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(6, 3, generator=generator).to(dtype),
        torch.arange(6),
        {
            "flags": torch.arange(6) % 2 == 0,
            "names": ["a", "b"],
            "array": torch.arange(6).numpy().copy(),
            "empty": torch.zeros(6, 0),
            "number": torch.tensor(3.0),
        },
    ]


@pytest.mark.parametrize("name", CHANGES)
def test_the_digest_sees_a_change(name):
    held = batch()
    before = digest(held)
    assert same(before, digest(held))
    assert same(before, digest(batch()))  # of content, not of memory
    CHANGES[name](held)
    assert not same(before, digest(held))


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.int8, torch.bool],
)
def test_the_digest_of_any_dtype(dtype):
    x = batch()[0].to(dtype)
    for columns in (3, 2, 1):
        before = digest(x[:, :columns])
        changed = x[:, :columns].clone()
        changed[4, 0] = 1 - changed[4, 0].float() if dtype is torch.bool else changed[4, 0] + 1
        assert same(before, digest(x[:, :columns].clone()))
        assert not same(before, digest(changed))


def test_what_batches_may_hold_besides():
    @dataclasses.dataclass(slots=True)
    class Slotted:
        x: torch.Tensor

    class Split(enum.Enum):
        TRAIN = 1

    whole = torch.arange(40, dtype=torch.float32)
    held = [
        torch.zeros(0, 4), torch.zeros(0), torch.tensor(2), torch.zeros(3, 0, 2), Split.TRAIN,
        float("nan"), Slotted(whole[:4]), np.arange(6)[::-1], np.arange(3, dtype=">i4"), object(),
        whole[1:7], whole[3:33].view(3, 10), None, np.array(["a"]), torch.eye(2).to_sparse(),
    ]  # fmt: skip
    before = digest(held)
    assert same(before, digest(held))
    whole[5] += 1
    assert not same(before, digest(held))
