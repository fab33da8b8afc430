"""Norm balls around a clean input: where a perturbation δ may start, move and end.

A ball supplies the three operations of projected gradient ascent and nothing else, so that one
loop (`defend.attacks.pgd`) serves every norm. All tensors are batches `[N, ...]` of any rank ≥ 2,
one record a row; norms are taken per record over every other dimension. Nothing here waits for
the GPU, and memory layout is kept.

The radius that counts is the region's, one for all records or one for each; a ball's own `eps` is
what the region is made from.
"""

import dataclasses
from abc import ABC, abstractmethod
from typing import ClassVar, Self

import torch
from torch import Tensor

from defend.errors import InputError
from defend.threat.region import Region


@dataclasses.dataclass(frozen=True)
class Ball(ABC):
    """The set {δ : ‖δ‖ ≤ eps}.

    Args:
        eps: radius, in the units of the raw input box (8/255 of [0, 1], say); finite and ≥ 0.

    Raises:
        InputError: if `eps` is negative or not finite.
    """

    eps: float
    name: ClassVar[str]
    start_share: ClassVar[float] = 1.0  # of eps, that an attack's start is drawn from

    def __post_init__(self) -> None:
        if not 0 <= self.eps < float("inf"):
            raise InputError(
                f"Expected `eps` to be a finite number ≥ 0, got {self.eps}. "
                "Give the radius in units of the raw input box, for example 8 / 255."
            )

    def with_eps(self, eps: float) -> Self:
        """The same ball with another radius."""
        return dataclasses.replace(self, eps=eps)

    @abstractmethod
    def random_start(
        self,
        like: Tensor,
        generator: torch.Generator,
        *,
        eps: float | Tensor | None = None,
        free: Tensor | None = None,
    ) -> Tensor:
        """A δ drawn uniformly from the ball.

        Args:
            like: gives shape `[N, ...]`, dtype, device and memory layout.
            generator: source of the randomness, on any device; numbers are drawn where it lives.
            eps: radius, a number, 0-dimensional, or `[N, 1, ...]` with one for each record; None
                means the ball's own.
            free: True where δ may differ from 0, broadcastable to `like`; None means everywhere.
                The draw is uniform in the ball of the free coordinates.
        """

    @abstractmethod
    def steepest(self, grad: Tensor, delta: Tensor, region: Region) -> Tensor:
        """The v with ‖v‖ ≤ 1 that the loss rises fastest along, from δ.

        Args:
            grad: of the loss with respect to δ, `[N, ...]`, raw units.
            delta: where the step starts, legal in `region`.
            region: where δ may go.

        Returns:
            v, shaped like `grad`, finite; zero where the gradient is zero or NaN.
        """

    @abstractmethod
    def project_(self, delta: Tensor, region: Region) -> Tensor:
        """A legal δ near the given one: in ball and box. Written into `delta` and returned."""

    @abstractmethod
    def norm(self, delta: Tensor) -> Tensor:
        """‖δ_i‖ of each record, shape `[N]`."""


def empty_on_generator(like: Tensor, generator: torch.Generator) -> Tensor:
    """Room for random numbers: like `like`, on the generator's device."""
    return torch.empty_like(like, device=generator.device)


def per_record(like: Tensor) -> tuple[int, ...]:
    """The shape `[N, 1, ...]`: one number a record, to broadcast over `like`."""
    return (len(like),) + (1,) * (like.ndim - 1)


def per_record_l2(t: Tensor) -> Tensor:
    """‖t_i‖₂ for each record, shaped `[N, 1, ...]` so that it divides `t` in any memory layout."""
    return torch.linalg.vector_norm(t, dim=tuple(range(1, t.ndim)), keepdim=True)


def hold_(start: Tensor, free: Tensor | None) -> Tensor:
    """Zero, in place, where δ may not change."""
    return start if free is None else start.masked_fill_(~free, 0.0)


@dataclasses.dataclass(frozen=True)
class Linf(Ball):
    """max_j |δ_j| ≤ eps: every input value may move by at most `eps`.

    Steepest ascent is the sign of the gradient and projection is a clamp (Madry et al. 2018,
    arXiv 1706.06083). As the region's box lies within ±eps, ball and box are one clamp, and δ is
    the nearest legal point.
    """

    name: ClassVar[str] = "linf"

    def random_start(
        self,
        like: Tensor,
        generator: torch.Generator,
        *,
        eps: float | Tensor | None = None,
        free: Tensor | None = None,
    ) -> Tensor:
        start = empty_on_generator(like, generator).uniform_(-1, 1, generator=generator)
        return hold_(start.to(like.device).mul_(self.eps if eps is None else eps), free)

    def steepest(self, grad: Tensor, delta: Tensor, region: Region) -> Tensor:
        return grad.sign()  # 0 for NaN; ±inf still points somewhere

    def project_(self, delta: Tensor, region: Region) -> Tensor:
        return delta.clamp_(region.lower, region.upper)

    def norm(self, delta: Tensor) -> Tensor:
        return delta.abs().flatten(1).amax(1)


@dataclasses.dataclass(frozen=True)
class L2(Ball):
    """√(Σ_j δ_j²) ≤ eps: the Euclidean length of the change is at most `eps`.

    The random start is uniform in the *volume* of the ball (Barthe et al. 2005, arXiv
    math/0503650): for X_j ~ N(0, 1) and Y ~ Exp(1),

        eps · X / √(Σ_j X_j² + 2Y)

    needs no count of the free coordinates, as X_j = 0 leaves the others uniform in the ball of
    their own dimension. (A radius of eps · U would crowd the starts around the clean input.)
    """

    name: ClassVar[str] = "l2"
    # In many dimensions nearly all of a ball lies at its surface, and a start there leaves steps
    # only the way around: 20 steps came out 1 to 2 points weaker than from within half the radius.
    start_share: ClassVar[float] = 0.5

    def random_start(
        self,
        like: Tensor,
        generator: torch.Generator,
        *,
        eps: float | Tensor | None = None,
        free: Tensor | None = None,
    ) -> Tensor:
        start = empty_on_generator(like, generator).normal_(generator=generator)
        spare = start.new_empty(per_record(like)).exponential_(generator=generator)
        start, spare = hold_(start.to(like.device), free), spare.to(like.device)
        length = (per_record_l2(start).square_() + 2 * spare).sqrt_()
        return start.mul_((self.eps if eps is None else eps) / length)

    def steepest(self, grad: Tensor, delta: Tensor, region: Region) -> Tensor:
        # Divided by its largest value first, a gradient may be as small as floats go. Zeros give
        # 0/0 and infinities inf/inf here, NaN stays: a record with any of them does not move.
        largest = grad.abs().amax(tuple(range(1, grad.ndim)), keepdim=True)
        direction = (grad / largest).nan_to_num_(0.0, 0.0, 0.0)
        return direction.div_(per_record_l2(direction).clamp_min_(1.0))

    def project_(self, delta: Tensor, region: Region) -> Tensor:
        """Onto the sphere where outside the ball, then into the box.

        The box holds δ = 0, so that clipping only shortens each δ_j and never leaves the ball. The
        result is legal, though not always the nearest point of ball ∩ box.
        """
        longest = torch.maximum(per_record_l2(delta), region.eps)
        # The smallest number stands in for 0 where eps and δ are both 0.
        scale = region.eps / longest.clamp_min_(torch.finfo(delta.dtype).tiny)
        return delta.mul_(scale).clamp_(region.lower, region.upper)

    def norm(self, delta: Tensor) -> Tensor:
        return per_record_l2(delta).flatten()
