"""How many rows fit into memory: measured on two small steps, not guessed."""

from collections.abc import Callable

_SHARE = 0.8  # of the free memory; the rest is for fragments and what other steps need
_FEW, _MORE = 4, 12


def rows_that_fit(measure: Callable[[int], int], free: int, *, most: int) -> int:
    """The largest number of rows whose step stays within 0.8 of the free memory.

    Memory grows linearly in the rows: bytes(n) = fixed + n · per_row. Two measurements give both.

    Args:
        measure: rows → peak bytes of a step on that many rows, above what was there before.
        free: bytes that may be used.
        most: never more than this, ≥ 1.

    Returns:
        Rows, from 1 to `most`. A step that does not fit after all is halved when it fails.
    """
    few, more = min(_FEW, most), min(_MORE, most)
    if few == more:
        return most
    low, high = measure(few), measure(more)
    per_row = max((high - low) / (more - few), 1.0)
    fixed = max(low - few * per_row, 0.0)
    return max(1, min(most, int((_SHARE * free - fixed) / per_row)))
