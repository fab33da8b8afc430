"""What becomes of a cell: refused, detected, safe, or a promise of the user's; nothing else."""

import torch

from defend import PrivacyError
from tests.contracts.matrix.cells import ONCE, RECORDS, VICTIM, Cell, records
from tests.contracts.matrix.programs import C, run

REFUSED, DETECTED, SAFE, PROMISE = "refused", "detected", "safe", "promise"
SLACK = 1e-3


def promised(cell: Cell) -> str | None:
    """Why a cell is the user's to answer for; None where it is not."""
    if cell.what == "others":
        return "an item is a function of its own record"
    if cell.place.startswith("item") and cell.what == "known numbers":
        return "where one item sets a seed, each does"
    if cell.trigger == "once":
        return "a step that is bad once is met with the chance of the coin"
    if cell.place in ("own loop, loss", "attack") and cell.trigger == "periodic":
        return "so is one that is bad now and then, by a count that is kept outside of the step"
    return None


def verdict(cell: Cell) -> tuple[str, str]:
    """One of the four words, or "silent" or "error"; and how it was found."""
    seen: list[list[float]] = []
    whole = records(cell.trigger)
    try:
        sums, module = run(cell, whole, seen)
    except PrivacyError as error:
        return (DETECTED if seen else REFUSED), f"step {len(seen)}: {_first_line(error)}"
    except Exception as error:
        return "error", f"{type(error).__name__}: {_first_line(error)}"
    moved = _moved(cell, whole, sums, module)
    if moved <= 1:
        return SAFE, f"{moved:.3f}"
    return (PROMISE if promised(cell) else "silent"), f"{moved:.2f}"


def _moved(cell: Cell, whole, sums, module) -> float:
    """How far one record moves a released sum: in units of C without it, of 2 C replaced."""
    if any(
        p.grad is not None for part in getattr(module, "outside", []) for p in part.parameters()
    ):
        return float("inf")  # raw gradients
    if cell.what == "known numbers" and not _draw_alike(cell, whole, sums):
        return 0.0
    keep = [i for i in range(RECORDS) if i != VICTIM]
    other = [t.clone() for t in whole]
    for mine, fresh in zip(other, records("always", seed=1), strict=True):
        mine[VICTIM] = fresh[VICTIM]
    without, _ = run(cell, [t[keep] for t in whole], guarded=False)
    replaced, _ = run(cell, other, guarded=False)
    most = max(_distance(sums, without), _distance(sums, replaced) / 2) / C
    published = _published(module) if cell.what == "published" else 0.0
    return max(most / (1 + SLACK), published)


def _draw_alike(cell: Cell, whole, sums) -> bool:
    """Whether two runs that start alike draw alike in a step in which a seed was set."""
    again, _ = run(cell, whole, guarded=False)
    steps = [ONCE, ONCE + 1] if cell.trigger == "once" else range(len(sums))
    same = [torch.allclose(sums[t], again[t], atol=C * SLACK) for t in steps if t < len(sums)]
    return any(same)


def _published(module) -> float:
    """A buffer that was filled from the records, without noise."""
    return float("inf") if module.published.abs().sum() > 0 else 0.0


def _distance(one, other) -> float:
    return max(float((a - b).norm()) for a, b in zip(one, other, strict=True))


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return (lines[1] if lines[0].startswith("The self-test") and len(lines) > 1 else lines[0])[:150]
