"""The Gaussian mechanism on per-record gradients: clip, sum, add noise.

With gᵢ the gradient of record i over all parameters together,

    s = Σᵢ wᵢ · gᵢ · min(1, C / ‖gᵢ‖₂)        ‖change of s by one record‖₂ ≤ C
    release (s + N(0, (σC)² I)) / B            B the expected batch size

(Abadi et al. 2016, arXiv 1607.00133, Algorithm 1, with B expected rather than drawn.)
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from defend.privacy.gradients.sums import per_record_norms, weighted_sum


def clip_factors(norms: Tensor, max_grad_norm: float) -> Tensor:
    """min(1, C / ‖gᵢ‖) for each record; 0 where the norm is not finite.

    A record whose gradient is NaN or infinite contributes nothing. That is a function of this
    record alone, so the sensitivity stays C; letting it through would make the whole sum NaN.

    *Guarantee.* Rounded down, so that factor · norm ≤ C however large the norm is; exactly 1 where
    the norm is at most C.
    """
    # Near 1e-45, the factor of a norm near 1e38, a number rounded up may be twice as large. Torch
    # divides a float by a tensor in two roundings, and a tensor by a tensor in one.
    bounded = norms.double().clamp_min(max_grad_norm)
    exact = torch.full_like(bounded, max_grad_norm) / bounded
    factors = exact.to(norms.dtype)
    factors = torch.where(factors > exact, factors.nextafter(torch.zeros_like(factors)), factors)
    return torch.where(norms.isfinite(), factors, 0.0)


def clip_and_sum(
    gradients: Sequence[Tensor], max_grad_norm: float, weights: Tensor | None = None
) -> list[Tensor]:
    """Σᵢ wᵢ · gᵢ · min(1, C / ‖gᵢ‖₂), parameter by parameter.

    Args:
        gradients: one tensor `[N, *parameter.shape]` for each parameter, any float dtype.
        max_grad_norm: C > 0.
        weights: 1 for a record and 0 for padding, shape `[N]`; None means all 1.

    Returns:
        One tensor of the parameter's shape for each, float32 or wider.

    *Guarantees.* Each record enters with at most C (1 + 1e-6) in L2 norm, taken over all
    parameters, however many there are; in bfloat16 too, as norms and products are then float32.
    Adding or removing one record moves the result by no more, up to the rounding of the sum.
    """
    if not gradients:
        return []
    norms = per_record_norms(gradients)
    factors = clip_factors(norms, max_grad_norm)
    if weights is not None:
        factors = factors * weights.to(factors)
    return weighted_sum(gradients, norms, factors)


def add_noise_(
    sums: Sequence[Tensor], *, deviation: float, draw: Callable[[Tensor], Tensor]
) -> None:
    """Add N(0, deviation²) to every coordinate, in place.

    Args:
        sums: clipped sums, one tensor a parameter.
        deviation: σ · C, C being the L2 sensitivity of the sums taken together.
        draw: gives standard normals of a tensor's shape, new ones at each call
            (`Randomness.gaussian`).
    """
    if deviation == 0:
        return
    for total in sums:
        noise = draw(total)
        # Added in the wider of the two: secure noise is float64.
        total.copy_(total.to(noise.dtype).add_(noise, alpha=deviation))
