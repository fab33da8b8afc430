"""What a private run reports, whatever drives its loop."""

from abc import abstractmethod
from pathlib import Path

from defend.privacy.accounting.history import History
from defend.privacy.checks.selftest import SelfTest
from defend.training.private import PrivateTraining


class PrivacyReport:
    """ε and all that it comes from, as properties of a callback or a loop."""

    @abstractmethod
    def _up_to_date(self) -> PrivateTraining:
        """The training, with what other processes learned."""

    @property
    def epsilon(self) -> float:
        """ε spent so far at `delta`; 0 before the first step."""
        return self._up_to_date().budget.epsilon

    @property
    def delta(self) -> float:
        """δ."""
        return self._up_to_date().settings.delta

    @property
    def noise_multiplier(self) -> float | None:
        """σ, before a schedule; None until it is found at the start of a fit."""
        return self._up_to_date().budget.noise_multiplier

    @property
    def max_grad_norm(self) -> float:
        """C; where it is learned or scheduled, that of the last step."""
        return self._up_to_date().max_grad_norm

    @property
    def sample_rate(self) -> float | None:
        """q, the probability that a record joins a batch; None until the data is known."""
        return self._up_to_date().budget.sample_rate

    @property
    def steps(self) -> int:
        """Steps charged so far, over all fits on the ledger, those of lost branches included."""
        return self._up_to_date().budget.steps

    @property
    def history(self) -> History:
        """All that was charged: (noise_multiplier, sample_rate, steps) in order."""
        return self._up_to_date().budget.history

    @property
    def private(self) -> bool:
        """Whether `epsilon` means anything.

        Not where a step used a fixed seed, went without noise or was found to be unsound.
        """
        return self._up_to_date().budget.private

    @property
    def ledger_path(self) -> Path | None:
        """The ledger's file; None without one, and before the first fit."""
        return self._up_to_date().account.path

    @property
    def selftest(self) -> SelfTest | None:
        """What the self-test of the last fit found; None before it, or where it was left out."""
        return self._up_to_date().selftest
