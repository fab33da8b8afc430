"""When a private step is tried out again: on a schedule, and at moments that nobody can foresee."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from defend.privacy.checks.dry_run import is_due

# Of the time of a fit that looks by chance take. What goes wrong from some step on is met after
# 1 / rate steps on average, and was met by then with a chance of 1 − 1/e.
_SHARE = 0.005
_SHARED_RATE = 2**-11  # of several processes, which look together and have clocks of their own


class Looks:
    """Decides before each step whether it is tried out.

    Beside the schedule of `is_due` by a coin: a step that is bad between two looks of the schedule
    only is met in the long run. The coin's rate is such that these looks take about 0.5% of the
    time; where several processes have to look together, it is one step in 2048.

    Args:
        coin: step of the fit → a number in [0, 1) that is secret, and the same on all processes.
        alone: whether this process is the only one.

    Attributes:
        good: steps of the fit that were taken when nothing was found last.
        steps: of the fit that were begun.
    """

    def __init__(self, coin: Callable[[int], float], *, alone: bool = True) -> None:
        self.good = 0
        self._coin, self._alone = coin, alone
        self.steps = self._epochs = 0
        self._begun = time.perf_counter()
        self._seconds, self._count = 0.0, 0  # of looks

    def are_due(self, epochs: int) -> bool:
        """Whether to look before the step that comes next.

        Args:
            epochs: of this fit that were begun.
        """
        first, self._epochs = epochs > self._epochs, epochs
        step, self.steps = self.steps, self.steps + 1
        due = is_due(step, epochs - 1, first_of_epoch=first)
        return due or self._coin(step) < self.rate(step)

    def rate(self, steps: int) -> float:
        """The chance of a look before a step, after so many steps; 0 before the first look."""
        if not self._alone:
            return _SHARED_RATE
        if not (steps and self._count):
            return 0.0
        training = time.perf_counter() - self._begun - self._seconds
        return _SHARE * (training / steps) / (self._seconds / self._count)

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Around a look; one that ends without an error found nothing."""
        start = time.perf_counter()
        try:
            yield
            self.good = max(self.steps - 1, 0)
        finally:
            self._seconds += time.perf_counter() - start
            self._count += 1
