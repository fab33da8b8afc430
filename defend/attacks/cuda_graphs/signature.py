"""The signature of a model: what a captured step depends on, but for the weights' values."""

import weakref
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

Signature = frozenset[tuple[str, Hashable]]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PLAIN = frozenset({bool, int, float, str, torch.dtype})
_LEFT_OUT = frozenset({dict, OrderedDict, set, list, type(None)})

# They run in several threads or processes.
_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def signature_of(model: nn.Module, without: Collection[str] = ()) -> Signature:
    """Modules, hooks, plain attributes and the places of tensors: name → value, as pairs.

    Lists, dicts and objects of other kinds are left out.

    Args:
        model: what is captured.
        without: names to leave out.
    """
    signature: list[tuple[str, Hashable]] = []
    for prefix, module in model.named_modules():
        attributes = vars(module)
        hooks = (attributes[name] for name in _HOOKS)
        signature.append((prefix or "class", (type(module), *map(tuple, hooks))))
        for owned in (attributes, attributes["_parameters"], attributes["_buffers"]):
            for name, value in owned.items():
                # Asked of every attribute of every module before every attack: exact types first.
                kind = type(value)
                if kind in _LEFT_OUT:
                    continue
                if kind in _PLAIN:
                    summary: Hashable = kind, value
                elif kind is tuple:
                    summary = _summary(value)
                elif isinstance(value, Tensor):
                    summary = _place(value)
                elif isinstance(value, int | float | str | Enum):
                    summary = kind, value
                else:
                    continue
                signature.append((f"{prefix}.{name}" if prefix else name, summary))
    if without:
        signature = [pair for pair in signature if pair[0] not in without]
    return frozenset(signature)


def _summary(value: Any) -> Hashable:
    if type(value) is tuple:
        return tuple(map(_summary, value))
    if isinstance(value, Tensor):
        return _place(value)
    return (type(value), value) if type(value) in _PLAIN else None


def _place(t: Tensor) -> Hashable:
    try:
        return t.data_ptr(), t.shape, t.stride(), t.dtype
    except (RuntimeError, ValueError):  # sparse, or not there yet
        return id(t)


def check_model(model: nn.Module, device: torch.device) -> None:
    """Refuse models whose work does not stay on one stream of one device.

    Raises:
        RuntimeError: saying why.
    """
    for module in model.modules():
        if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
            raise RuntimeError("the model is compiled; torch.compile has graphs of its own")
        if isinstance(module, _PARALLEL) or hasattr(module, "_fsdp_wrapped_module"):
            raise RuntimeError(f"{type(module).__name__} runs in several threads or processes")
    for t in (*model.parameters(), *model.buffers()):
        if hasattr(t, "placements"):  # a DTensor
            raise RuntimeError("the model is spread over several devices")
        if t.device != device:
            raise RuntimeError(f"the input is on {device}, parts of the model are on {t.device}")


def weakly(function: Callable[..., Any]) -> Hashable:
    """Stands for a function, and keeps nothing alive: a method would hold the model."""
    try:
        method = hasattr(function, "__self__") and hasattr(function, "__func__")
        reference = weakref.WeakMethod(function) if method else weakref.ref(function)
        hash(reference)
        return reference
    except TypeError:
        return object()  # like no other: never captured
