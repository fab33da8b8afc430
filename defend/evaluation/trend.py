"""From single readings of robustness to whether catastrophic overfitting shows in them."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

# Readings are pooled until they hold this many records: the accuracy of fewer is mostly noise.
_MIN_RECORDS = 128
# Standard deviations. The best of a thousand readings is three of them too good by luck alone.
_Z_SCORE = 3.0


@dataclasses.dataclass(frozen=True)
class Reading:
    """What one look at a few training records gave.

    Attributes:
        pgd_accuracy: share that is right under PGD.
        single_step_accuracy: share that is right under the attack that is trained against.
        single_step_loss: mean cross-entropy under that attack, in nats.
        alarm: whether catastrophic overfitting is seen.
        records: records looked at.
        chance: share of the most frequent class among all records looked at so far: what a
            constant answer gets right, whatever the attack.
    """

    pgd_accuracy: float
    single_step_accuracy: float
    single_step_loss: float
    alarm: bool
    records: int
    chance: float


class RobustnessTrend:
    r"""Whether catastrophic overfitting shows, reading by reading.

    Readings in a row are pooled until they hold 128 records; p is their PGD accuracy, L their mean
    single-step loss, and [p⁻, p⁺] the Wilson interval of p at z = 3. "Best" are the pooled readings
    of highest p⁻ so far. Overfitting shows if

        p⁺_now < drop · p⁻_best,    p⁻_best > chance    and    L_now < L_best

    - The first, and not p_now < drop · p_best, because the best of many noisy readings is best by
      luck. Were robustness constant, noise would set it off about once in 10⁷ readings at
      drop = 0.5, and once in 10³ at 0.9. A fall to 0% is seen from a best of 23% on.
    - The second, because at first a model answers one class to everything, which no attack
      changes. It is right on that class's share of the records, and loses this "robustness" as it
      learns.
    - The third, because a training that diverges loses robustness too, but its loss rises. Where
      robustness falls while the training's own loss falls, the model fools the attack.

    Only the best and the last readings are kept, so that each costs the same after a million.

    Args:
        drop: in (0, 1).
    """

    def __init__(self, drop: float) -> None:
        self._drop = drop
        self._recent: list[Reading] = []
        self._best: _Pooled | None = None

    def add(self, reading: Reading) -> bool:
        """Take up the next reading.

        Returns:
            Whether overfitting shows in it; False where there are too few records so far, or a
            loss is not finite.
        """
        self._recent.append(reading)
        while sum(r.records for r in self._recent[1:]) >= _MIN_RECORDS:
            del self._recent[0]
        now = _pooled(self._recent)
        if now is None:
            return False
        if self._best is None or now.lower > self._best.lower:
            self._best = now
        best = self._best
        lost = now.upper < self._drop * best.lower
        return lost and best.lower > reading.chance and now.loss < best.loss

    def state_dict(self) -> dict[str, Any]:
        """What it keeps, as plain data."""
        return {
            "recent": [dataclasses.asdict(reading) for reading in self._recent],
            "best": None if self._best is None else dataclasses.asdict(self._best),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state."""
        best = state_dict["best"]
        self._recent = [Reading(**reading) for reading in state_dict["recent"]]
        self._best = None if best is None else _Pooled(**best)


@dataclasses.dataclass(frozen=True)
class _Pooled:
    """Some readings in a row, pooled."""

    lower: float
    upper: float
    loss: float


def _pooled(readings: Sequence[Reading]) -> _Pooled | None:
    """The readings as one; None if they hold too few records."""
    records = sum(r.records for r in readings)
    if records < _MIN_RECORDS:
        return None
    right = sum(r.records * r.pgd_accuracy for r in readings)
    loss = sum(r.records * r.single_step_loss for r in readings)
    return _Pooled(*wilson(right / records, records, _Z_SCORE), loss / records)


def wilson(share: float, n: int, z: float) -> tuple[float, float]:
    """The probabilities p that a share seen in n trials is within z deviations of (Wilson 1927).

    The two solutions of |share − p| = z · √(p(1 − p)/n). Unlike share ± z · √(share(1 − share)/n),
    not a point where the share is 0 or 1.

    Args:
        share: in [0, 1].
        n: trials, ≥ 1.
        z: > 0.

    Returns:
        (lower, upper), both in [0, 1].
    """
    extra = z * z / n
    centre = share + extra / 2
    half = math.sqrt(extra * (share * (1 - share) + extra / 4))
    return max(0.0, (centre - half) / (1 + extra)), min(1.0, (centre + half) / (1 + extra))
