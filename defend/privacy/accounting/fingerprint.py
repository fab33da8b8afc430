"""A digest of a training set, to tell a run on other data from a run that goes on."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from defend.privacy.accounting.content import (
    Leaf,
    has_bytes,
    hashed,
    own_content,
    tensor_digest,
)

_DIGEST = re.compile(r"(sha256|size|id):[0-9a-f]{64}")
_NESTED = 8  # data sets in data sets that are looked into


def data_digest(dataset: Any, data_id: str | None = None) -> str:
    """SHA-256 of a training set's content, the same in every process and memory layout.

    Exact for `TensorDataset` (dtype, shape and values of each tensor), for data sets that name
    their own content by a `_fingerprint` (Hugging Face), and for data sets of your own that hold it
    in their attributes: tensors, arrays (of one on disk 1024 rows), frames of pandas, lists of
    numbers, strings, tensors or records of them, with a place for each record; lists of files, such
    as those of an image folder, by their names below their common folder and their sizes; other
    data sets. So are `Subset` and `ConcatDataset` of all these. What the data set keeps beside
    it, and what its `__getitem__` writes to, does not count. No record is ever asked for:
    `__getitem__` may be slow, random, or have side effects.

    *Guarantee*: none of privacy. The digest is a function of the data without noise: who knows all
    records but one can test a guess of that one. Show it only to those who may see the data.

    Args:
        dataset: any data set.
        data_id: a name for it. You promise that equal names are equal data.

    Returns:
        "sha256:" and 64 hexadecimal digits where content was found: data with another digest are
        other data. "size:" and as many where only kind and length of some part are known, so that
        equal digests need not mean equal data. "id:" and as many for a `data_id`.
    """
    return identify(dataset, data_id).digest


@dataclass(frozen=True)
class DataIdentity:
    """What is known of a training set, to tell whether another one is the same.

    Attributes:
        digest: what the ledger shows: `content`, or that of a name.
        content: "sha256:…" or "size:…".
        parts: digests of the records' content whatever is around it: wrappers, transforms. Two data
            sets that share one hold the same records.
        bases: `parts`, and those of the data sets that a `Subset` is of.
    """

    digest: str
    content: str
    parts: tuple[str, ...] = ()
    bases: tuple[str, ...] = ()

    @property
    def named(self) -> bool:
        """Whether the user gave a name."""
        return self.digest != self.content

    def same_as(self, known: "DataIdentity") -> bool | None:
        """Whether these are the data that are known already; None where that cannot be told."""
        if self.digest == known.digest:
            return True
        if self.named and known.named:
            return False
        if self.content == known.content or set(self.parts) & set(known.parts):
            return True
        if self.named:  # what can be seen differs, and the user calls it by another name
            return False
        if set(self.bases) & set(known.bases):  # subsets of one set: they may overlap
            return None
        exact = all(data.content.startswith("sha256:") for data in (self, known))
        return False if exact and not known.named else None


def identify(dataset: Any, data_id: str | None = None) -> DataIdentity:
    """What is known of a data set.

    Args:
        dataset: any data set.
        data_id: a name for it; or a digest that a ledger holds, which then is its digest.
    """
    found = _found(dataset, _NESTED)
    content = f"{'sha256' if found.exact else 'size'}:{found.digest}"
    digest = content
    if data_id is not None:
        known = _DIGEST.fullmatch(data_id) is not None
        digest = data_id if known else f"id:{hashlib.sha256(data_id.encode()).hexdigest()}"
    return DataIdentity(digest, content, found.parts, found.bases)


@dataclass(frozen=True)
class _Found:
    """Whether all of the content that can be known went in, the digest, parts and bases."""

    exact: bool
    digest: str
    parts: tuple[str, ...] = ()
    bases: tuple[str, ...] = ()


def _found(dataset: Any, depth: int) -> _Found:
    kind = type(dataset).__qualname__  # without its module: a script is `__main__` or not
    fingerprint = getattr(dataset, "_fingerprint", None)
    if isinstance(fingerprint, str):
        name = (_short(hashed([fingerprint])),)
        return _Found(True, _hash(kind, fingerprint), name, name)
    if isinstance(dataset, TensorDataset) and all(map(has_bytes, dataset.tensors)):
        digests = [tensor_digest(t) for t in dataset.tensors]
        sizes = [t.numel() * t.element_size() for t in dataset.tensors]
        part = _largest(list(zip(digests, sizes, strict=True)))
        return _Found(True, _hash(kind, *digests), part, part)
    if isinstance(dataset, Subset):
        inner = _found(dataset.dataset, depth - 1)
        indices = _indices_digest(dataset.indices)
        part = tuple(_short(hashed([indices, p])) for p in inner.parts)
        return _Found(inner.exact, _hash(kind, indices, inner.digest), part, (*part, *inner.bases))
    if isinstance(dataset, ConcatDataset):
        found = [_found(d, depth - 1) for d in dataset.datasets]
        digest = _hash(kind, *(each.digest for each in found))
        return _Found(all(each.exact for each in found), digest, *_parts_of(found))
    return _of_own(dataset, kind, depth)


def _of_own(dataset: Any, kind: str, depth: int) -> _Found:
    """A data set of the user's: what it holds for each record, and the data sets in it."""
    length = _length(dataset)
    leaves = own_content(dataset, length or 0)
    inner = {n: _found(d, depth - 1) for n, d in _nested(dataset).items()} if depth else {}
    known = {name: found for name, found in inner.items() if found.exact}
    if not leaves and not known:
        return _Found(False, _hash(kind, length))
    own = [[name, digest] for name, (digest, _) in leaves.items()]
    held = [[name, found.digest] for name, found in known.items()]
    parts, bases = _parts_of(list(known.values()))
    if not known:  # beside a nested data set, lists are indices or labels rather than records
        parts = bases = _largest(list(leaves.values()))
    return _Found(True, hashed([kind, length, own, held]), parts, bases)


def _nested(dataset: Any) -> dict[str, Any]:
    kept = getattr(dataset, "__dict__", {})
    found = {name: value for name, value in sorted(kept.items()) if _is_dataset(value)}
    for name, value in sorted(kept.items()):
        if isinstance(value, list | tuple) and value and all(map(_is_dataset, value)):
            found |= {f"{name}.{i}": each for i, each in enumerate(value)}
    return found


def _is_dataset(value: Any) -> bool:
    return isinstance(value, Dataset) or isinstance(getattr(value, "_fingerprint", None), str)


def _parts_of(found: Sequence[_Found]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    parts = dict.fromkeys(part for each in found for part in each.parts)
    bases = dict.fromkeys(base for each in found for base in each.bases)
    return tuple(parts), tuple(bases)


def _largest(leaves: Sequence[Leaf]) -> tuple[str, ...]:
    """The records themselves, rather than their labels, which other data may share."""
    return (_short(max(leaves, key=lambda leaf: leaf[1])[0]),) if leaves else ()


def _short(digest: str) -> str:
    return digest[:32]


def _hash(*parts: str | int | None) -> str:
    return hashed(parts)


def _indices_digest(indices: Sequence[int]) -> str:
    return hashlib.sha256(np.asarray(indices, dtype=np.int64).tobytes()).hexdigest()


def _length(dataset: Any) -> int | None:
    try:
        return len(dataset)
    except (TypeError, NotImplementedError):  # a stream
        return None
