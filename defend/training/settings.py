"""What a user asks of DP-SGD, checked once, for every kind of training loop."""

import math
from dataclasses import dataclass
from pathlib import Path

from defend.batching.chunks import check_chunk_size
from defend.errors import InputError
from defend.privacy.accounting.budget import Budget
from defend.privacy.mechanism.clipping import (
    AdaptiveClipping,
    Clipping,
    FlatClipping,
    check_clipping,
)
from defend.privacy.mechanism.randomness import Randomness
from defend.privacy.mechanism.schedules import Schedule

RELEASES = ("tag", "withhold")


@dataclass(frozen=True, kw_only=True)
class PrivacySettings:
    """Settings of DP-SGD; `DifferentialPrivacy` and `make_private` say what each one means.

    Raises:
        InputError: for settings out of range.
    """

    delta: float
    max_grad_norm: float
    target_epsilon: float | None = None
    noise_multiplier: float | None = None
    accountant: str = "prv"
    chunk_size: int | str | None = "auto"
    clipping: Clipping = FlatClipping()
    views: int = 1
    noise_schedule: Schedule | None = None
    clip_schedule: Schedule | None = None
    ledger: str | Path | bool | None = None
    selftest: bool = True
    secure_noise: bool = False
    insecure_seed: int | None = None

    def __post_init__(self) -> None:
        self.budget()
        if not 0 < self.max_grad_norm < math.inf:
            raise InputError(
                f"Expected `max_grad_norm` to be > 0 and finite, got {self.max_grad_norm}."
            )
        check_chunk_size(self.chunk_size)
        check_clipping(self.clipping)
        if not isinstance(self.views, int) or isinstance(self.views, bool) or self.views < 1:
            raise InputError(
                f"Expected `views` to be an integer ≥ 1, got {self.views!r}. It is the number of "
                "rows of each record whose gradients are averaged before the clip."
            )
        for name in ("noise_schedule", "clip_schedule"):
            schedule = getattr(self, name)
            if schedule is not None and not callable(schedule):
                raise InputError(
                    f"Expected `{name}` to be a function of the step, such as Decay(0.99), got "
                    f"{schedule!r}."
                )
        if self.clip_schedule is not None and isinstance(self.clipping, AdaptiveClipping):
            raise InputError(
                "Expected `clip_schedule` or AdaptiveClipping, got both: each of them sets C. "
                "Drop one."
            )
        if self.ledger is True:
            raise InputError(
                "Expected `ledger` to be None (in the default place), a path, or False (none), "
                "got True."
            )
        # Refuses a bad seed, and a secure generator that is not installed.
        Randomness(self.insecure_seed, secure=self.secure_noise)

    def budget(self) -> Budget:
        """A new, empty account for these settings."""
        return Budget(
            delta=self.delta,
            target_epsilon=self.target_epsilon,
            noise_multiplier=self.noise_multiplier,
            accountant=self.accountant,
            insecure=self.insecure_seed is not None,
            noise_schedule=self.noise_schedule,
        )
