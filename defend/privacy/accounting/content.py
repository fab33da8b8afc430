"""What the records of a user's own data set are made of, as far as its attributes hold it.

Two things are told from each other: content (features, labels, names of files) and all that a data
set keeps beside it (transforms, generators, counters, caches). Content has a place for each record;
what the data set's own `__getitem__` writes to is no content, however it looks.
"""

import ast
import functools
import hashlib
import inspect
import json
import os
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from defend.privacy.accounting.rows import (
    Hashes,
    joined_hashes,
    order_free,
    row_hashes,
    text_hashes,
)

_BLOCK = 2**24  # elements that are copied at a time
_FILES = 100_000  # whose sizes are looked up, evenly spread over longer lists
_ROWS = 1024  # that are read of an array that lies on disk
_LINES = 10_000  # of a list that are written out at a time
_WHOLE = 2**53  # up to which a float holds every whole number
_DEPTH = 6  # of containers in containers
_WRITERS = {"append", "extend", "insert", "update", "setdefault", "add", "pop", "remove", "put"}


@dataclass(frozen=True, eq=False)
class Leaf:
    """One piece of content.

    Attributes:
        digest: of all values, in their order.
        size: in bytes or so.
        rows: a hash for each record; None where only some were read.
        exact: digests, in their order, of what tells these records from others: features, names of
            files. Labels do not, nor what is the same for all records.
        free: digests of the same, whatever their order.
    """

    digest: str
    size: int
    rows: Hashes | None = None
    exact: tuple[str, ...] = ()
    free: tuple[str, ...] = ()


def leaf_of(digest: str, size: int, kind: str, rows: Hashes, *, tells: bool) -> Leaf:
    """A leaf, and whether it tells its records from others, if they are not all the same."""
    if not tells or len(rows) == 0 or bool(np.all(rows == rows[0])):
        return Leaf(digest, size, rows)
    return Leaf(digest, size, rows, (digest,), (order_free(kind, rows),))


def own_content(dataset: Any, records: int) -> dict[str, Leaf]:
    """Attribute → digest and size of what it holds for each record; empty where nothing does.

    Args:
        dataset: an object of a class of the user's, or a list of records.
        records: its length.
    """
    if isinstance(dataset, list | tuple):
        found = content(dataset, records)
        return {} if found is None else {"": found}
    kept = getattr(dataset, "__dict__", {})
    written = _written_names(type(dataset))
    root = kept.get("root")
    leaves = {
        name: content(value, records, root if isinstance(root, str | PurePath) else None)
        for name, value in sorted(kept.items())
        if name not in written
    }
    return {name: leaf for name, leaf in leaves.items() if leaf is not None}


def content(value: Any, records: int, root: str | PurePath | None = None) -> Leaf | None:
    """The digest of a value that holds content for `records` records; None for any other.

    Tensors and arrays may be longer (windows over a series); lists, tuples and frames have a place
    for each record; a dict holds such values under names.
    """
    if records < 1:
        return None
    if isinstance(value, Tensor | np.ndarray):
        return array_leaf(value, records) if value.ndim and len(value) >= records else None
    if isinstance(value, list | tuple):
        return _of_column(value, root) if len(value) == records else None
    if hasattr(value, "iloc") and hasattr(value, "to_numpy"):  # a frame or a series of pandas
        return _of_frame(value, records)
    if isinstance(value, dict) and value and all(isinstance(key, str) for key in value):
        return joined({key: content(value[key], records, root) for key in sorted(value)})
    return None


def joined(leaves: Mapping[str, Leaf | None]) -> Leaf | None:
    """One leaf for several, under their names; None where there is none."""
    found = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    if not found:
        return None
    digest = hashed([[name, leaf.digest] for name, leaf in found.items()])
    exact = tuple(part for leaf in found.values() for part in leaf.exact)
    free = tuple(part for leaf in found.values() for part in leaf.free)
    size, rows = sum(leaf.size for leaf in found.values()), _joined_rows(found)
    if exact or rows is None:
        return Leaf(digest, size, rows, exact, free)
    return leaf_of(digest, size, " ".join(found), rows, tells=len(found) > 1)


def _joined_rows(found: Mapping[str, Leaf]) -> Hashes | None:
    rows = [leaf.rows for leaf in found.values() if leaf.rows is not None]
    whole = len(rows) == len(found) and len({len(each) for each in rows}) == 1
    return joined_hashes(rows) if whole else None


def hashed(parts: Any) -> str:
    """SHA-256 of plain data."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


# --- numbers ------------------------------------------------------------------------------------


def has_bytes(tensor: Tensor) -> bool:
    """Whether the values lie in plain memory: not sparse, quantized or without any."""
    return (
        tensor.layout is torch.strided and not tensor.is_quantized and tensor.device.type != "meta"
    )


def tensor_digest(tensor: Tensor) -> str:
    """Of dtype, shape, and the bytes of the values in row-major order, in blocks of rows."""
    sha = hashlib.sha256(json.dumps([str(tensor.dtype), list(tensor.shape)]).encode())
    tensor = tensor.detach().resolve_conj().resolve_neg()
    tensor = tensor.reshape(1) if tensor.dim() == 0 else tensor
    rows = max(1, _BLOCK * len(tensor) // max(1, tensor.numel()))
    for block in tensor.split(rows):
        # As bytes: numpy has no bfloat16.
        values = block.cpu().contiguous().flatten().view(torch.uint8)
        sha.update(values.numpy())
    return sha.hexdigest()


def array_leaf(value: Tensor | np.ndarray, records: int) -> Leaf | None:
    """The leaf of a tensor or an array that has a place, or more, for each record."""
    if isinstance(value, Tensor):
        if not has_bytes(value):
            return None
        size, digest = value.numel() * value.element_size(), tensor_digest(value)
        width = value.numel() // max(1, records)
    elif value.dtype == object:
        return _of_column(value.tolist(), None)
    elif isinstance(value, np.memmap):  # on disk: its shape, and rows from all over it
        rows = np.ascontiguousarray(value[:: max(1, len(value) // _ROWS)])
        digest = hashed([str(value.dtype), value.shape, _array_digest(rows)])
        return Leaf(digest, value.nbytes, None, (digest,) if value.size > records else ())
    else:
        size, digest, width = value.nbytes, _array_digest(value), value.size // max(1, records)
    hashes = row_hashes(value)
    kind = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape[1:])}"
    return leaf_of(digest, size, kind, hashes, tells=width > 1 or _are_measured(value, hashes))


def _are_measured(value: Tensor | np.ndarray, rows: Hashes) -> bool:
    """Whether single values are more than classes: fractions, or many strings or dates."""
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            return False
        values = value.detach().double()
        return bool(torch.any(values != values.round()))
    if value.dtype.kind in "biu":
        return False
    if value.dtype.kind in "fc":
        return bool(np.any(value != np.round(value)))
    return _differ(rows)


def _differ(rows: Hashes) -> bool:
    """Whether most records have a value of their own, as classes have not."""
    return 2 * len(np.unique(rows)) > len(rows)


def _array_digest(array: np.ndarray) -> str:
    sha = hashlib.sha256(json.dumps([str(array.dtype), array.shape]).encode())
    rows = max(1, _BLOCK * len(array) // max(1, array.size)) if array.ndim else 1
    blocks = [array[i : i + rows] for i in range(0, len(array), rows)] if array.ndim else [array]
    for block in blocks:
        sha.update(np.ascontiguousarray(block).tobytes())
    return sha.hexdigest()


# --- lists --------------------------------------------------------------------------------------


def _of_frame(frame: Any, records: int) -> Leaf | None:
    if len(frame) != records:
        return None
    if not hasattr(frame, "columns"):
        return array_leaf(frame.to_numpy(), records)
    columns = {str(name): frame[name] for name in frame.columns}
    return joined({n: array_leaf(column.to_numpy(), records) for n, column in columns.items()})


def _of_column(values: Sequence[Any], root: str | PurePath | None) -> Leaf | None:
    """A list with one value for each record: names, numbers, files, or records of all of these."""
    widths = {len(v) if isinstance(v, tuple) else None for v in values}
    if len(widths) == 1 and (width := widths.pop()):  # (path, label): a column each
        columns = [[value[i] for value in values] for i in range(width)]
        leaves = [_of_column(column, root) for column in columns]
        if None in leaves:
            return _of_plain(values)
        return joined({str(i): leaf for i, leaf in enumerate(leaves)})
    if all(isinstance(value, str | PurePath) for value in values):
        files = _files([os.fspath(value) for value in values], root)
        return _of_plain(list(map(str, values))) if files is None else files
    return _of_plain(values)


def _files(names: list[str], root: str | PurePath | None) -> Leaf | None:
    """Names below their common folder, and sizes of the files; None if they are no files."""
    if not names or not os.path.isfile(_below(root, names[0])):  # noqa: PTH113
        return None
    names = [os.path.abspath(_below(root, name)) for name in names]  # noqa: PTH100
    common = os.path.commonpath([os.path.dirname(name) for name in names])  # noqa: PTH120
    below = [os.path.relpath(name, common).replace(os.sep, "/") for name in names]
    every = -(-len(names) // _FILES)
    sizes = [_size(name) for name in names[::every]]
    digest = hashed(["files", below, sizes])
    if every > 1:  # the same ones in whatever order
        sizes, below = [_size(os.path.join(common, n)) for n in sorted(below)[::every]], below  # noqa: PTH118
    texts = (
        (os.fsencode(n) for n in below)
        if every > 1
        else (os.fsencode(f"{n} {s}") for n, s in zip(below, sizes, strict=True))
    )
    return leaf_of(digest, sum(sizes) * every, "files", text_hashes(texts), tells=True)


def _below(root: str | PurePath | None, name: str) -> str:
    if root is None or os.path.isfile(name):  # noqa: PTH113
        return name
    return os.path.join(root, name)  # noqa: PTH118


def _size(name: str) -> int:
    try:
        return os.stat(name).st_size  # noqa: PTH116  # a `Path` takes as long as the look itself
    except OSError:
        return -1


def _of_plain(values: Sequence[Any]) -> Leaf | None:
    """Anything made of numbers, strings, tensors and arrays; None where something else is in it.

    None too where there is no value for some record: a cache that is not full yet.
    """
    if any(value is None for value in values):
        return None
    sha, size = hashlib.sha256(), 0
    for first in range(0, len(values), _LINES):
        block = values[first : first + _LINES]
        try:
            text = json.dumps(block).encode()  # ten times as fast
        except (TypeError, ValueError, RecursionError):
            try:
                text = b"".join(_tokens(block, _DEPTH))
            except TypeError:
                return None
        sha.update(text)
        size += len(text)
    return _with_parts(values, sha.hexdigest(), size)


def _with_parts(values: Sequence[Any], digest: str, size: int) -> Leaf:
    """The leaf of a list; of records that are dicts, what tells them is in their values."""
    keys = {
        tuple(sorted(v)) if isinstance(v, dict) and all(map(_is_text, v)) else None for v in values
    }
    if len(keys) == 1 and (names := keys.pop()):
        columns = {name: _of_column([value[name] for value in values], None) for name in names}
        whole = joined(columns)
        rows, exact, free = (
            (None, (), ()) if whole is None else (whole.rows, whole.exact, whole.free)
        )
        return Leaf(digest, size, rows, exact, free)
    if all(isinstance(v, float) or (isinstance(v, int) and abs(v) < _WHOLE) for v in values):
        numbers = np.asarray(values, dtype=np.float64)
        rows = row_hashes(numbers)
        return leaf_of(digest, size, "numbers", rows, tells=_are_measured(numbers, rows))
    rows = text_hashes(map(_text, values))
    return leaf_of(
        digest, size, "items", rows, tells=not all(map(_is_text, values)) or _differ(rows)
    )


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _text(value: Any) -> bytes:
    try:
        return json.dumps(value).encode()
    except (TypeError, ValueError, RecursionError):
        return b"".join(_tokens(value, _DEPTH))


def _tokens(value: Any, depth: int) -> Iterator[bytes]:
    """A value as bytes that no other value has.

    Raises:
        TypeError: for a value that is no content.
    """
    if value is None or isinstance(value, str | int | float | bytes | PurePath | np.generic):
        plain = value.item() if isinstance(value, np.generic) else value
        text = str(plain) if isinstance(plain, PurePath) else repr(plain)
        yield f"{len(text)}:{text}".encode()
    elif isinstance(value, Tensor | np.ndarray):
        digest = _plain_digest(value if value.ndim else value.reshape(1))
        if digest is None:
            raise TypeError
        yield f"a:{digest}".encode()
    elif isinstance(value, list | tuple | dict) and depth:
        items: Iterable[Any] = value.items() if isinstance(value, dict) else value
        yield f"{type(value).__name__}{len(value)}[".encode()
        for item in items:
            yield from _tokens(item, depth - 1)
    else:
        raise TypeError


def _plain_digest(value: Tensor | np.ndarray) -> str | None:
    """Of one array among many: nothing else is needed of it."""
    if isinstance(value, Tensor):
        return tensor_digest(value) if has_bytes(value) else None
    if value.dtype == object or isinstance(value, np.memmap):
        leaf = array_leaf(value, len(value))
        return None if leaf is None else leaf.digest
    return _array_digest(value)


# --- what a data set writes to ------------------------------------------------------------------


def _written_names(kind: type[Any]) -> set[str]:
    """Attributes that a class writes to where it gives records: counters and caches.

    Found in the source of `__getitem__`, and of the methods that it names; where there is no source
    to be read, only cached properties are found.
    """
    members = {name: value for each in kind.__mro__ for name, value in vars(each).items()}
    written = {n for n, value in members.items() if isinstance(value, functools.cached_property)}
    seen: set[str] = set()
    ahead = ["__getitem__", "__getitems__"]
    while ahead:
        name = ahead.pop()
        if name in seen:
            continue
        seen.add(name)
        tree = _source_of(inspect.getattr_static(kind, name, None))
        if tree is not None:
            written |= _writes(tree)
            ahead += [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    return written


def _source_of(found: Any) -> ast.AST | None:
    """The syntax of a method or a property of the user's."""
    for inner in ("fget", "func", "__func__"):  # properties, cached ones, and static methods
        found = getattr(found, inner, None) or found
    function = inspect.unwrap(found) if callable(found) else found
    if not inspect.isfunction(function):
        return None
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None


def _writes(tree: ast.AST) -> set[str]:
    """Names of attributes that are assigned to, in whole or in part, or called to change."""
    nodes = list(ast.walk(tree))
    # `cache = self.cache`: what is written to the one is written to the other.
    also = {
        node.targets[0].id: name
        for node in nodes
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Attribute)
        and (name := _held(node.value, {})) is not None
    }
    changed = [
        node
        for node in nodes
        if isinstance(node, ast.Attribute | ast.Subscript)
        and isinstance(node.ctx, ast.Store | ast.Del)
    ]
    called = [
        node.func.value
        for node in nodes
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and (node.func.attr in _WRITERS or node.func.attr.endswith("_"))
        and not node.func.attr.startswith("_")
    ]
    return {name for node in (*changed, *called) if (name := _held(node, also)) is not None}


def _held(node: ast.AST, also: Mapping[str, str]) -> str | None:
    """The attribute of `self` that an expression is a part of."""
    while isinstance(node, ast.Attribute | ast.Subscript):  # what a call gives may be a copy
        inner = node.value
        if isinstance(node, ast.Attribute) and isinstance(inner, ast.Name) and inner.id == "self":
            return node.attr
        node = inner
    return also.get(node.id) if isinstance(node, ast.Name) else None
