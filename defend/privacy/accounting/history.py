"""What was run: segments of steps at one σ and q, and a plan under a schedule as such segments."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from defend.privacy.mechanism.schedules import factor


class Segment(NamedTuple):
    """`steps` steps in a row at constant σ and q.

    Attributes:
        noise_multiplier: σ, the noise's standard deviation in units of the clipping norm C.
        sample_rate: q, the probability that a record joins a batch.
        steps: how many.
    """

    noise_multiplier: float
    sample_rate: float
    steps: int


History = tuple[Segment, ...]


def extend(history: Iterable[Segment], segment: Segment) -> History:
    """`history` followed by `segment`, merged with the last one where σ and q are the same."""
    done = tuple(history)
    if segment.steps == 0:
        return done
    if done and done[-1][:2] == segment[:2]:
        return (*done[:-1], segment._replace(steps=done[-1].steps + segment.steps))
    return (*done, segment)


def total_steps(history: Iterable[Segment]) -> int:
    """All steps of a history."""
    return sum(segment.steps for segment in history)


def scheduled(
    noise_multiplier: float,
    sample_rate: float,
    steps: int,
    schedule: Callable[[int], float] | None = None,
    first_step: int = 0,
) -> History:
    """`steps` steps at σ_t = σ·schedule(t), t = first_step, first_step + 1, …

    Args:
        noise_multiplier: σ ≥ 0, before the schedule.
        sample_rate: q in [0, 1].
        steps: how many, ≥ 0.
        schedule: step → finite factor > 0 on σ; None for 1.
        first_step: t of the first step.

    Returns:
        Neighbours of equal σ as one segment.

    Raises:
        InputError: if the schedule gives anything but a finite number > 0.
    """
    if schedule is None:
        return extend((), Segment(noise_multiplier, sample_rate, steps))
    runs: list[Segment] = []
    for t in range(first_step, first_step + steps):
        sigma = noise_multiplier * factor(schedule, t)
        if runs and runs[-1].noise_multiplier == sigma:
            runs[-1] = runs[-1]._replace(steps=runs[-1].steps + 1)
        else:
            runs.append(Segment(sigma, sample_rate, 1))
    return tuple(runs)
