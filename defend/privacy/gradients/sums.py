"""Norms and weighted sums of gradients that are held record by record: pure functions."""

from collections.abc import Sequence

import torch
from torch import Tensor

# A sum in float32 stops growing where what is added falls below half a unit in its last place: of
# 2²⁸ equal weights it misses 2% to 12% of the norm, and the clip lets as much more of them in. So
# float32 sums the squares of blocks alone, through 24 roundings at most. Of 2⁻²⁴ each, they are 12
# in the norm; with those of its square root and of the result, it is off by 14 · 2⁻²⁴ < 8.4e-7.
_BLOCK = 24  # in whatever order
# Numbers that lie side by side are added in 4 to 16 sums at a time, and those one by one: a square,
# 64 / 4 sums of it and 4 of them, or 64 / 16 and 16. GPUs have more at a time, and add in pairs.
_BLOCK_SIDE_BY_SIDE = 64
_SMALL = 512  # weights that are sooner copied to float64 than cut into blocks


def as_real(tensor: Tensor) -> Tensor:
    """A complex tensor as pairs of real numbers, `[*shape, 2]`; a real one as it is."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def as_kind_of(tensor: Tensor, like: Tensor) -> Tensor:
    """What `as_real` made of a tensor of the kind of `like`, as it was, in its dtype."""
    if not like.is_complex():
        return tensor.to(like.dtype)
    return torch.view_as_complex(tensor.to(like.dtype.to_real()))


def per_record_norms(gradients: Sequence[Tensor], *, grouped: bool = False) -> Tensor:
    """‖gᵢ‖₂ of each record, in float32 or wider.

    Args:
        gradients: one tensor `[N, *parameter.shape]` for each parameter.
        grouped: whether each parameter has norms of its own.

    Returns:
        Norms over all parameters, shape `[N]`; grouped `[N, parameters]`.

    *Guarantee.* Within 8.4e-7 of the true norm, relative to it, however many weights there are; or
    within 1e-18 of it, because the squares of numbers below 1e-22 are 0 in float32.
    """
    parts = torch.stack([_norms(g) for g in gradients], dim=1)
    norms = parts if grouped else torch.linalg.vector_norm(parts, dim=1)
    wide = any(g.dtype == torch.float64 for g in gradients)
    return norms if wide else norms.float()


def _norms(gradient: Tensor) -> Tensor:
    """Norms over one parameter, `[N]`, in float64: of blocks, and then of their norms.

    The first reads a gradient as it lies in memory. Float64 from the start would copy it whole.
    """
    rows = _rows(gradient)
    if rows.shape[1] <= _SMALL:
        return torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    size = _BLOCK_SIDE_BY_SIDE if rows.stride(1) == 1 else _BLOCK
    count = rows.shape[1] // size
    blocks = torch.linalg.vector_norm(
        rows[:, : count * size].unflatten(1, (count, size)),
        dim=2,
        dtype=torch.promote_types(gradient.dtype, torch.float32),
    )
    parts = torch.cat([blocks, rows[:, count * size :]], dim=1)  # the rest is exact
    return torch.linalg.vector_norm(parts, dim=1, dtype=torch.float64)


def weighted_sum(gradients: Sequence[Tensor], norms: Tensor, factors: Tensor) -> list[Tensor]:
    """Σᵢ fᵢ · gᵢ, parameter by parameter.

    Args:
        gradients: one tensor `[N, *parameter.shape]` for each parameter.
        norms: from `per_record_norms`; where one is not finite the record adds 0.
        factors: fᵢ in the shape of `norms`, float32 or wider.
    """
    count, broken = len(gradients), ~norms.isfinite()
    if broken.any():  # 0 · NaN is NaN
        gradients = [
            g.masked_fill(mask.view((-1,) + (1,) * (g.ndim - 1)), 0)
            for g, mask in zip(gradients, _by_parameter(broken, count), strict=True)
        ]
    # Matrix times vector: unlike matrix times matrix it is never rounded to TF32 or bfloat16.
    return [
        torch.mv(_rows(g).to(f.dtype).T, f).view(g.shape[1:])
        for g, f in zip(gradients, _by_parameter(factors, count), strict=True)
    ]


def _rows(gradient: Tensor) -> Tensor:
    """`[N, weights]`, of a parameter of any shape; that of a scalar is `[N]`."""
    return gradient.flatten(1) if gradient.ndim > 1 else gradient.unsqueeze(1)


def _by_parameter(values: Tensor, count: int) -> list[Tensor]:
    """One contiguous vector `[N]` for each of `count` parameters."""
    return [values] * count if values.ndim == 1 else list(values.T.contiguous())
