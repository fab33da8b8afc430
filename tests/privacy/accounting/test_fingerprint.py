import hashlib
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset, TensorDataset

from defend.privacy.accounting.fingerprint import data_digest

ROOT = Path(__file__).parents[3]


def tensors(dtype=torch.float32):
    x = torch.arange(24).reshape(6, 4).to(dtype)
    return x, torch.arange(6)


class Untouchable(Dataset):
    """Its records cost too much to look at."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        raise AssertionError("a record was asked for")


class HuggingFaceLike(Untouchable):
    def __init__(self, fingerprint):
        super().__init__(5)
        self._fingerprint = fingerprint


class Stream(IterableDataset):
    def __iter__(self):
        raise AssertionError("a record was asked for")


class Normalized(TensorDataset):
    def __getitem__(self, index):
        raise AssertionError("a record was asked for")


DATASETS = {
    "tensors": TensorDataset(*tensors()),
    "another dtype": TensorDataset(*tensors(torch.float64)),
    "bfloat16": TensorDataset(*tensors(torch.bfloat16)),
    "float16": TensorDataset(*tensors(torch.float16)),
    "bool": TensorDataset(*tensors(torch.bool)),
    "complex": TensorDataset(*tensors(torch.complex64)),
    "another shape": TensorDataset(tensors()[0].reshape(6, 2, 2), tensors()[1]),
    "another order": TensorDataset(*reversed(tensors())),
    "fewer tensors": TensorDataset(tensors()[0]),
    "other records": TensorDataset(tensors()[0] + 1, tensors()[1]),
    "other order of records": TensorDataset(tensors()[0].flip(0), tensors()[1]),
    "empty": TensorDataset(torch.empty(0, 4)),
    "another empty": TensorDataset(torch.empty(0, 5)),
    "subclass": Normalized(*tensors()),
    "subset": Subset(TensorDataset(*tensors()), [0, 2]),
    "another subset": Subset(TensorDataset(*tensors()), [2, 0]),
    "nested subset": Subset(Subset(TensorDataset(*tensors()), [0, 1, 2]), [0, 2]),
    "two": ConcatDataset([TensorDataset(*tensors()), TensorDataset(*tensors())]),
    "three": ConcatDataset([TensorDataset(*tensors())] * 3),
    "nested two": ConcatDataset([ConcatDataset([TensorDataset(*tensors())] * 2)]),
    "a list": [0.5, 2, 3],
}
PARTS = {
    "fingerprint": HuggingFaceLike("0123abcd"),
    "another fingerprint": HuggingFaceLike("0123abce"),
    "subset of a fingerprint": Subset(HuggingFaceLike("0123abcd"), [1]),
    "a list of labels": [1, 2, 3],
}
SIZES = {
    "five": Untouchable(5),
    "six": Untouchable(6),
    "subset": Subset(Untouchable(5), [1, 2]),
    "another subset": Subset(Untouchable(5), [1, 3]),
    "concatenated": ConcatDataset([Untouchable(5), TensorDataset(*tensors())]),
    "stream": Stream(),
    "no fingerprint": HuggingFaceLike(None),
    "sparse": TensorDataset(torch.eye(3).to_sparse()),
    "meta": TensorDataset(torch.empty(4, device="meta")),
}


def test_other_content_has_another_digest():
    for kind, datasets in (("sha256", DATASETS), ("part", PARTS), ("size", SIZES)):
        digests = [data_digest(dataset) for dataset in datasets.values()]
        assert len(set(digests)) == len(datasets)
        for name, digest in zip(datasets, digests, strict=True):
            prefix, number = digest.split(":")
            assert prefix == kind, name
            assert len(bytes.fromhex(number)) == 32


def test_every_element_counts():
    x, y = tensors()
    seen = {data_digest(TensorDataset(x, y))}
    for i in range(x.numel()):
        changed = x.clone()
        changed.view(-1)[i] = torch.nextafter(changed.view(-1)[i], torch.tensor(100.0))
        seen.add(data_digest(TensorDataset(changed, y)))
    assert len(seen) == 1 + x.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.complex64])
def test_the_layout_in_memory_does_not_count(dtype):
    x = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5).to(dtype)
    wide = torch.zeros(2, 3, 4, 10, dtype=dtype)
    wide[..., ::2] = x
    layouts = {
        "plain": x,
        "channels last": x.contiguous(memory_format=torch.channels_last),
        "transposed": x.transpose(0, 3).contiguous().transpose(0, 3),
        "every other": wide[..., ::2],
        "offset": torch.cat([x, x])[2:],
        "gradient": x.clone().requires_grad_() if x.is_floating_point() else x,
        "conjugated twice": x.conj().resolve_conj().conj(),
    }
    assert len({data_digest(TensorDataset(t)) for t in layouts.values()}) == 1
    assert data_digest(TensorDataset(x[:1].expand(2, 3, 4, 5))) == data_digest(
        TensorDataset(torch.cat([x[:1], x[:1]]))
    )


def test_lazy_conjugates_and_negatives_are_resolved():
    x = torch.complex(torch.arange(4.0), torch.arange(4.0) + 1)
    assert data_digest(TensorDataset(x.conj())) == data_digest(
        TensorDataset(torch.complex(x.real, -x.imag))
    )
    assert data_digest(TensorDataset(x.conj().imag)) == data_digest(
        TensorDataset(-(x.imag.clone()))
    )
    assert data_digest(TensorDataset(x.conj())) != data_digest(TensorDataset(x))


def test_blocks_do_not_count(monkeypatch):
    from defend.privacy.accounting import content

    dataset = TensorDataset(torch.arange(1000.0).reshape(100, 10).t())
    whole = data_digest(dataset)
    for block in (1, 7, 100, 999):
        monkeypatch.setattr(content, "_BLOCK", block)
        assert data_digest(dataset) == whole


def test_indices_count_by_value_not_by_type():
    inner = TensorDataset(*tensors())
    kinds = [[1, 3, 5], (1, 3, 5), range(1, 6, 2), np.array([1, 3, 5]), torch.tensor([1, 3, 5])]
    assert len({data_digest(Subset(inner, kind)) for kind in kinds}) == 1


def test_equal_sizes_of_unknown_content_are_the_same():
    assert data_digest(Untouchable(5)) == data_digest(Untouchable(5))


PROGRAM = """
import torch
from torch.utils.data import ConcatDataset, Subset, TensorDataset
from defend.privacy.accounting.fingerprint import data_digest
x = torch.arange(24.0).reshape(6, 4)
data = TensorDataset(x, x.bfloat16(), torch.arange(6))
print(data_digest(ConcatDataset([Subset(data, range(3)), data])))
"""


def test_another_process_finds_the_same(capsys):
    exec(PROGRAM, {})
    here = capsys.readouterr().out
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert run.stdout == here
    assert here.startswith("sha256:")


def test_the_format_is_the_one_that_old_ledgers_hold():
    def sha(data):
        return hashlib.sha256(data).hexdigest()

    x = sha(b'["torch.float32", [1, 2]]' + struct.pack("<2f", 1.0, 2.0))
    y = sha(b'["torch.int64", [1]]' + struct.pack("<q", 3))
    data = TensorDataset(torch.tensor([[1.0, 2.0]]), torch.tensor([3]))
    inner = sha(f'["TensorDataset", "{x}", "{y}"]'.encode())
    assert data_digest(data) == f"sha256:{inner}"
    indices = sha(struct.pack("<2q", 0, 0))
    outer = sha(f'["Subset", "{indices}", "{inner}"]'.encode())
    assert data_digest(Subset(data, [0, 0])) == f"sha256:{outer}"
    assert data_digest(Untouchable(2)) == "size:" + sha(b'["Untouchable", 2]')
