"""How σ and C change over a training: factors by step, accounted step by step."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from defend.errors import InputError

Schedule = Callable[[int], float]
"""Step of the plan, from 0 → factor > 0 on σ or C."""


@dataclass(frozen=True)
class Decay:
    """factor(t) = gamma ^ ⌊t / every⌋.

    With every = 1 exponential, with a larger one in stairs; gamma > 1 grows. Fewer, longer stairs
    are accounted faster than a new σ at each step. Any function of the step does as well, as long
    as it does not look at the data.

    Args:
        gamma: factor > 0 from one stair to the next.
        every: steps on a stair, ≥ 1.

    Raises:
        InputError: for settings out of range.
    """

    gamma: float
    every: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.gamma < math.inf:
            raise InputError(f"Expected `gamma` to be > 0 and finite, got {self.gamma}.")
        if self.every < 1:
            raise InputError(f"Expected `every` to be ≥ 1, got {self.every}.")

    def __call__(self, step: int) -> float:
        return self.gamma ** (step // self.every)


def factor(schedule: Schedule | None, step: int) -> float:
    """The factor at `step`; 1 without a schedule.

    Raises:
        InputError: if the schedule gives anything but a finite number > 0.
    """
    if schedule is None:
        return 1.0
    try:
        value = float(schedule(step))
    except OverflowError:
        value = math.inf
    if not 0 < value < math.inf:
        raise InputError(
            f"Expected a schedule to give a finite factor > 0, got {value} at step {step}. To end "
            "the noise is to end the privacy."
        )
    return value
