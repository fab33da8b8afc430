"""Ways to clip: one norm for the whole gradient, one for each parameter, or one that is learned.

Each keeps the L2 sensitivity of what is released at C, so the accounting is the same for all.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from defend.errors import InputError
from defend.privacy.mechanism.gaussian import (
    clip_and_sum,
    clip_factors,
    per_record_norms,
    scale_and_sum,
)


class Clipping(ABC):
    """How records are clipped: one of the three classes below.

    Not a union of them: a command line that builds its arguments from YAML would take the first
    class that fits and forget which one was asked for.
    """

    @abstractmethod
    def clip(
        self, gradients: Sequence[Tensor], max_grad_norm: float, weights: Tensor | None
    ) -> tuple[list[Tensor], Tensor | None]:
        """The clipped sums of one chunk, and a count to release beside them, or None.

        Args:
            gradients: one tensor `[N, *parameter.shape]` for each parameter.
            max_grad_norm: C > 0; one record moves the sums, taken together, by at most C.
            weights: 1 for a record and 0 for padding, shape `[N]`; None means all 1.
        """


@dataclass(frozen=True)
class FlatClipping(Clipping):
    """Each record's whole gradient is clipped to C (Abadi et al. 2016, arXiv 1607.00133)."""

    def clip(
        self, gradients: Sequence[Tensor], max_grad_norm: float, weights: Tensor | None
    ) -> tuple[list[Tensor], Tensor | None]:
        """The clipped sums, and no count."""
        return clip_and_sum(gradients, max_grad_norm, weights), None


@dataclass(frozen=True)
class PerLayerClipping(Clipping):
    """Each of K parameters is clipped on its own, to C / √K (McMahan et al. 2018, 1710.06963).

    Together they stay within √(K · C² / K) = C. Small gradients of one layer are then not drowned
    by large ones of another.
    """

    def clip(
        self, gradients: Sequence[Tensor], max_grad_norm: float, weights: Tensor | None
    ) -> tuple[list[Tensor], Tensor | None]:
        """The clipped sums, and no count."""
        share = max_grad_norm / math.sqrt(max(len(gradients), 1))
        return [clip_and_sum([g], share, weights)[0] for g in gradients], None


@dataclass(frozen=True)
class AdaptiveClipping(Clipping):
    r"""C follows a quantile of the records' gradient norms (Andrew et al. 2021, arXiv 1905.03871).

    Each step also releases how many of its records had a norm below C,

        b̃ = ½ + ( Σᵢ (1[‖gᵢ‖ ≤ C] − ½) + N(0, σ_b²) ) / (q · N)        C ← C · exp(−η (b̃ − γ))

    One record moves the centred count by ½. So that count and gradient together cost what σ alone
    costs, the gradient's noise is raised to σ_Δ = (σ⁻² − (2 σ_b)⁻²)^(−½) (their Theorem 1); ε is
    that of σ.

    Args:
        target_quantile: γ in (0, 1), the share of records that should stay unclipped.
        learning_rate: η > 0.
        count_noise: σ_b > σ / 2; None takes the paper's expected batch size / 20, but never less
            than σ.
        smallest: C never falls below it.
        largest: C never rises above it.

    Raises:
        InputError: for settings out of range.
    """

    target_quantile: float = 0.5
    learning_rate: float = 0.2
    count_noise: float | None = None
    smallest: float = 1e-6
    largest: float = 1e6

    def __post_init__(self) -> None:
        if not 0 < self.target_quantile < 1:
            raise InputError(
                f"Expected `target_quantile` to be in (0, 1), got {self.target_quantile}."
            )
        if not 0 < self.learning_rate < math.inf:
            raise InputError(f"Expected `learning_rate` to be > 0, got {self.learning_rate}.")
        if self.count_noise is not None and not 0 < self.count_noise < math.inf:
            raise InputError(f"Expected `count_noise` to be > 0, got {self.count_noise}.")
        if not 0 < self.smallest < self.largest < math.inf:
            raise InputError(
                "Expected 0 < `smallest` < `largest`, got "
                f"smallest={self.smallest}, largest={self.largest}."
            )

    def clip(
        self, gradients: Sequence[Tensor], max_grad_norm: float, weights: Tensor | None
    ) -> tuple[list[Tensor], Tensor | None]:
        """The clipped sums, and Σ (1[‖gᵢ‖ ≤ C] − ½) over the records that count."""
        norms = per_record_norms(gradients)
        factors = clip_factors(norms, max_grad_norm)
        below = (norms <= max_grad_norm).to(norms.dtype) - 0.5
        if weights is not None:
            below = below * weights.to(below)
        return scale_and_sum(gradients, norms, factors, weights), below.sum()

    def count_deviation(self, noise_multiplier: float, expected_batch_size: float) -> float:
        """σ_b for a σ.

        Raises:
            InputError: if σ_b is too small to leave any noise to spend on the gradient.
        """
        if self.count_noise is None:
            return max(expected_batch_size / 20, noise_multiplier)
        if self.count_noise <= noise_multiplier / 2:
            raise InputError(
                f"Expected `count_noise` above noise_multiplier / 2 = {noise_multiplier / 2:.4g}, "
                f"got {self.count_noise}: the count alone would spend the step's budget. Raise it."
            )
        return self.count_noise

    def gradient_multiplier(self, noise_multiplier: float, expected_batch_size: float) -> float:
        """σ_Δ, the noise multiplier that is left for the gradient."""
        if noise_multiplier == 0:
            return 0.0
        count = 2 * self.count_deviation(noise_multiplier, expected_batch_size)
        return (noise_multiplier**-2 - count**-2) ** -0.5

    def update(
        self, max_grad_norm: float, noised_count: float, expected_batch_size: float
    ) -> float:
        """The next C, from the noised count of this step alone."""
        below = 0.5 + noised_count / expected_batch_size
        log_norm = math.log(max_grad_norm) - self.learning_rate * (below - self.target_quantile)
        smallest, largest = math.log(self.smallest), math.log(self.largest)
        return math.exp(min(max(log_norm, smallest), largest))


def check_clipping(clipping: object) -> None:
    """Raise an `InputError` unless `clipping` is one of the three."""
    if not isinstance(clipping, Clipping):
        raise InputError(
            "Expected `clipping` to be FlatClipping(), PerLayerClipping() or AdaptiveClipping(), "
            f"got {clipping!r}."
        )
