"""The L1 ball: Σ_j |δ_j| ≤ eps, with the exact projection onto the ball and its box together."""

import dataclasses
import math
from typing import ClassVar

import torch
from torch import Tensor

from defend.errors import InputError
from defend.threat.balls import Ball, empty_on_generator, hold_, per_record
from defend.threat.region import Region

_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


def shrinkage(v: Tensor, lower: Tensor, upper: Tensor, eps: Tensor) -> Tensor:
    r"""The λ ≥ 0 of each record at which v, shrunk by λ and clipped, fits into the L1 ball.

        f(λ) = Σ_j min(max(|v_j| − λ, 0), u_j) ≤ eps,    u_j the bound of the box on v_j's side

    f falls, piecewise linearly, from the norm of the clipped v to 0. Sorting its 2d breakpoints
    finds the root exactly (Duchi et al. 2008 for the ball; Croce & Hein 2021, arXiv 2103.01208,
    with the box), but ten times slower than what is done here: floating point numbers ≥ 0 are in
    the order of their bits, so the root is found bit by bit from the highest, as it would be
    looked up in a list of all floats. That takes as many passes as a float has bits, whatever the
    data, has no tolerance to choose and never waits for the GPU.

    Args:
        v: `[N, ...]`, float32 or float64, finite.
        lower: bounds of the box, ≤ 0, broadcastable to `v`.
        upper: likewise, ≥ 0.
        eps: radius ≥ 0, 0-dimensional or `[N, 1, ...]`.

    Returns:
        `[N, 1, ...]`, the smallest float with f(λ) ≤ eps, f being summed in v's dtype.
    """
    dims = tuple(range(1, v.ndim))
    size, bound = v.abs(), v.clamp(lower, upper).abs_()
    left, zero = torch.empty_like(size), size.new_zeros(())
    bits = torch.zeros(per_record(v), dtype=_BITS[v.dtype], device=v.device)
    for bit in reversed(range(8 * v.element_size() - 1)):
        tried = bits + (1 << bit)
        torch.sub(size, tried.view(v.dtype), out=left)
        too_long = torch.clamp(left, zero, bound, out=left).sum(dims, keepdim=True) > eps
        bits = torch.where(too_long, tried, bits)
    # `bits` is the largest float that leaves the record too long, unless none does, not even 0.
    return torch.where(bound.sum(dims, keepdim=True) > eps, bits + 1, 0).view(v.dtype)


def project_l1_box_(v: Tensor, lower: Tensor, upper: Tensor, eps: Tensor) -> Tensor:
    r"""The nearest point of {δ : Σ_j |δ_j| ≤ eps, lower ≤ δ ≤ upper}, record by record, in place.

        δ_j = clip( sign(v_j) · max(|v_j| − λ, 0), lower_j, upper_j ),    λ = `shrinkage`

    Clipping to the box after projecting onto the ball alone would be legal, but further away, and
    would waste the budget that the box cuts off. With lower = −inf and upper = inf this is the
    projection onto the ball.

    Args:
        v: `[N, ...]`, float32 or float64, finite.
        lower: bounds of the box, ≤ 0, broadcastable to `v`.
        upper: likewise, ≥ 0.
        eps: radius ≥ 0, 0-dimensional or `[N, 1, ...]`.

    Returns:
        v, overwritten; untouched records that were legal.

    *Guarantee.* λ is off by less than the spacing of floats at λ, so that each δ_j is exact to
    the rounding of v_j; Σ_j |δ_j|, summed in v's dtype, does not exceed eps.
    """
    if v.numel() == 0:
        return v
    shrink = shrinkage(v, lower, upper, eps)
    return v.sub_(v.clamp(-shrink, shrink)).clamp_(lower, upper)


def affordable(region: Region) -> Tensor:
    """How many values of each record eps can carry across the box: eps / mean width, rounded.

    Only values that may change at all count, in width as in number.

    Returns:
        `[N, 1, ...]`, floating point, ≥ 0.
    """
    width = region.upper - region.lower
    dims = tuple(range(1, width.ndim))
    total = width.sum(dims, keepdim=True).clamp_min_(torch.finfo(width.dtype).tiny)
    # Signs, as sums of booleans are slow on the CPU.
    return width.sign_().sum(dims, keepdim=True).mul_(region.eps).div_(total).round_()


@dataclasses.dataclass(frozen=True)
class L1(Ball):
    """Σ_j |δ_j| ≤ eps: the changes of a record add up to `eps` at most.

    The steepest direction of L1 is a single coordinate, which the box soon stops. A step spreads
    evenly over the k coordinates with the largest gradients instead (SLIDE: Tramèr & Boneh 2019,
    arXiv 1904.13000), passing over those that the box stops (Croce & Hein 2021, arXiv
    2103.01208). The best k grows with the radius: by default it is the number of values that
    `eps` can carry from one end of the box to the other, where a fixed share of 5% left up to 17
    points more of a model's accuracy standing.

    Args:
        eps: radius, in the units of the raw input box: 12 may turn twelve pixels from black to
            white. Finite and ≥ 0.
        density: share of a record's values that one step moves, in (0, 1], rounded, at least one
            value; None for the default above: at least one value, and at most a twentieth of them
            or 16, whichever is more.

    Raises:
        InputError: if `eps` is negative or not finite, or if `density` is not in (0, 1].
    """

    name: ClassVar[str] = "l1"
    density: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.density is not None and not 0 < self.density <= 1:
            raise InputError(
                f"Expected `density` to be in (0, 1] or None, got {self.density}. Give the share "
                "of the input values that one step moves, for example 0.05."
            )

    def random_start(
        self,
        like: Tensor,
        generator: torch.Generator,
        *,
        eps: float | Tensor | None = None,
        free: Tensor | None = None,
    ) -> Tensor:
        """Uniform in the volume: eps · X / (Σ_j |X_j| + Y), X_j of density e^−|x| / 2, Y ~ Exp(1).

        (Barthe et al. 2005, arXiv math/0503650, as for `L2`.)
        """
        start = empty_on_generator(like, generator).exponential_(generator=generator)
        # Laplace, as the difference of two exponentials.
        start -= torch.empty_like(start).exponential_(generator=generator)
        spare = start.new_empty(per_record(like)).exponential_(generator=generator)
        start, spare = hold_(start.to(like.device), free), spare.to(like.device)
        return start.mul_((self.eps if eps is None else eps) / (_length(start) + spare))

    def steepest(self, grad: Tensor, delta: Tensor, region: Region) -> Tensor:
        """±1/k on the k coordinates that gain most, of those that can still move.

        k comes from `density`, is less where fewer can move and more where gradients tie; the
        length is 1 in any case.
        """
        if grad.numel() == 0:
            return torch.zeros_like(grad)
        # Room to move times the largest float: nothing where the box stops δ, no limit elsewhere.
        least, most = region.lower - delta, region.upper - delta
        huge = torch.finfo(grad.dtype).max
        gain = grad.nan_to_num(0.0, 0.0, 0.0).clamp_(least.mul_(huge), most.mul_(huge))
        top = self._least_of_the_largest(gain.abs().flatten(1), region)
        # Only the k largest are left after shrinking by the float below the k-th.
        below = torch.nextafter(top, torch.zeros_like(top)).view(per_record(grad))
        step = gain.sub_(gain.clamp(-below, below)).sign_()
        return step.div_(_length(step).clamp_min_(1.0))

    def _least_of_the_largest(self, size: Tensor, region: Region) -> Tensor:
        """The k-th largest value of each record, `[N]`, from values `[N, d]`."""
        values = size.shape[1]
        if self.density is not None:
            count = max(1, round(self.density * values))
            return size.topk(count, dim=1, sorted=False).values.amin(1)
        # A bound for all records: `topk` wants a number that the host knows, and a small one.
        most = min(values, max(16, math.ceil(values / 20)))
        k = affordable(region).clamp_(1, most).long().view(-1, 1)
        return size.topk(most, dim=1).values.gather(1, k - 1).flatten()

    def project_(self, delta: Tensor, region: Region) -> Tensor:
        """The nearest legal δ: see `project_l1_box_`."""
        return project_l1_box_(delta, region.lower, region.upper, region.eps)

    def norm(self, delta: Tensor) -> Tensor:
        return _length(delta).flatten()


def _length(t: Tensor) -> Tensor:
    """Σ_j |t_ij|, shaped `[N, 1, ...]`; faster on the CPU than `vector_norm` of order 1."""
    return t.abs().sum(tuple(range(1, t.ndim)), keepdim=True)
