"""Weights that a ledger knows: which of a model's tensors were trained, in which fit, on what data.

A fit notes in its ledger a short digest of each parameter that it moved. Such a parameter holds
noise, so that no two fits give the same one: whoever finds its digest has found its fit, whatever
file, process, module or name the parameter comes from. What a fit did not move is public or
another fit's, and is not written; nor is a tensor of one value, to which a fit may clamp.
"""

import functools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from json import loads
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from defend.privacy.accounting.content import has_bytes, tensor_digest
from defend.privacy.accounting.fingerprint import DataIdentity
from defend.privacy.accounting.ledger_lines import HEAD, Entry

_FIT = b'\n{"kind": "fit", '
_NOTE = b'\n{"kind": "note", '
_SHORT = 32  # hexadecimal digits of SHA-256
_NESTED = 8  # dicts and lists in one another that are looked into

Origins = dict[str, DataIdentity]  # fit → the data that it trained on


def weight_digest(tensor: Tensor) -> str | None:
    """Of dtype, shape and bytes, wherever the tensor lies; None where it has no bytes."""
    if is_lazy(tensor) or not has_bytes(tensor):
        return None
    return tensor_digest(tensor)[:_SHORT]


def weight_digests(named: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """Name → digest, of all tensors that have one."""
    found = {name: weight_digest(tensor) for name, tensor in named}
    return {name: digest for name, digest in found.items() if digest is not None}


def moved_weights(named: Iterable[tuple[str, Tensor]], start: Mapping[str, str]) -> dict[str, str]:
    """Name → digest of the tensors that are not as they were.

    Args:
        named: names and tensors as they are now; those that are not in `start` are passed over.
        start: their digests before.
    """
    now = {name: tensor for name, tensor in named if name in start}
    digests = weight_digests(now.items())
    return {n: d for n, d in digests.items() if d != start[n] and not _is_of_one_value(now[n])}


def moved_copies(
    named: Iterable[tuple[str, Tensor]], moved: Iterable[Tensor], start: Mapping[str, str]
) -> dict[str, str]:
    """Name → digest of the tensors that look like a moved parameter: an average of it, say.

    Args:
        named: tensors under whatever names; those that are in `start` are passed over.
        moved: parameters that moved; a copy has the dtype and shape of one.
        start: digests of all parameters before; what equals one of them is no copy.
    """
    kinds = {(tensor.dtype, tensor.shape) for tensor in moved}
    alike = {n: t for n, t in named if n not in start and (t.dtype, t.shape) in kinds}
    public = set(start.values())
    digests = weight_digests(alike.items())
    return {n: d for n, d in digests.items() if d not in public and not _is_of_one_value(alike[n])}


def tensors_in(value: Any, name: str = "", depth: int = _NESTED) -> Iterator[tuple[str, Tensor]]:
    """Names and values of all tensors in dicts, lists and tuples, such as a checkpoint's."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping) and depth:
        for key, inner in value.items():
            yield from tensors_in(inner, f"{name}.{key}" if name else str(key), depth - 1)
    elif isinstance(value, list | tuple) and depth:
        for i, inner in enumerate(value):
            yield from tensors_in(inner, f"{name}.{i}" if name else str(i), depth - 1)


def _is_of_one_value(tensor: Tensor) -> bool:
    """Whether any model may hold it: zeros, ones; of one number, whole ones."""
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    values = tensor.detach().flatten()
    if values.numel() < 2:
        return values.numel() == 0 or bool(torch.all(values == values.round()))
    return bool(torch.all(values == values[0]))


@dataclass
class Known:
    """What one ledger knows of weights; or one process, of those without a ledger.

    Attributes:
        weights: digest → the fits that gave it.
        fits: fit → all data that its weights saw: its own under its own name, those of fits that
            came before it, in other accounts, under theirs.
        size: bytes of the ledger.
        written: when it was last written to, in ns.
    """

    weights: dict[str, set[str]] = field(default_factory=dict)
    fits: dict[str, Origins] = field(default_factory=dict)
    size: int = 0
    written: int = 0

    def note(self, fit: str, weights: Iterable[str]) -> None:
        """Add what a fit gave."""
        for digest in weights:
            self.weights.setdefault(digest, set()).add(fit)


def known_to(path: Path) -> Known | None:
    """What the ledger at a path knows, not verified; None where there is none that can be read."""
    try:
        found = path.stat()
        return _read(path, found.st_size, found.st_mtime_ns)
    except OSError:
        return None


@functools.lru_cache(maxsize=4096)
def _read(path: Path, size: int, written: int) -> Known | None:  # noqa: ARG001
    """Once for each state of a file: only the few lines that are not steps are looked into."""
    raw = path.read_bytes()
    if not raw.startswith(HEAD):
        return None
    known = Known(size=len(raw), written=written)
    for entry in _lines(raw, _FIT):
        known.fits[entry["fit"]] = origins_from(entry)
    for entry in _lines(raw, _NOTE):
        known.note(entry.get("fit", ""), entry.get("weights", {}).values())
    return known


def _lines(raw: bytes, head: bytes) -> Iterator[Entry]:
    at = raw.find(head)
    while at >= 0:
        end = raw.find(b"\n", at + 1)
        if end < 0:
            return  # torn: it is being written, or was in a crash
        with suppress(ValueError):  # edited: an error for whoever opens it, if it matters
            yield loads(raw[at + 1 : end])
        at = raw.find(head, end)


# --- the facts of a fit that tell its data ------------------------------------------------------


def data_facts(data: DataIdentity, before: Origins) -> dict[str, Any]:
    """The facts of a fit, for its line, that `origins_from` reads.

    Args:
        data: what it trains on.
        before: fits, and their data, that gave weights that it starts from.
    """
    facts: dict[str, Any] = {"data_digest": data.digest, "data": _plain(data)}
    if before:
        facts["weights_from"] = {fit: [d.digest, _plain(d)] for fit, d in before.items()}
    return facts


def origins_from(facts: Mapping[str, Any]) -> Origins:
    """The data of a fit, and of those before it, from its line; older lines have a digest alone."""
    digest = str(facts.get("data_digest"))
    found = {str(facts["fit"]): _identity(digest, facts.get("data") or {})}
    before = facts.get("weights_from") or {}
    return found | {fit: _identity(digest, plain) for fit, (digest, plain) in before.items()}


def _plain(data: DataIdentity) -> dict[str, Any]:
    return {"content": data.content, "parts": list(data.parts), "bases": list(data.bases)}


def _identity(digest: str, plain: Mapping[str, Any]) -> DataIdentity:
    return DataIdentity(
        digest,
        plain.get("content", digest),
        tuple(plain.get("parts", ())),
        tuple(plain.get("bases", ())),
    )
