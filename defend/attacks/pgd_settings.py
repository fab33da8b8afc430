"""The settings of PGD: its losses, and checks of what goes together."""

from typing import Any

import torch
from torch import Tensor

from defend.attacks.ascent import PerRecordLoss
from defend.attacks.precision import PRECISIONS
from defend.errors import InputError
from defend.objectives.losses import cross_entropy, kl, margin, targeted_margin
from defend.threat.balls import Ball
from defend.threat.inputs import InputSpace, check_rows

LOSSES: dict[str, PerRecordLoss] = {
    "ce": cross_entropy,
    "margin": margin,
    "kl": lambda logits, clean: kl(clean, logits),
}


def loss_of(loss: str | PerRecordLoss, *, targeted: bool) -> PerRecordLoss:
    """The loss of each record that a setting stands for."""
    if not isinstance(loss, str):
        return loss
    return targeted_margin if targeted and loss == "margin" else LOSSES[loss]


def narrowest_width(inputs: InputSpace) -> float:
    """Width of the box in the channel where it is smallest, of those that may change."""
    low, high = (torch.tensor(v, dtype=torch.float64) for v in (inputs.low, inputs.high))
    widths = (high - low).reshape(-1)
    free = [i for i in range(len(widths)) if len(widths) == 1 or i not in inputs.immutable]
    return float(widths[free].min()) if free else float("inf")


def check_threat(ball: Any, inputs: Any) -> None:
    """Refuse what is no ball in a box.

    Raises:
        InputError: so do all checks of this file.
    """
    if not isinstance(ball, Ball):
        raise InputError(f"Expected `ball` to be a ball such as Linf(8 / 255), got {ball!r}.")
    if not isinstance(inputs, InputSpace):
        raise InputError(f"Expected `inputs` to be an InputSpace, got {inputs!r}.")
    inputs.check_radius(ball)


def check_numbers(
    steps: Any, restarts: Any, step_size: float | None, start_radius: float | None
) -> None:
    """Refuse counts that are not at least 1, and lengths that are not positive."""
    for name, count in (("steps", steps), ("restarts", restarts)):
        if not isinstance(count, int) or count < 1:
            raise InputError(f"Expected `{name}` to be an integer ≥ 1, got {count!r}.")
    for name, length in (("step_size", step_size), ("start_radius", start_radius)):
        if length is not None and not 0 < length < float("inf"):
            raise InputError(f"Expected `{name}` to be > 0 or None, got {length}.")


def check_choices(loss: Any, iterate: Any, precision: Any) -> None:
    """Refuse names that stand for nothing."""
    if isinstance(loss, str) and loss not in LOSSES:
        raise InputError(
            f"Expected `loss` to be one of {sorted(LOSSES)} or a callable "
            f"(logits, y) -> [N], got {loss!r}."
        )
    if iterate not in (None, "last", "best"):
        raise InputError(f"Expected `iterate` to be 'last' or 'best', got {iterate!r}.")
    if precision not in (None, *PRECISIONS):
        raise InputError(
            f"Expected `precision` to be None or one of {sorted(PRECISIONS)}, got {precision!r}."
        )


def check_combination(loss: Any, targeted: bool, random_start: bool, restarts: int) -> None:
    """Refuse settings that are fine one by one and senseless together."""
    if targeted and loss == "kl":
        raise InputError(
            "Expected another loss than 'kl' with targeted=True: the divergence from the "
            "clean input knows no target. Use 'ce' or 'margin'."
        )
    if not random_start and restarts > 1:
        raise InputError(
            "Expected `random_start=True` with restarts > 1, got False: every restart would "
            "be the same run."
        )
    if not random_start and loss == "kl":
        raise InputError(
            "Expected `random_start=True` with loss='kl', got False: the divergence has no "
            "gradient at the clean input itself."
        )


def check_batch(x: Any, y: Any, *, channels_last: bool) -> None:
    """Refuse a batch that is not one row of x and y for each record."""
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        raise InputError(
            f"Expected x and y to be tensors, got {type(x).__name__} and {type(y).__name__}. "
            "Give one target a record, whatever the loss."
        )
    check_rows(x)
    if channels_last and x.ndim != 4:
        raise InputError(
            f"Expected images [N, C, H, W] with channels_last=True, got shape {tuple(x.shape)}."
        )
    if len(x) != len(y):
        raise InputError(f"Expected one target a record, got {len(x)} inputs, {len(y)} targets.")
