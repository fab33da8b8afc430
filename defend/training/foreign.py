"""Attacks from elsewhere: whatever they do to the module, training goes on as if they had not."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from defend.attacks.context import no_trace
from defend.errors import InputError


def run_foreign(
    attack: Any,
    module: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    generator: torch.Generator,
    chunk_size: int | None,
) -> Tensor:
    """x_adv of an attack that may be anyone's.

    *Guarantee.* Modes, buffers, gradients, `requires_grad` and x are as before, also after an
    exception, where the attack calls `model.eval()`, `model.train()`, `model.zero_grad()` or
    `loss.backward()`, or writes to x.

    Args:
        attack: an `Attack`.
        module: gives logits; in eval mode and frozen meanwhile.
        x: clean inputs `[N, ...]`.
        y: targets `[N, ...]`.
        generator: source of randomness.
        chunk_size: most rows at once, or None for all.

    Raises:
        InputError: if what comes back is not of x's shape and dtype.
    """
    with untouched(module, x.device):
        x_adv = attack(module, x.detach().clone(), y, generator=generator, chunk_size=chunk_size)
    if x_adv.shape != x.shape or x_adv.dtype != x.dtype:
        raise InputError(
            f"Expected the attack to return inputs of shape {tuple(x.shape)} and {x.dtype}, "
            f"got {tuple(x_adv.shape)} and {x_adv.dtype}. Return x_adv in the form of x."
        )
    return x_adv.detach()


@contextlib.contextmanager
def untouched(module: nn.Module, device: torch.device) -> Iterator[None]:
    """`no_trace`, for code that may change buffers and gradients itself."""
    grads = [(p, p.grad) for p in module.parameters()]
    buffers = [(b, b.clone()) for b in module.buffers() if not b.is_inference()]
    try:
        for p, _ in grads:
            p.grad = None  # out of reach: `zero_grad` may write to it
        with no_trace(module, device):
            yield
    finally:
        for p, grad in grads:
            p.grad = grad
        with torch.no_grad():
            for b, value in buffers:
                # By value: the statistics of a batch norm move without a new `_version`.
                if not torch.equal(b, value):
                    b.copy_(value)
