"""Ways to clip: one norm for the whole gradient, one for each parameter, or one that is learned.

A rule maps the norms of records to the factors that their gradients are multiplied by, and knows
neither the gradients nor how their norms were found. Each keeps the L2 sensitivity of what is
released at C, so the accounting is the same for all.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from defend.errors import InputError, PrivacyError
from defend.privacy.mechanism.gaussian import clip_factors


class Clipping(ABC):
    """How records are clipped: one of the three classes below, or a rule of one's own.

    A rule gives `factors`; one that releases a `statistic` beside the gradient also says how it is
    noised (`noise`), and what becomes of C (`learns`, `update`).

    Not a union of the three: a command line that builds its arguments from YAML would take the
    first class that fits and forget which one was asked for.

    Attributes:
        grouped: whether the rule looks at one norm a parameter, instead of one over all.
        learns: whether C moves with what is released.
    """

    grouped: ClassVar[bool] = False
    learns: ClassVar[bool] = False

    @abstractmethod
    def factors(self, norms: Tensor, max_grad_norm: float) -> Tensor:
        """What each gradient is multiplied by, so that one record moves the sum by at most C.

        Args:
            norms: ‖gᵢ‖, shape `[N]`; `[N, parameters]` where `grouped`.
            max_grad_norm: C > 0.

        Returns:
            Factors in the shape of `norms`; 0 where a norm is not finite.
        """

    def statistic(self, norms: Tensor, max_grad_norm: float) -> Tensor | None:
        """A number for each record, `[N]`; its noised sum is released beside the gradient.

        One record moves the sum by at most the largest number in size: `noise` has to cover it.
        """
        return None

    def noise(self, noise_multiplier: float, expected_batch_size: float) -> tuple[float, float]:
        """The noise of the gradient and of the statistic, which together cost what σ costs.

        Args:
            noise_multiplier: σ ≥ 0, which the step is charged for.
            expected_batch_size: q · N.

        Returns:
            The gradient's noise multiplier, and the standard deviation of the statistic's noise.

        Raises:
            InputError: if the statistic alone would cost more than σ.
        """
        return noise_multiplier, 0.0

    def update(
        self, max_grad_norm: float, noised_statistic: float, expected_batch_size: float
    ) -> float:
        """The next C, from the noised statistic of this step alone."""
        return max_grad_norm


@dataclass(frozen=True)
class FlatClipping(Clipping):
    """Each record's whole gradient is clipped to C (Abadi et al. 2016, arXiv 1607.00133)."""

    def factors(self, norms: Tensor, max_grad_norm: float) -> Tensor:
        """min(1, C / ‖gᵢ‖)."""
        return clip_factors(norms, max_grad_norm)


@dataclass(frozen=True)
class PerLayerClipping(Clipping):
    """Each of K parameters is clipped on its own, to C / √K (McMahan et al. 2018, 1710.06963).

    Together they stay within √(K · C² / K) = C. Small gradients of one layer are then not drowned
    by large ones of another.
    """

    grouped: ClassVar[bool] = True

    def factors(self, norms: Tensor, max_grad_norm: float) -> Tensor:
        """min(1, C / (√K ‖gᵢₖ‖)) for each parameter k."""
        return clip_factors(norms, max_grad_norm / math.sqrt(norms.shape[1]))


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

    learns: ClassVar[bool] = True

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

    def factors(self, norms: Tensor, max_grad_norm: float) -> Tensor:
        """min(1, C / ‖gᵢ‖)."""
        return clip_factors(norms, max_grad_norm)

    def statistic(self, norms: Tensor, max_grad_norm: float) -> Tensor:
        """1[‖gᵢ‖ ≤ C] − ½; a norm that is not finite counts as clipped."""
        return (norms <= max_grad_norm).to(norms.dtype) - 0.5

    def noise(self, noise_multiplier: float, expected_batch_size: float) -> tuple[float, float]:
        """σ_Δ, the noise multiplier that is left for the gradient, and σ_b.

        Raises:
            InputError: if σ_b is too small to leave any noise to spend on the gradient.
        """
        if noise_multiplier == 0:
            return 0.0, 0.0
        deviation = self.count_noise
        if deviation is None:
            deviation = max(expected_batch_size / 20, noise_multiplier)
        elif deviation <= noise_multiplier / 2:
            raise InputError(
                f"Expected `count_noise` above noise_multiplier / 2 = {noise_multiplier / 2:.4g}, "
                f"got {deviation}: the count alone would spend the step's budget. Raise it."
            )
        return (noise_multiplier**-2 - (2 * deviation) ** -2) ** -0.5, deviation

    def update(
        self, max_grad_norm: float, noised_statistic: float, expected_batch_size: float
    ) -> float:
        """C · exp(−η (b̃ − γ)), within `smallest` and `largest`."""
        below = 0.5 + noised_statistic / expected_batch_size
        log_norm = math.log(max_grad_norm) - self.learning_rate * (below - self.target_quantile)
        smallest, largest = math.log(self.smallest), math.log(self.largest)
        return math.exp(min(max(log_norm, smallest), largest))


def checked_noise(
    clipping: Clipping, noise_multiplier: float, expected_batch_size: float
) -> tuple[float, float]:
    """`clipping.noise`, of a rule that does not release its statistic as it is.

    Raises:
        PrivacyError: if a statistic would be released without noise in a step that has some.
    """
    sigma, deviation = clipping.noise(noise_multiplier, expected_batch_size)
    own = type(clipping).statistic is not Clipping.statistic
    if own and noise_multiplier > 0 and not deviation > 0:
        raise PrivacyError(
            f"Expected {type(clipping).__name__}.noise to give its statistic a deviation > 0, got "
            f"{deviation}: the statistic would be released as it is. Override `noise`."
        )
    return sigma, deviation


def check_clipping(clipping: object) -> None:
    """Refuse what is no rule, and a rule that lets a record move the sum by more than C.

    It is tried on norms far below and far above C, together and one by one. What a rule does at
    other norms, or later on, is its author's promise.

    Raises:
        InputError: for what is no rule, or gives no factor for each norm.
        PrivacyError: for factors that do not bound a record, or depend on other records.
    """
    if not isinstance(clipping, Clipping):
        raise InputError(
            "Expected `clipping` to be FlatClipping(), PerLayerClipping() or AdaptiveClipping(), "
            f"got {clipping!r}."
        )
    norms, bound = torch.logspace(-4, 4, 9), 1.0
    if clipping.grouped:
        norms = torch.stack([norms, norms.flip(0), norms / 2], dim=1)
    factors = clipping.factors(norms.clone(), bound)
    alone = torch.cat([clipping.factors(row.clone(), bound) for row in norms.split(1)])
    name = type(clipping).__name__
    if factors.shape != norms.shape:
        raise InputError(
            f"Expected {name}.factors to give one factor for each norm, shape "
            f"{tuple(norms.shape)}, got {tuple(factors.shape)}."
        )
    moved = (factors * norms).reshape(len(norms), -1).norm(dim=1)
    if not (torch.allclose(factors, alone) and moved.max() <= bound * (1 + 1e-5)):
        raise PrivacyError(
            f"Expected {name}.factors to bring each record's gradient to a norm of at most C, "
            "whatever the other records are, got a rule that does not. One record could move the "
            "sum further than the noise is made for."
        )
