"""The README's table of sensitivities. `python -m tests.contracts.sensitivity_table` writes it."""

import os
from collections.abc import Iterator

import torch

from tests.contracts.planted import PLANTED, move_of
from tests.contracts.sensitivity import CHUNKS, EVERY, OBJECTIVES, RANKS, VIEWS, table
from tests.contracts.table import README

BEGIN, END = "<!-- sensitivity: begin -->", "<!-- sensitivity: end -->"


def lines() -> Iterator[str]:
    """The section between the markers, line by line."""
    yield f"| supported, worst of {len(CHUNKS)} chunk sizes and 1 to {max(RANKS)} processes | " + (
        " | ".join(f"{views} view{'s' * (views > 1)}" for views in VIEWS) + " |"
    )
    yield "|---|" + "---:|" * len(VIEWS)
    for objective in OBJECTIVES:
        moves = (f"{worst(objective, views):.4f} C" for views in VIEWS)
        yield f"| {objective} | " + " | ".join(moves) + " |"
    yield from ("", "| planted | one record moves the sum by |", "|---|---:|")
    for name in PLANTED:
        yield f"| {name} | {move_of(name):.2f} C |"


def worst(objective: str, views: int) -> float:
    """The largest move over all chunk sizes and numbers of processes."""
    return max(
        move
        for ranks in RANKS
        for combination, move in table(ranks).items()
        if (combination.objective, combination.views) == (objective, views)
    )


def main() -> None:
    torch.set_num_threads(1)
    os.environ[EVERY] = "yes"
    new = "\n".join([BEGIN, *lines(), END])
    head, rest = README.read_text().split(BEGIN)
    README.write_text(head + new + rest.split(END)[1])


if __name__ == "__main__":
    main()
