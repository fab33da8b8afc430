"""What may be spent and what was: σ for a target, steps for a budget, and the history of all."""

import math
import uuid
import warnings
from typing import Any

from defend.errors import BudgetError, InputError
from defend.privacy import accounting
from defend.privacy.accounting import History, Segment

# ε is computed exactly this many times over a fit; in between, the next one is shown.
_EPSILON_POINTS = 20


class Budget:
    """The privacy account of one training run, over all its fits and resumes.

    Args:
        delta: δ in (0, 1).
        target_epsilon: ε that is not exceeded, or None for no limit.
        noise_multiplier: σ ≥ 0, or None to have it found for the target.
        accountant: "prv" or "rdp".
        insecure: whether noise and sampling use a fixed seed.

    Attributes:
        noise_multiplier: σ of the current fit; None until it is found.
        sample_rate: q of the current fit; None until the data is known.

    Raises:
        InputError: for settings out of range.
    """

    def __init__(
        self,
        *,
        delta: float,
        target_epsilon: float | None = None,
        noise_multiplier: float | None = None,
        accountant: str = "prv",
        insecure: bool = False,
    ) -> None:
        _check_settings(delta, target_epsilon, noise_multiplier, accountant)
        self.delta = delta
        self.target_epsilon = target_epsilon
        self.accountant = accountant
        self.noise_multiplier = noise_multiplier
        self.sample_rate: float | None = None
        # Each fit's steps under a name of its own, so that accounts can be united: what two of
        # them share is counted once, what only one of them knows is counted too.
        self._fits: dict[str, Segment] = {}
        self._fit = ""
        self._given_noise = noise_multiplier
        self._insecure = insecure  # this run, or one that it goes on from
        self._plan: dict[str, Any] | None = None  # what σ was found for
        self._before: History = ()  # history at the start of this fit
        self._allowed: float = 0
        self._taken = 0
        self._stride = 1

    @property
    def history(self) -> History:
        """All steps ever charged, in order."""
        history: History = ()
        for segment in self._fits.values():
            history = accounting.extend(history, segment)
        return history

    @property
    def epsilon(self) -> float:
        """ε spent by the whole history."""
        return accounting.epsilon(self.history, self.delta, self.accountant)

    @property
    def steps(self) -> int:
        """Steps charged, over all fits."""
        return accounting.total_steps(self.history)

    @property
    def private(self) -> bool:
        """Whether ε means anything: no step used a fixed seed or went without noise."""
        return not self._insecure and self.noise_multiplier != 0 and math.isfinite(self.epsilon)

    @property
    def exhausted(self) -> bool:
        """Whether this fit may take no further step."""
        return self._taken >= self._allowed

    def open(self, *, sample_rate: float, planned: float, done: int) -> None:
        """Fix σ and the number of steps that a fit may take.

        Args:
            sample_rate: q of this fit.
            planned: steps of the whole training, those done included; inf for no end.
            done: steps of that plan taken before, by a run that is resumed.

        Raises:
            InputError: if σ is to be found for a plan without an end, or none meets the target.
        """
        self.sample_rate = sample_rate
        self._before, self._taken = self.history, 0
        self._fit = uuid.uuid4().hex
        remaining = None if math.isinf(planned) else max(int(planned) - done, 0)
        if self._given_noise is None:
            self._find_noise(remaining, done)
        else:
            self.noise_multiplier = self._given_noise
            self._find_allowance(remaining)
        expected = self._allowed if remaining is None else min(remaining, self._allowed)
        endless = math.isinf(expected)
        self._stride = 500 if endless else max(1, math.ceil(expected / _EPSILON_POINTS))

    def _find_allowance(self, remaining: int | None) -> None:
        self._allowed = math.inf
        if self.target_epsilon is not None:
            assert self.noise_multiplier is not None
            assert self.sample_rate is not None
            self._allowed = accounting.affordable_steps(
                self.target_epsilon,
                delta=self.delta,
                noise_multiplier=self.noise_multiplier,
                sample_rate=self.sample_rate,
                limit=remaining,
                spent=self.history,
                accountant=self.accountant,
            )

    def _find_noise(self, remaining: int | None, done: int) -> None:
        assert self.target_epsilon is not None
        assert self.sample_rate is not None
        if remaining is None:
            raise InputError(
                "Expected a plan with an end to find the noise for `target_epsilon`, got "
                "max_epochs=-1 and max_steps=-1. Set one of them, or give `noise_multiplier` too."
            )
        self._allowed = remaining
        if remaining == 0:
            self.noise_multiplier = self.history[-1].noise_multiplier if self.history else 0.0
            return
        plan = {
            "target_epsilon": self.target_epsilon,
            "delta": self.delta,
            "accountant": self.accountant,
            "sample_rate": self.sample_rate,
            "steps": remaining + done,
        }
        if self._plan is not None and self._plan["for"] == plan and self.steps == done:
            # The same plan goes on after a resume, at the noise that was found for all of it.
            self.noise_multiplier = self._plan["noise_multiplier"]
            return
        self.noise_multiplier = accounting.noise_multiplier_for(
            self.target_epsilon,
            delta=self.delta,
            sample_rate=self.sample_rate,
            steps=remaining,
            spent=self.history,
            accountant=self.accountant,
        )
        self._plan = {"for": plan, "noise_multiplier": self.noise_multiplier}
        if self.steps:
            warnings.warn(
                f"ε = {self.epsilon:.4g} of {self.target_epsilon} was spent by {self.steps} "
                f"earlier steps, which leaves noise_multiplier={self.noise_multiplier:.4g} for the "
                "rest. If those trained another model on other data, use a new "
                "DifferentialPrivacy.",
                stacklevel=2,
            )

    def charge(self) -> int:
        """Count a step; to be called before it is released. Returns its number, from 0.

        Raises:
            BudgetError: if the step would exceed the target; it is not counted then.
        """
        if self.exhausted:
            raise BudgetError(
                f"Expected to stop at ε = {self.target_epsilon}, got a further step after "
                f"{self.steps} that would exceed it. Remove min_epochs and min_steps, or raise "
                "target_epsilon."
            )
        number = self.steps
        self._taken += 1
        self._fits[self._fit] = self._segment(self._taken)
        return number

    def epsilon_ahead(self) -> float:
        """ε at the next point of a coarse grid of steps: exact there, an upper bound before.

        An accountant takes up to seconds for one ε; this asks it some 20 times a fit.
        """
        ahead = min(math.ceil(self._taken / self._stride) * self._stride, self._allowed)
        history = accounting.extend(self._before, self._segment(int(ahead)))
        return accounting.epsilon(history, self.delta, self.accountant)

    def _segment(self, steps: int) -> Segment:
        assert self.noise_multiplier is not None
        assert self.sample_rate is not None
        return Segment(self.noise_multiplier, self.sample_rate, steps)

    def state_dict(self) -> dict[str, Any]:
        """The account as plain data; holds no secret."""
        return {
            "fits": {name: list(segment) for name, segment in self._fits.items()},
            "plan": self._plan,
            "insecure": self._insecure,
        }

    def merge(self, state: dict[str, Any]) -> None:
        """Take up what a saved account has spent: the union of its fits and those known here.

        A fit known to both counts with the larger number of steps, so a rollback does not refund.
        """
        merged: dict[str, Segment] = {}
        for name, saved in state["fits"].items():
            segment = Segment(*saved)
            known = self._fits.get(name, segment)
            merged[name] = max(segment, known, key=lambda s: s.steps)
        self._fits = {**merged, **{n: s for n, s in self._fits.items() if n not in merged}}
        self._plan = state["plan"]
        self._insecure |= state["insecure"]


def _check_settings(
    delta: float, target_epsilon: float | None, noise_multiplier: float | None, accountant: str
) -> None:
    def expect(right: bool, what: str, got: Any, cure: str = "") -> None:
        if not right:
            raise InputError(f"Expected {what}, got {got!r}. {cure}".rstrip())

    expect(0 < delta < 1, "`delta` to be in (0, 1)", delta, "Choose it below 1 / records.")
    expect(
        target_epsilon is not None or noise_multiplier is not None,
        "`target_epsilon`, `noise_multiplier` or both",
        None,
    )
    if target_epsilon is not None:
        expect(0 < target_epsilon < math.inf, "`target_epsilon` to be > 0", target_epsilon)
    if noise_multiplier is not None:
        expect(0 <= noise_multiplier < math.inf, "`noise_multiplier` to be ≥ 0", noise_multiplier)
    known = accounting.ACCOUNTANTS
    expect(accountant in known, f"`accountant` to be one of {known}", accountant)
