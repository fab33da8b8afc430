"""The precision of an attack, apart from that of the training around it."""

import contextlib
import functools
import platform
import warnings
from collections.abc import Callable
from typing import Any

import torch

Context = Callable[[], contextlib.AbstractContextManager[Any]]

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(precision: str | None, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Forwards and backwards in that precision; None leaves the autocast in force."""
    if precision is None:
        return contextlib.nullcontext()
    dtype = PRECISIONS[precision]
    if dtype == torch.float32:
        return torch.autocast(device.type, enabled=False)
    if device.type == "cpu":
        _warn_if_emulated(precision)
    return torch.autocast(device.type, dtype)


def as_now(device: torch.device) -> Context:
    """What enters the autocast in force at this call again, inside another one."""
    kind = device.type
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    # No cache: it holds casts of the attack's dtype.
    return lambda: torch.autocast(kind, dtype, enabled=enabled, cache_enabled=False)


def keeps_casts(precision: str | None, device: torch.device) -> bool:
    """Whether autocast will keep casts of the weights, in the dtype that the attack needs."""
    kind = device.type
    outer = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    if precision is None:
        return outer is not None
    # One cache for all: casts in another dtype than the training's would meet it there.
    return precision != "fp32" and outer in (None, PRECISIONS[precision])


@functools.cache
def _warn_if_emulated(precision: str) -> None:
    """Say once that this CPU computes half precision by way of float32, many times slower."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return
    features = {"bf16": ("avx512_bf16", "amx_tile"), "fp16": ("amx_fp16",)}[precision]
    names = [f"_is_{feature}_supported" for feature in features]
    if not any(getattr(torch.cpu, name, lambda: True)() for name in names):
        warnings.warn(
            f"This CPU has no hardware for {precision}: the attack will be many times slower than "
            "in fp32. Leave out `precision` here.",
            stacklevel=2,
        )
