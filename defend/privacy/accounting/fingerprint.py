"""A digest of a training set, to tell a run on other data from a run that goes on."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from defend.privacy.accounting.content import (
    Leaf,
    array_leaf,
    has_bytes,
    hashed,
    joined,
    own_content,
)

_DIGEST = re.compile(r"(sha256|part|size|id):[0-9a-f]{64}")
_NESTED = 8  # data sets in data sets that are looked into
_PARTS = 256  # that are kept, of frames with more columns


def data_digest(dataset: Any, data_id: str | None = None) -> str:
    """SHA-256 of a training set's content, the same in every process and memory layout.

    Exact for `TensorDataset` (dtype, shape and values of each tensor), and for data sets of your
    own that hold it in their attributes: tensors, arrays (of one on disk 1024 rows), frames of
    pandas, lists of numbers, strings, tensors or records of them, with a place for each record;
    lists of files, such as those of an image folder, by their names below their common folder and
    their sizes; other data sets. So are `Subset` and `ConcatDataset` of all these. Of data sets
    with a `_fingerprint` (Hugging Face) it is of that: how they were made. What the data set keeps
    beside it, and what its `__getitem__` writes to, does not count. No record is ever asked for:
    `__getitem__` may be slow, random, or have side effects.

    *Guarantee*: none of privacy. The digest is a function of the data without noise: who knows all
    records but one can test a guess of that one. Show it only to those who may see the data.

    Args:
        dataset: any data set.
        data_id: a name for it. You promise that equal names are equal data.

    Returns:
        "sha256:" and 64 hexadecimal digits where content was found. Its order counts; a fit is told
        of shuffled data all the same. "part:" and as many where another digest may be of the same
        data: of a `_fingerprint`, or of labels alone. "size:" and as many where only kind and
        length of some part are known, so that equal digests need not mean equal data. "id:" and as
        many for a `data_id`.
    """
    return identify(dataset, data_id).digest


@dataclass(frozen=True)
class DataIdentity:
    """What is known of a training set, to tell whether another one is the same.

    Attributes:
        digest: what the ledger shows: `content`, or that of a name.
        content: "sha256:…", "part:…" or "size:…".
        parts: digests of each piece of the records' content, in their order and whatever it is,
            and whatever is around it: wrappers, transforms. Two data sets that share one hold the
            same records.
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
        shared = len(set(self.parts) & set(known.parts))
        whole = shared > 0 and shared in (len(self.parts), len(known.parts))
        if self.content == known.content or whole:
            return True
        if shared and not self.named:  # a column of dates may be all; then a name tells
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
    kind = ("sha256" if found.proves else "part") if found.exact else "size"
    content = f"{kind}:{found.digest}"
    digest = content
    if data_id is not None:
        known = _DIGEST.fullmatch(data_id) is not None
        digest = data_id if known else f"id:{hashlib.sha256(data_id.encode()).hexdigest()}"
    # The least ones: of two long lists with much in common, the same are kept.
    parts, bases = ({*each, *found.free} for each in (found.parts, found.bases))
    kept = (tuple(sorted(each)[:_PARTS]) for each in (parts, bases))
    return DataIdentity(digest, content, *kept)


_Parts = tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]


@dataclass(frozen=True)
class _Found:
    """What was found in a data set.

    Attributes:
        exact: whether all of the content that can be known went in.
        digest: of it.
        parts: of the records in their order.
        bases: `parts`, and those of the data sets that a `Subset` is of.
        free: of the records, or of those that a `Subset` is of, whatever their order.
        proves: whether another digest means other data.
    """

    exact: bool
    digest: str
    parts: tuple[str, ...] = ()
    bases: tuple[str, ...] = ()
    free: tuple[str, ...] = ()
    proves: bool = True


def _found(dataset: Any, depth: int) -> _Found:
    kind = type(dataset).__qualname__  # without its module: a script is `__main__` or not
    fingerprint = getattr(dataset, "_fingerprint", None)
    if isinstance(fingerprint, str):  # how it was made: another way may end in the same data
        name = (_short(hashed([fingerprint])),)
        return _Found(True, _hash(kind, fingerprint), name, name, proves=False)
    if isinstance(dataset, TensorDataset) and all(map(has_bytes, dataset.tensors)):
        leaves = [array_leaf(t, len(t)) for t in dataset.tensors]
        known = [leaf for leaf in leaves if leaf is not None]
        digest = _hash(kind, *(leaf.digest for leaf in known))
        return _Found(True, digest, *_telling(known))
    if isinstance(dataset, Subset):
        return _of_subset(dataset, kind, depth)
    if isinstance(dataset, ConcatDataset):
        found = [_found(d, depth - 1) for d in dataset.datasets]
        digest = _hash(kind, *(each.digest for each in found))
        proves = all(each.proves for each in found)
        return _Found(all(e.exact for e in found), digest, *_parts_of(found), proves=proves)
    return _of_own(dataset, kind, depth)


def _of_subset(dataset: "Subset[Any]", kind: str, depth: int) -> _Found:
    inner = _found(dataset.dataset, depth - 1)
    indices = _indices_digest(dataset.indices)
    in_order = np.sort(np.asarray(dataset.indices, dtype=np.int64))
    digest = _hash(kind, indices, inner.digest)
    if np.array_equal(in_order, np.arange(_length(dataset.dataset) or 0)):  # all, shuffled
        parts, free = inner.parts, inner.free
    else:
        free = ()
        ways = dict.fromkeys((indices, _indices_digest(in_order)))
        parts = tuple(_short(hashed([way, p])) for way in ways for p in inner.parts)
    bases = (*parts, *inner.bases, *inner.free)
    return _Found(inner.exact, digest, parts, bases, free, inner.proves)


def _of_own(dataset: Any, kind: str, depth: int) -> _Found:
    """A data set of the user's: what it holds for each record, and the data sets in it."""
    length = _length(dataset)
    leaves = own_content(dataset, length or 0)
    inner = {n: _found(d, depth - 1) for n, d in _nested(dataset).items()} if depth else {}
    known = {name: found for name, found in inner.items() if found.exact}
    if not leaves and not known:
        return _Found(False, _hash(kind, length))
    own = [[name, leaf.digest] for name, leaf in leaves.items()]
    held = [[name, found.digest] for name, found in known.items()]
    telling = [leaf for leaf in leaves.values() if leaf.exact]
    # Labels or indices alone: what the records are is elsewhere, and the order may be another one.
    proves = all(found.proves for found in known.values()) and bool(known or telling)
    mine = telling if known else list(leaves.values())
    found = [*known.values(), _Found(True, "", *_telling(mine))]
    return _Found(True, hashed([kind, length, own, held]), *_parts_of(found), proves=proves)


def _nested(dataset: Any) -> dict[str, Any]:
    kept = getattr(dataset, "__dict__", {})
    found = {name: value for name, value in sorted(kept.items()) if _is_dataset(value)}
    for name, value in sorted(kept.items()):
        if isinstance(value, list | tuple) and value and all(map(_is_dataset, value)):
            found |= {f"{name}.{i}": each for i, each in enumerate(value)}
    return found


def _is_dataset(value: Any) -> bool:
    return isinstance(value, Dataset) or isinstance(getattr(value, "_fingerprint", None), str)


def _parts_of(found: Sequence[_Found]) -> _Parts:
    parts = dict.fromkeys(part for each in found for part in each.parts)
    bases = dict.fromkeys(base for each in found for base in each.bases)
    free = dict.fromkeys(part for each in found for part in each.free)
    return tuple(parts), tuple(bases), tuple(free)


def _telling(leaves: Sequence[Leaf]) -> _Parts:
    """Parts, bases and free parts: of all that tells the records; else of what is largest."""
    exact = tuple(_short(part) for leaf in leaves for part in leaf.exact)
    free = tuple(_short(part) for leaf in leaves for part in leaf.free)
    if not exact and leaves:
        whole = joined({str(i): leaf for i, leaf in enumerate(leaves)})
        largest = max(leaves, key=lambda leaf: leaf.size).digest
        exact = (_short(largest), *(() if whole is None else map(_short, whole.exact)))
        free = () if whole is None else tuple(map(_short, whole.free))
    return exact, exact, free


def _short(digest: str) -> str:
    return digest[:32]


def _hash(*parts: str | int | None) -> str:
    return hashed(parts)


def _indices_digest(indices: Sequence[int] | NDArray[np.int64]) -> str:
    return hashlib.sha256(np.asarray(indices, dtype=np.int64).tobytes()).hexdigest()


def _length(dataset: Any) -> int | None:
    try:
        return len(dataset)
    except (TypeError, NotImplementedError):  # a stream
        return None
