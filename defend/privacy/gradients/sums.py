"""Norms and weighted sums of gradients that are held record by record: pure functions."""

from collections.abc import Sequence

import torch
from torch import Tensor


def per_record_norms(gradients: Sequence[Tensor], *, grouped: bool = False) -> Tensor:
    """‖gᵢ‖₂ of each record, in float32 or wider.

    Args:
        gradients: one tensor `[N, *parameter.shape]` for each parameter.
        grouped: whether each parameter has norms of its own.

    Returns:
        Norms over all parameters, shape `[N]`; grouped `[N, parameters]`.
    """
    if grouped:
        return torch.stack([per_record_norms([g]) for g in gradients], dim=1)
    parts = [
        torch.linalg.vector_norm(
            g.flatten(1), dim=1, dtype=torch.promote_types(g.dtype, torch.float32)
        )
        for g in gradients
    ]
    return torch.linalg.vector_norm(torch.stack(parts, dim=1), dim=1)


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
        torch.mv(g.flatten(1).to(f.dtype).T, f).view(g.shape[1:])
        for g, f in zip(gradients, _by_parameter(factors, count), strict=True)
    ]


def _by_parameter(values: Tensor, count: int) -> list[Tensor]:
    """One contiguous vector `[N]` for each of `count` parameters."""
    return [values] * count if values.ndim == 1 else list(values.T.contiguous())
