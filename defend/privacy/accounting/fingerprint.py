"""A digest of a training set, to tell a run on other data from a run that goes on."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset, TensorDataset

_BLOCK = 2**24  # elements that are copied at a time


def data_digest(dataset: Any) -> str:
    """SHA-256 of a training set's content, the same in every process and memory layout.

    Exact for `TensorDataset` (dtype, shape and values of each tensor), for data sets that name
    their own content by a `_fingerprint` (Hugging Face), and for `Subset` and `ConcatDataset` of
    those. No record is ever asked for: `__getitem__` may be slow, random, or have side effects.

    *Guarantee*: none of privacy. The digest is a function of the data without noise: who knows all
    records but one can test a guess of that one. Show it only to those who may see the data.

    Args:
        dataset: any data set.

    Returns:
        "sha256:" and 64 hexadecimal digits where the content is known; "size:" and as many where
        only kind and length of some part are, so that equal digests need not mean equal data.
    """
    exact, digest = _digest(dataset)
    return f"{'sha256' if exact else 'size'}:{digest}"


def _digest(dataset: Any) -> tuple[bool, str]:
    """Whether all of the content went in, and the digest."""
    kind = type(dataset).__qualname__  # without its module: a script is `__main__` or not
    fingerprint = getattr(dataset, "_fingerprint", None)
    if isinstance(fingerprint, str):
        return True, _hash(kind, fingerprint)
    if isinstance(dataset, TensorDataset) and all(map(_has_bytes, dataset.tensors)):
        return True, _hash(kind, *(_tensor_digest(t) for t in dataset.tensors))
    if isinstance(dataset, Subset):
        exact, inner = _digest(dataset.dataset)
        return exact, _hash(kind, _indices_digest(dataset.indices), inner)
    if isinstance(dataset, ConcatDataset):
        parts = [_digest(part) for part in dataset.datasets]
        return all(exact for exact, _ in parts), _hash(kind, *(inner for _, inner in parts))
    return False, _hash(kind, _length(dataset))


def _hash(*parts: str | int | None) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _has_bytes(tensor: Tensor) -> bool:
    """Whether the values lie in plain memory: not sparse, quantized or without any."""
    return (
        tensor.layout is torch.strided and not tensor.is_quantized and tensor.device.type != "meta"
    )


def _tensor_digest(tensor: Tensor) -> str:
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


def _indices_digest(indices: Sequence[int]) -> str:
    return hashlib.sha256(np.asarray(indices, dtype=np.int64).tobytes()).hexdigest()


def _length(dataset: Any) -> int | None:
    try:
        return len(dataset)
    except (TypeError, NotImplementedError):  # a stream
        return None
