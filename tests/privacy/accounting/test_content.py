"""What a data set of the user's own holds, told by its attributes."""

import copy
import functools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, Subset, TensorDataset

from defend.privacy import data_digest
from defend.privacy.accounting import rows
from defend.privacy.accounting.fingerprint import identify

ROOT = Path(__file__).parents[3]
N = 6


class Own(Dataset):
    """Holds whatever it is given; no record may be asked for."""

    def __init__(self, **kept):
        vars(self).update(kept)

    def __len__(self):
        return N

    def __getitem__(self, index):
        raise AssertionError("a record was asked for")


def numbers(start=0.0):
    return torch.arange(start, start + 4 * N).reshape(N, 4)


def frame(**more):
    pandas = pytest.importorskip("pandas")
    return pandas.DataFrame({"x": np.arange(N) / 2, "name": list("abcdef"), **more})


CONTENT = {
    "tensor": Own(x=numbers()),
    "another": Own(x=numbers(1.0)),
    "array": Own(x=numbers().numpy()),
    "series of windows": Own(x=torch.arange(100.0)),
    "integers": Own(y=list(range(N))),
    "others": Own(y=list(range(1, N + 1))),
    "floats": Own(y=tuple(map(float, range(N)))),
    "strings": Own(text=list("abcdef")),
    "other strings": Own(text=list("abcdeg")),
    "cut elsewhere": Own(text=["ab", "c", "d", "e", "f", ""]),
    "records": Own(rows=[{"text": "a", "ids": [1, 2, i], "y": i} for i in range(N)]),
    "other records": Own(rows=[{"text": "a", "ids": [1, 2, i], "y": 1} for i in range(N)]),
    "pairs": Own(rows=[(torch.full((2,), i), i) for i in range(N)]),
    "other pairs": Own(rows=[(torch.full((2,), -i), i) for i in range(N)]),
    "arrays by name": Own(data={"x": numbers(), "y": torch.arange(N)}),
    "object array": Own(x=np.array([[1], [2, 3], [4], [5], [6], [7]], dtype=object)),
    "labels beside what cannot be read": Own(x=[object()] * N, y=list("aabbcc")),
    "frame": Own(frame=frame()),
    "frame with more": Own(frame=frame(z=np.ones(N))),
    "nested": Own(base=TensorDataset(numbers())),
    "nested twice": Own(base=Own(base=TensorDataset(numbers()))),
    "several nested": Own(parts=[TensorDataset(numbers()), TensorDataset(numbers(1.0))]),
    "a subset of it": Subset(Own(x=numbers()), [1, 2]),
}
SIZES = {
    "nothing": Own(),
    "no place for each record": Own(mean=[0.5, 0.5], x=torch.ones(N - 1)),
    "what cannot be read": Own(x=[object()] * N, y=torch.eye(N).to_sparse()),
    "an empty cache": Own(cache=[None] * N),
    "a half full one": Own(cache=[torch.ones(1), *[None] * (N - 1)]),
    "one by index": Own(cache={i: torch.ones(1) for i in range(N)}),
    "nested of which nothing is known": Own(base=Own()),
}


def test_other_content_has_another_digest_and_what_is_none_has_the_size():
    digests = [data_digest(dataset) for dataset in CONTENT.values()]
    assert len(set(digests)) == len(CONTENT)
    part = {n for n, digest in zip(CONTENT, digests, strict=True) if digest.startswith("part:")}
    assert part == {"integers", "others", "floats", "labels beside what cannot be read"}
    assert {digest.split(":")[0] for digest in digests} == {"sha256", "part"}
    assert {data_digest(dataset) for dataset in SIZES.values()} == {data_digest(Own())}
    assert data_digest(Own()).startswith("size:")


class Counting(Dataset):
    """Counts, remembers and changes its ways, as user code does."""

    def __init__(self):
        self.x, self.y = numbers(), list(range(N))
        self.seen, self.last = np.zeros(N), torch.zeros(N)
        self.cache, self.order, self.memory = [0.0] * N, [], {}
        self.calls, self.transform, self.target_transform = 0, torch.nn.ReLU(), None
        self.generator, self.np_generator = torch.Generator(), np.random.default_rng()
        self.halves, self.counted, self.lazy = [0.0] * N, [0] * N, None

    def __len__(self):
        return N

    @property
    def loaded(self):
        if self.lazy is None:
            self.lazy = torch.ones(N)
        return self.lazy

    @functools.cached_property
    def scaled(self):
        return self.x * 2

    @functools.lru_cache  # noqa: B019
    def _count(self, index):
        self.counted[index] = index

    def _remember(self, index, value):
        cache = self.cache
        cache[index] = float(value.sum())
        self.order.append(index)
        self.memory[index] = value

    def __getitem__(self, index):
        self.calls += 1
        self.seen[index] += 1
        self.last[index].add_(1)
        self.halves[index] = float(self.x[index].clone().mul_(0.5).sum())
        value = self.transform(self.x[index]) + torch.rand(4, generator=self.generator)
        self._remember(index, value + self.scaled[index])
        self._count(index)
        item = {}
        item["x"], item["y"] = value * self.loaded[index], self.y[index]
        return item


def test_what_is_no_content_does_not_count():
    dataset = Counting()
    fresh = data_digest(dataset)
    for index in range(N):
        dataset[index]
    assert len(dataset.order) == dataset.calls == N
    dataset.target_transform = torch.nn.Tanh()
    dataset.np_generator.random()
    assert data_digest(dataset) == data_digest(copy.deepcopy(dataset)) == fresh
    for name in ("x", "y"):  # and what is does
        changed = copy.deepcopy(dataset)
        getattr(changed, name)[0] += 1
        assert data_digest(changed) != fresh


def folder(at, names=("a/1.png", "a/2.png", "b/1.png"), size=3):
    for i, name in enumerate(names):
        (at / name).parent.mkdir(parents=True, exist_ok=True)
        (at / name).write_bytes(b"x" * (size + i))
    return [str(at / name) for name in names]


class Made(Own):
    def __init__(self, fingerprint):
        self._fingerprint = fingerprint


class Files(Own):
    def __len__(self):
        return 3


def test_files_count_by_their_names_and_sizes_wherever_they_lie(tmp_path):
    here, there = folder(tmp_path / "here/train"), folder(tmp_path / "there/deep/train")
    makers = {
        "paths": lambda names: Files(paths=[Path(n) for n in names]),
        "names": lambda names: Files(names=names),
        "image folder": lambda names: Files(
            root=os.path.commonpath(names), samples=[(n, i) for i, n in enumerate(names)],
            imgs=[(n, i) for i, n in enumerate(names)], targets=[0, 1, 2], loader=open,
        ),
        "below a root": lambda names: Files(
            root=(root := Path(os.path.commonpath(names))),
            names=[str(Path(n).relative_to(root)) for n in names],
        ),
    }  # fmt: skip
    longer = folder(tmp_path / "longer/train", size=4)
    other = folder(tmp_path / "other/train", ("a/1.png", "a/2.png", "b/3.png"))
    for make in makers.values():
        assert data_digest(make(here)) == data_digest(make(there))
        assert len({data_digest(make(names)) for names in (here, longer, other, here[::-1])}) == 4


def test_a_large_array_on_disk_is_not_read_as_a_whole(tmp_path, monkeypatch):
    found = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", shape=(3000, 2))
    found[:] = np.arange(6000).reshape(3000, 2)
    dataset = Subset(Own(x=found), [1])
    before = data_digest(dataset)
    assert before.startswith("sha256:")
    found[1] += 1  # of every second row nothing is read
    assert data_digest(dataset) == before
    found[0] += 1
    assert data_digest(dataset) != before


PROGRAM = """
from tests.privacy.accounting.test_content import CONTENT, Counting
from defend.privacy import data_digest
print([data_digest(d) for d in (*CONTENT.values(), Counting())])
"""


def test_another_process_finds_the_same():
    run = functools.partial(subprocess.run, capture_output=True, text=True, check=True, cwd=ROOT)
    found = run([sys.executable, "-c", PROGRAM], env={**os.environ, "PYTHONHASHSEED": "7"}).stdout
    assert found == f"{[data_digest(d) for d in (*CONTENT.values(), Counting())]}\n"


def shared(x):
    return Own(x=x, y=[0, 1] * 3, names=list("ababab"), mask=torch.ones(N, 9), i=list(range(N)))


ORDER = [3, 1, 5, 0, 2, 4]
SHUFFLED = {
    "tensors": lambda o, more: TensorDataset(numbers()[o], torch.tensor(o), *(m[o] for m in more)),
    "integers": lambda o, more: TensorDataset(torch.arange(N)[o], torch.arange(N).flip(0)[o]),
    "bfloat16": lambda o, more: Own(x=numbers().bfloat16()[o], **added(o, more)),
    "one number": lambda o, more: Own(x=(torch.arange(N) / 4)[o], **added(o, more)),
    "array": lambda o, more: Own(x=numbers().numpy()[o], **added(o, more)),
    "floats": lambda o, more: Own(x=[i / 2 for i in o], **added(o, more)),
    "strings": lambda o, more: Own(x=["abcdef"[i] for i in o], **added(o, more)),
    "pairs": lambda o, more: Own(x=[("abcdef"[i], 0) for i in o], **added(o, more)),
    "labelled tensors": lambda o, more: Own(x=[(torch.full((2,), i), 0) for i in o]),
    "records": lambda o, more: Own(
        x=[{"text": "abcdef"[i], "y": 0, "more": [m[i].tolist() for m in more]} for i in o]
    ),
    "frame": lambda o, more: Own(
        x=frame(**{f"c{i}": m[:, 0].numpy() for i, m in enumerate(more)}).iloc[o]
    ),
    "frame of integers": lambda o, more: Own(x=frame()[["name"]].assign(a=1).iloc[o]),
    "nested": lambda o, more: Own(base=TensorDataset(numbers()[o]), **added(o, more)),
}  # fmt: skip


def added(order, more):
    return {f"more{i}": m[order] for i, m in enumerate(more)}


@pytest.mark.parametrize("name", SHUFFLED)
def test_neither_the_order_nor_what_is_added_makes_other_data(name):
    """Teacher logits beside the records, larger than these; and the opposite: one value changed."""
    make = SHUFFLED[name]
    first = identify(make(list(range(N)), ()))
    logits = torch.randn(N, 50, generator=torch.Generator().manual_seed(0))
    assert identify(make(ORDER, ())).same_as(first) is True
    assert identify(make(ORDER, (logits,))).same_as(first) is True
    assert identify(make([0, 0, 2, 3, 4, 5], ())).same_as(first) is False


def test_files_in_another_order_are_the_same(tmp_path):
    names = folder(tmp_path / "train")
    for make in (
        lambda names: Files(names=names),
        lambda names: Files(samples=[(n, 0) for n in names], logits=torch.randn(3, 5)),
    ):
        assert identify(make(names[::-1])).same_as(identify(make(names))) is True
    longer = folder(tmp_path / "longer", size=4)
    assert identify(Files(names=longer)).same_as(identify(Files(names=names))) is False


def test_rows_that_differ_have_other_hashes_whatever_their_blocks(monkeypatch):
    x = torch.randn(64, 33, generator=torch.Generator().manual_seed(0))
    x = torch.cat([x, -x, x.flip(1), torch.where(torch.arange(33) % 2 == 0, x, -x)])
    hashes = rows.row_hashes(x)
    assert len(np.unique(hashes)) == len(x)
    assert np.array_equal(rows.row_hashes(x.numpy()), hashes)
    assert len(rows.row_hashes(torch.ones(3, 0))) == 3
    monkeypatch.setattr(rows, "_BLOCK", 700)
    assert np.array_equal(rows.row_hashes(x), hashes)


def test_whether_two_data_sets_are_the_same():
    x, y = numbers(), torch.arange(N)
    base = TensorDataset(x, y)
    named = functools.partial(identify, data_id="mine")
    same = [
        (identify(base), identify(TensorDataset(x.clone(), y))),
        (identify(base), identify(Own(base=base))),  # a wrapper
        (identify(Own(x=x)), identify(Own(x=x, y=list(range(N))))),  # with labels
        (identify(Own()), identify(Own())),
        (named(base), named(Own())),
        (identify(Made("a")), identify(Own(base=Made("a")))),
        (identify(Own(x=x, day=list("abcdef"))), identify(Own(x=x + 1, day=list("abcdef")))),
        (identify(Own(x=x)), named(Own(x=x, day=list("abcdef")))),
        (named(base), identify(base)),
        (identify(base), identify(Subset(base, torch.randperm(N)))),
        (identify(Subset(base, [1, 2])), identify(Subset(base, [2, 1]))),
        (identify(Own()), identify(base, data_id=identify(Own()).digest)),
    ]
    other = [
        (identify(base), identify(TensorDataset(x + 1, y))),  # with the same labels
        (identify(base, "yours"), named(base)),
        (identify(Own(x=x, day=list("abcdef"))), named(Own(x=x + 1, day=list("abcdef")))),
        (identify(Own()), named(Files())),
        # labels, a mask and indices that others share are none of what tells them
        *((identify(shared(x)), identify(shared(x + 1))) for x in (x, x.numpy())),
    ]
    untold = [
        (identify(Own()), identify(Files())),
        (identify(Own()), identify(base)),
        (identify(base), identify(Subset(base, [1, 2]))),
        (identify(Subset(base, [3])), identify(Subset(base, [1, 2]))),
        (identify(Made("a")), identify(Made("b"))),  # two ways that may end in the same
        (identify(Made("a")), identify(Own(base=Made("b")))),
        (identify(Own(y=[0, 1] * 3)), identify(Own(y=[1, 0] * 3))),  # labels alone
        (identify(base), identify(Subset(TensorDataset(x.flip(0), y), [1, 2]))),
    ]
    for pairs, answer in ((same, True), (other, False), (untold, None)):
        for known, here in pairs:
            assert here.same_as(known) is answer
    assert data_digest(base, "mine") == named(base).digest
    assert data_digest(base, "mine").startswith("id:")
