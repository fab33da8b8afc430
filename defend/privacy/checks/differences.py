"""Where two lists of gradients differ, beyond rounding."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

# Structure breaks a gradient by its own size; rounding stays far below these.
_ROUNDING = {torch.float64: 1e-4, torch.float32: 1e-2, torch.half: 1e-1}  # half of any kind
# Where all shapes are the same, rows are rounded alike.
_SAME_SHAPES = {torch.float64: 1e-7, torch.float32: 1e-4, torch.half: 1e-2}


def worst_difference(
    names: Iterable[str],
    found: Sequence[Tensor],
    expected: Sequence[Tensor],
    *,
    half: bool,
    same_shapes: bool = False,
) -> tuple[str, float] | None:
    """Where two gradients differ most, relative to the whole of it; None if by rounding.

    Args:
        names: of the parameters.
        found: one gradient for each of them.
        expected: what it should be.
        half: whether both were computed in half precision.
        same_shapes: whether both were computed from batches of the same shapes.
    """
    if all(map(torch.equal, found, expected)):
        return None
    rounding = _SAME_SHAPES if same_shapes else _ROUNDING
    whole = torch.stack([e.double().nan_to_num().norm() for e in expected]).norm()
    parts = [_distance(f, e) for f, e in zip(found, expected, strict=True)]
    kinds = {torch.half} if half else {e.dtype for e in expected}
    slack = max(rounding.get(kind, rounding[torch.half]) for kind in kinds)
    if not torch.stack(parts).norm() > slack * whole + 1e-12:
        return None
    name, worst = max(zip(names, parts, strict=True), key=lambda pair: float(pair[1]))
    return name, float(worst / whole.clamp_min(1e-12))


def mixture(gradients: Sequence[Tensor]) -> list[Tensor]:
    """One combination of the records' gradients, `[records, *shape]` each: `[*shape]`.

    It changes with any of them, and takes the memory of one.
    """
    weights = 1 + torch.arange(len(gradients[0])) * 0.618 % 1
    return [torch.tensordot(weights.to(g), g, dims=1) for g in gradients]


def _distance(found: Tensor, expected: Tensor) -> Tensor:
    """‖found − expected‖; infinite where one is finite and the other is not."""
    difference = (found.double() - expected.double()).nan_to_num(0.0, 0.0, 0.0)
    odd = found.isfinite() != expected.isfinite()
    return torch.where(odd.any(), torch.inf, difference.norm())
