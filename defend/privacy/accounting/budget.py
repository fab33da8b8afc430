"""What may be spent and what was: σ for a target, steps for a budget, and the history of all."""

import functools
import hashlib
import math
import uuid
import warnings
from typing import Any

from defend.errors import BudgetError, InputError
from defend.privacy.accounting.calibration import affordable_steps, noise_multiplier_for
from defend.privacy.accounting.curve import ACCOUNTANTS, EpsilonCurve, epsilon
from defend.privacy.accounting.history import History, Segment, extend, scheduled, total_steps
from defend.privacy.mechanism.schedules import Schedule, factor

_STEPS_WITHOUT_END = 1000  # of a plan without an end, whose ε is computed at a time


class Budget:
    """The privacy account of one training run, over all its fits and resumes.

    Args:
        delta: δ in (0, 1).
        target_epsilon: ε that is not exceeded, or None for no limit.
        noise_multiplier: σ ≥ 0, or None to have it found for the target.
        accountant: "prv" or "rdp".
        insecure: whether noise and sampling use a fixed seed.
        noise_schedule: step of the plan → factor on σ, or None for a constant σ.

    Attributes:
        noise_multiplier: σ of the last fit, before the schedule; None until it is found.
        sample_rate: q of the last fit; None until the data is known.

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
        noise_schedule: Schedule | None = None,
    ) -> None:
        _check_settings(delta, target_epsilon, noise_multiplier, accountant)
        self.delta = delta
        self.target_epsilon = target_epsilon
        self.accountant = accountant
        self.noise_multiplier = noise_multiplier
        self.sample_rate: float | None = None
        self.schedule = None if noise_schedule is None else _Factors(noise_schedule)
        # Each fit's steps under a name of its own, so that accounts can be united: what two of
        # them share is counted once, what only one of them knows is counted too.
        self.fits: dict[str, History] = {}
        self.unions = 0  # how often fits of elsewhere were taken up
        self._given_noise = noise_multiplier
        self._insecure = insecure  # this run, or one that it goes on from
        self._plan: dict[str, Any] | None = None  # what σ was found for

    @property
    def history(self) -> History:
        """All steps ever charged, in order."""
        history: History = ()
        for fit in self.fits.values():
            for segment in fit:
                history = extend(history, segment)
        return history

    @property
    def epsilon(self) -> float:
        """ε spent by the whole history."""
        return epsilon(self.history, self.delta, self.accountant)

    @property
    def steps(self) -> int:
        """Steps charged, over all fits."""
        return total_steps(self.history)

    @property
    def private(self) -> bool:
        """Whether ε means anything.

        Not where a step used a fixed seed, went without noise or was found to be unsound.
        """
        return not self._insecure and self.noise_multiplier != 0 and math.isfinite(self.epsilon)

    def doubt(self) -> None:
        """What was spent is not known any more: a step was found to be unsound."""
        self._insecure = True

    def open(self, *, sample_rate: float, planned: float, done: int) -> "FitBudget":
        """Fix σ and the number of steps that a fit may take.

        Args:
            sample_rate: q of this fit.
            planned: steps of the whole training, those done included; inf for no end.
            done: steps of that plan taken before, by a run that is resumed.

        Raises:
            InputError: if σ is to be found for a plan without an end, or none meets the target.
        """
        self.sample_rate = sample_rate
        remaining = math.inf if math.isinf(planned) else max(int(planned) - done, 0)
        if self._given_noise is None:
            self.noise_multiplier, allowed = self._found_noise(remaining, done), remaining
        else:
            self.noise_multiplier = self._given_noise
            allowed = self._affordable(remaining, done)
        return FitBudget(
            self, self.noise_multiplier, sample_rate, first=done, remaining=remaining,
            allowed=allowed,
        )  # fmt: skip

    def schedule_from(self, first: int) -> Schedule | None:
        """The schedule as a fit sees it that starts at a step of the plan."""
        schedule = self.schedule
        return None if schedule is None else lambda step: schedule(first + step)

    def _affordable(self, remaining: float, done: int) -> float:
        """Steps that a given σ leaves."""
        sigma, schedule = self.noise_multiplier, self.schedule_from(done)
        if self.target_epsilon is None:
            return math.inf
        assert sigma is not None
        assert self.sample_rate is not None
        return affordable_steps(
            self.target_epsilon,
            delta=self.delta,
            noise_multiplier=(
                sigma if schedule is None or sigma == 0 else lambda step: sigma * schedule(step)
            ),
            sample_rate=self.sample_rate,
            limit=None if math.isinf(remaining) else int(remaining),
            spent=self.history,
            accountant=self.accountant,
        )

    def _found_noise(self, remaining: float, done: int) -> float:
        """σ for the target."""
        if math.isinf(remaining):
            raise InputError(
                "Expected a plan with an end to find the noise for `target_epsilon`, got "
                "max_epochs=-1 and max_steps=-1. Set one of them, or give `noise_multiplier` too."
            )
        if remaining == 0:
            if self._plan is not None:
                return self._plan["noise_multiplier"]
            return self.history[-1].noise_multiplier if self.history else 0.0
        assert self.target_epsilon is not None
        assert self.sample_rate is not None
        whole = int(remaining) + done
        plan = {
            "target_epsilon": self.target_epsilon,
            "delta": self.delta,
            "accountant": self.accountant,
            "sample_rate": self.sample_rate,
            "steps": whole,
            "schedule": None if self.schedule is None else self.schedule.digest(whole),
        }
        if self._plan is not None and self._plan["for"] == plan and self.steps == done:
            # The same plan goes on after a resume, at the noise that was found for all of it.
            return self._plan["noise_multiplier"]
        sigma = noise_multiplier_for(
            self.target_epsilon,
            delta=self.delta,
            sample_rate=self.sample_rate,
            steps=int(remaining),
            spent=self.history,
            accountant=self.accountant,
            schedule=self.schedule_from(done),
        )
        self._plan = {"for": plan, "noise_multiplier": sigma}
        if self.steps:
            self._tell_what_was_spent(sigma, done)
        return sigma

    def _tell_what_was_spent(self, sigma: float, done: int) -> None:
        lost = self.steps - done
        why = (
            f"{lost} of them after the checkpoint or in other branches: nothing is refunded."
            if done and lost > 0
            else "on what the account takes for the same data; where it is not, start a new "
            "account and ledger."
        )
        warnings.warn(
            f"ε = {self.epsilon:.4g} of {self.target_epsilon} was spent by {self.steps} "
            f"earlier steps, {why} That leaves "
            f"noise_multiplier={sigma:.4g} for the rest.",
            stacklevel=4,
        )

    def state_dict(self) -> dict[str, Any]:
        """The account as plain data; holds no secret."""
        return {
            "fits": {name: [list(s) for s in fit] for name, fit in self.fits.items()},
            "plan": self._plan,
            "insecure": self._insecure,
        }

    def merge(self, state: dict[str, Any]) -> None:
        """Take up what a saved account has spent: the union of its fits and those known here.

        A fit known to both counts with the larger number of steps, so a rollback does not refund.
        """
        saved = {name: tuple(Segment(*s) for s in fit) for name, fit in state["fits"].items()}
        self.unite(saved, insecure=state["insecure"])
        self._plan = state["plan"]

    def unite(self, fits: dict[str, History], *, insecure: bool) -> None:
        """Take up fits by name, as a ledger or another account knows them."""
        merged = {
            name: max(fit, self.fits.get(name, ()), key=total_steps) for name, fit in fits.items()
        }
        self.fits = {**merged, **{n: f for n, f in self.fits.items() if n not in merged}}
        self._insecure |= insecure
        self.unions += 1


class FitBudget:
    """What one fit may spend: σ, q, and the steps that are allowed. `Budget.open` makes it.

    Attributes:
        budget: the account that it charges.
        name: of this fit in the account.
        noise_multiplier: σ, before the schedule.
        sample_rate: q.
    """

    def __init__(
        self,
        budget: Budget,
        noise_multiplier: float,
        sample_rate: float,
        *,
        first: int,
        remaining: float,
        allowed: float,
    ) -> None:
        self.budget, self.name = budget, uuid.uuid4().hex
        self.noise_multiplier, self.sample_rate = noise_multiplier, sample_rate
        self._first = first  # step of the plan that this fit starts at
        self._remaining, self._allowed = remaining, allowed
        self._taken = 0

    @property
    def next_step(self) -> int:
        """Step of the plan that comes next, those before a resume included."""
        return self._first + self._taken

    @property
    def next_noise(self) -> float:
        """σ of the next step, after the schedule."""
        return self._planned_noise(self.next_step)

    def _planned_noise(self, step: int) -> float:
        schedule = self.budget.schedule
        return self.noise_multiplier * (1.0 if schedule is None else schedule(step))

    @property
    def planned_noise(self) -> set[float]:
        """Every σ that the rest of the plan uses; of a plan without an end, that of now."""
        left = min(self._allowed, self._remaining)
        steps = 1 if math.isinf(left) else int(left)
        return {self._planned_noise(self._first + i) for i in range(max(steps, 1))}

    @property
    def names(self) -> set[str]:
        """The names of all fits in the account, this one included."""
        return {*self.budget.fits, self.name}

    @property
    def exhausted(self) -> bool:
        """Whether this fit may take no further step."""
        return self._taken >= self._allowed

    def check(self) -> None:
        """Raise a `BudgetError` if a further step would exceed the target."""
        if self.exhausted:
            raise BudgetError(
                f"Expected to stop at ε = {self.budget.target_epsilon}, got a further step after "
                f"{self.budget.steps}, beyond it or beyond the plan. Stop there: a loop of your "
                "own ends when `exhausted`, a Trainer without min_epochs and min_steps; or raise "
                "target_epsilon."
            )

    def charge(self, noise_multiplier: float | None = None) -> int:
        """Count a step; to be called before it is released. Returns its number in the plan.

        Args:
            noise_multiplier: σ that the step is taken with; None: what the schedule says.

        Raises:
            BudgetError: if the step would exceed the target; it is not counted then.
        """
        self.check()
        number, fits = self.next_step, self.budget.fits
        sigma = self.next_noise if noise_multiplier is None else noise_multiplier
        fits[self.name] = extend(fits.get(self.name, ()), Segment(sigma, self.sample_rate, 1))
        self._taken += 1
        return number

    def epsilon_now(self) -> float:
        """ε spent so far, or a tight upper bound on it, at the cost of a lookup.

        The curve over all steps of the plan is computed once (`EpsilonCurve`).
        """
        start, unions, curve = self._curve
        if unions != self.budget.unions or self._taken - start > curve.steps:
            del self._curve
            start, _, curve = self._curve
        return curve(self._taken - start)

    @functools.cached_property
    def _curve(self) -> tuple[int, int, EpsilonCurve]:
        """Where a curve starts, how many unions it knows of, and the curve, from now on."""
        left = min(self._allowed, self._remaining) - self._taken
        ahead = _STEPS_WITHOUT_END if math.isinf(left) else max(int(left), 0)
        budget = self.budget
        plan = scheduled(
            self.noise_multiplier, self.sample_rate, ahead, budget.schedule_from(self.next_step)
        )
        curve = EpsilonCurve(plan, budget.delta, budget.accountant, spent=budget.history)
        return self._taken, budget.unions, curve


class _Factors:
    """A schedule that is asked once a step, as a function need not answer alike twice."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._known: dict[int, float] = {}

    def __call__(self, step: int) -> float:
        if step not in self._known:
            self._known[step] = factor(self._schedule, step)
        return self._known[step]

    def digest(self, steps: int) -> str:
        """Tells one schedule from another by what it gives."""
        factors = ",".join(repr(self(step)) for step in range(steps))
        return hashlib.sha256(factors.encode()).hexdigest()


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
    known = ACCOUNTANTS
    expect(accountant in known, f"`accountant` to be one of {known}", accountant)
