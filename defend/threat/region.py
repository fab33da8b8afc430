"""Where a perturbation of one batch may go: the box, the ball's radius, and what may change."""

import dataclasses
from typing import Self

import torch
from torch import Tensor


def rows_of(t: Tensor, rows: slice | Tensor) -> Tensor:
    """The rows of a tensor that has one row a record, or one row for all, or is one number."""
    return t if t.ndim == 0 or len(t) == 1 else t[rows]


@dataclasses.dataclass(frozen=True)
class Region:
    """The legal δ of a batch, in raw units: lower ≤ δ ≤ upper and ‖δ_i‖ ≤ eps_i.

    The box holds δ = 0, lies within [−eps, eps] in every coordinate (as every ball does), and is
    {0} in coordinates that may not change.

    Attributes:
        lower: smallest legal δ `[N, ...]`, ≤ 0.
        upper: largest legal δ `[N, ...]`, ≥ 0.
        eps: radius of the ball, 0-dimensional, or `[N, 1, ...]` with one for each record.
        free: True where δ may change at all, `[N, ...]` or broadcastable to it; None means
            everywhere.
    """

    lower: Tensor
    upper: Tensor
    eps: Tensor
    free: Tensor | None = None

    def rows(self, rows: slice | Tensor) -> Self:
        """The region of some records: a slice of rows, or their indices."""
        return dataclasses.replace(
            self,
            lower=self.lower[rows],
            upper=self.upper[rows],
            eps=rows_of(self.eps, rows),
            free=None if self.free is None else rows_of(self.free, rows),
        )

    def hold(self, grad: Tensor) -> Tensor:
        """A gradient without the coordinates that may not change."""
        return grad if self.free is None else torch.where(self.free, grad, 0.0)
