"""The gradient of one record, as autograd has it: right for any layer."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from defend.errors import PrivacyError
from defend.privacy.gradients.engine import GradientEngine
from defend.privacy.gradients.sums import as_real, per_record_norms, weighted_sum


class OneRecord(GradientEngine):
    """The engine that takes one record a chunk: gᵢ is what its backward left in every `p.grad`.

    *Guarantee.* Nothing is asked of the layers: whatever the step computes from a batch that holds
    one record is that record's. Complex weights stand as pairs of real numbers, the gradient in
    the real and in the imaginary part.

    Args:
        module: the module whose parameters are meant; nothing is installed on it.
        views: rows of a record, K ≥ 1.
        loss_reduction: whether backward starts from the "mean" over the rows or from their "sum".
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        views: int = 1,
        loss_reduction: Literal["mean", "sum"] = "mean",
    ) -> None:
        self.views, self.loss_reduction = views, loss_reduction
        self.parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self._gradients: list[Tensor] | None = None
        self._norms: Tensor | None = None

    def expect(self, rows: int) -> None:
        """Announce the rows of one record.

        Raises:
            PrivacyError: if there are others.
        """
        if rows != self.views:
            raise PrivacyError(
                f"Expected {self.views} rows, those of one record, got {rows}. Take one record a "
                "chunk."
            )

    def read(self) -> list[Tensor]:
        """gᵢ of the last backward, one tensor a parameter; zeros where the loss did not use it."""
        scale = 1 / self.views if self.loss_reduction == "sum" else 1.0
        return [
            torch.zeros_like(as_real(p))
            if p.grad is None
            else as_real(p.grad.detach().to_dense()) * scale
            for p in self.parameters.values()
        ]

    def norms(self, rows: int, *, grouped: bool) -> Tensor:
        """‖gᵢ‖₂, `[1]`; `[1, parameters]` where grouped."""
        self.expect(rows)
        self._gradients = [g.unsqueeze(0) for g in self.read()]
        self._norms = per_record_norms(self._gradients, grouped=grouped)
        return self._norms

    def weighted_sum(self, factors: Tensor) -> list[Tensor]:
        """fᵢ gᵢ."""
        assert self._gradients is not None, "norms come before their sum"
        assert self._norms is not None
        return weighted_sum(self._gradients, self._norms, factors)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, what a backward leaves in `p.grad` is no record's."""
        held = [p.grad for p in self.parameters.values()]
        for p in self.parameters.values():
            p.grad = None  # or it would be added to
        try:
            yield
        finally:
            for p, gradient in zip(self.parameters.values(), held, strict=True):
                p.grad = gradient

    def clear(self) -> None:
        """Forget the gradient."""
        for p in self.parameters.values():
            p.grad = None
        self._gradients = self._norms = None

    def remove(self) -> None:
        """Leave no private gradient on the module."""
        self.clear()
