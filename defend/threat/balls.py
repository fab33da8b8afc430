"""Norm balls around a clean input: where a perturbation δ may start, move and end.

A ball supplies the three operations of projected gradient ascent and nothing else, so that one
loop (`defend.attacks.pgd`) serves every norm. All tensors are batches `[N, ...]` of any rank ≥ 2,
one record a row; norms are taken per record over every other dimension.
"""

import dataclasses
from abc import ABC, abstractmethod
from typing import ClassVar, Self

import torch
from torch import Tensor

from defend.errors import InputError


def _per_record_l2(t: Tensor) -> Tensor:
    """‖t_i‖₂ for each record, shaped `[N, 1, ...]` so that it divides `t` in any memory layout."""
    return torch.linalg.vector_norm(t, dim=tuple(range(1, t.ndim)), keepdim=True)


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
    def random_start(self, like: Tensor, generator: torch.Generator) -> Tensor:
        """A δ drawn uniformly from the ball, with the shape, dtype, device and layout of `like`."""

    @abstractmethod
    def steepest(self, grad: Tensor) -> Tensor:
        """argmax of ⟨grad, v⟩ over ‖v‖ ≤ 1: the direction of steepest ascent in this norm."""

    @abstractmethod
    def project_(self, delta: Tensor) -> Tensor:
        """The nearest point of the ball to δ, written in place into `delta` and returned."""

    @abstractmethod
    def norm(self, delta: Tensor) -> Tensor:
        """‖δ_i‖ of each record, shape `[N]`."""


def _empty_on_generator(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.empty_like(like, device=generator.device)


@dataclasses.dataclass(frozen=True)
class Linf(Ball):
    """max_j |δ_j| ≤ eps: every input value may move by at most `eps`.

    Steepest ascent is the sign of the gradient and projection is a clamp (Madry et al. 2018,
    arXiv 1706.06083).
    """

    name: ClassVar[str] = "linf"

    def random_start(self, like: Tensor, generator: torch.Generator) -> Tensor:
        start = _empty_on_generator(like, generator)
        return start.uniform_(-self.eps, self.eps, generator=generator).to(like.device)

    def steepest(self, grad: Tensor) -> Tensor:
        return grad.sign()

    def project_(self, delta: Tensor) -> Tensor:
        return delta.clamp_(-self.eps, self.eps)

    def norm(self, delta: Tensor) -> Tensor:
        return delta.abs().flatten(1).amax(1)


@dataclasses.dataclass(frozen=True)
class L2(Ball):
    """√(Σ_j δ_j²) ≤ eps: the Euclidean length of the change is at most `eps`.

    The random start is uniform in the *volume* of the ball: a Gaussian direction times
    eps · U^(1/d), d being the number of values in a record. (A radius of eps · U would crowd the
    starts around the clean input.)
    """

    name: ClassVar[str] = "l2"

    def random_start(self, like: Tensor, generator: torch.Generator) -> Tensor:
        direction = _empty_on_generator(like, generator).normal_(generator=generator)
        direction /= _per_record_l2(direction).clamp_min(torch.finfo(like.dtype).tiny)
        values = max(like[0].numel(), 1) if len(like) else 1
        radius = torch.empty(
            (len(like),) + (1,) * (like.ndim - 1), dtype=like.dtype, device=generator.device
        ).uniform_(generator=generator)
        return direction.mul_(self.eps * radius.pow_(1 / values)).to(like.device)

    def steepest(self, grad: Tensor) -> Tensor:
        norm = _per_record_l2(grad)
        # A zero or non-finite gradient gives no direction: stay, instead of moving to NaN.
        usable = norm.isfinite() & (norm > 0)
        return torch.where(usable, grad / torch.where(usable, norm, 1.0), 0.0)

    def project_(self, delta: Tensor) -> Tensor:
        norm = _per_record_l2(delta)
        return delta.mul_(self.eps / norm.clamp_min(self.eps)) if self.eps else delta.zero_()

    def norm(self, delta: Tensor) -> Tensor:
        return _per_record_l2(delta).flatten()
