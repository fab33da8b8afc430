"""What a gradient engine answers: the norm of each record's gradient, then their weighted sum.

Clipping needs no gradient of a record by itself. It needs the norms ‖gᵢ‖, turns them into factors
fᵢ, and then needs Σᵢ fᵢ gᵢ. An engine may hold all gᵢ in memory, or never compute one of them.
"""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager

from torch import Tensor, nn


class GradientEngine(ABC):
    """Watches a module, and answers for the chunk whose backward has just run.

        engine.expect(rows)
        loss(chunk).backward()
        norms = engine.norms(rows, grouped=False)
        sums = engine.weighted_sum(factors_of(norms))
        engine.clear()

    Attributes:
        parameters: the trainable parameters by name. Every list of tensors follows their order.
            Gradients of complex ones are pairs of real numbers, `[*shape, 2]`.
    """

    parameters: dict[str, nn.Parameter]

    @property
    def holds_any(self) -> bool:
        """Whether gradients of records came in since the last `clear`, unseen in any `p.grad`."""
        return False

    @abstractmethod
    def expect(self, rows: int) -> None:
        """Announce the next chunk, before its forward: its rows, padding and views included."""

    @abstractmethod
    def norms(self, rows: int, *, grouped: bool) -> Tensor:
        """‖gᵢ‖₂ of each record of the chunk.

        Args:
            rows: rows that were in the chunk, padding and views included.
            grouped: False for the norm over all parameters, `[N]`; True for one norm a parameter,
                `[N, parameters]`.

        Raises:
            IndistinctRowsError: if the gradients of the records cannot be told apart.
        """

    @abstractmethod
    def weighted_sum(self, factors: Tensor) -> list[Tensor]:
        """Σᵢ fᵢ gᵢ, one tensor of the parameter's shape for each; to be called after `norms`.

        Args:
            factors: fᵢ in the shape of the norms. Where a norm is not finite the record adds 0,
                whatever its factor is.
        """

    @abstractmethod
    def paused(self) -> AbstractContextManager[None]:
        """Inside, forward and backward on the module are not watched."""

    @abstractmethod
    def clear(self) -> None:
        """Forget every gradient, of records and summed, and how many rows were expected."""

    @abstractmethod
    def remove(self) -> None:
        """Stop watching, and leave the module as it was, with no private gradient on it."""
