"""Does the step read what the user's code keeps? It is given other values for a moment."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from defend.privacy.checks.differences import worst_difference
from defend.privacy.checks.state_watch import Key, Numbers

Gradients = Callable[[], dict[str, Tensor] | None]


def first_read(
    gradients: Gradients, kept: Mapping[Key, list[Numbers]], *, half: bool = False
) -> str | None:
    """The name of the first value that gradients depend on, or None.

    All get other values together, and only if that changes a gradient one after another. A step
    that fails with other values reads them, too. Where a gradient cannot be repeated as it is,
    nothing is found.

    Args:
        gradients: () → the gradients of the same records, by parameter, with everything as it is
            now; None where they cannot be had.
        kept: tensors and arrays, under what holds them.
        half: whether the step computes in half precision.
    """

    def moves() -> bool:
        found = gradients()
        if plain is None or found is None:
            return found is not plain
        both = [*found.values()], [*plain.values()]
        return worst_difference(plain, *both, half=half, same_shapes=True) is not None

    def moves_with(values: list[Numbers]) -> bool:
        with contextlib.ExitStack() as stack:
            for value in values:
                stack.enter_context(other_values(value))
            return moves()

    plain = gradients()
    every = [value for values in kept.values() for value in values]
    if not every or plain is None or moves() or not moves_with(every):
        return None
    alone = (name for (_, name), values in kept.items() if moves_with(values))
    return next(alone, next(iter(kept))[1])


@contextlib.contextmanager
def other_values(value: Numbers) -> Iterator[None]:
    """Inside, a tensor or an array holds other numbers, in another order.

    Whole numbers stay in their range, so that an index stays one. What cannot be written to stays
    as it is.
    """
    held = value.data if isinstance(value, Tensor) else value.copy()
    try:
        _set(value, _others(held) if isinstance(held, Tensor) else _others_of_array(held))
    except (RuntimeError, TypeError, ValueError):  # sparse, read only
        yield
        return
    try:
        yield
    finally:
        _set(value, held)


@torch.no_grad()
def _others(values: Tensor) -> Tensor:
    if values.dtype is torch.bool:
        return values.logical_not()
    if values.is_floating_point() or values.is_complex():
        return 0.7 - 1.9 * (values if values.is_complex() else values.nan_to_num())
    turned = values.flatten().flip(0).view(values.shape)
    # An index out of range stops a GPU for good.
    return values + 1 if values.device.type == "cpu" and torch.equal(turned, values) else turned


def _others_of_array(values: np.ndarray) -> np.ndarray:
    return _others(torch.from_numpy(values.copy())).numpy()


def _set(value: Numbers, to: Any) -> None:
    if isinstance(value, Tensor):
        value.data = to
    else:
        value[...] = to
