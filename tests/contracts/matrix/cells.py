"""The cells: place × what × trigger, as far as they make sense."""

import re
from dataclasses import dataclass

import numpy as np
import torch

RECORDS, VICTIM, WIDTH = 12, 4, 8
RARE_LABEL, RARE_LENGTH, USUAL_LENGTH, OUTLIER, IGNORED = 2, 1, 3, 1e3, -100
LATE, ONCE, PERIOD = 14, 30, 5  # looks see steps 0 to 27

# Of data: something rare is in the batch. Of time: from a step on, in every fifth, in one.
DATA = ("always", "rare label", "rare length", "rare mask", "-100", "outlier", "zero")
TIME = ("late", "periodic", "once")
TRIGGERS = (*DATA, *TIME)

IN_THE_BATCH = ("coupled", "twice", "carried")
AFTERWARDS = ("published", "carried", "known numbers")

PLACES: dict[str, tuple[str, ...]] = {
    "item": ("others", "known numbers"),
    "item, worker": ("others", "known numbers"),
    "collate": (*IN_THE_BATCH, "known numbers"),
    "collate, worker": (*IN_THE_BATCH, "known numbers"),
    "before transfer": (*IN_THE_BATCH, "known numbers"),
    "after transfer": (*IN_THE_BATCH, "known numbers"),
    "batch start, module": (*IN_THE_BATCH, "known numbers"),
    "batch start, callback": (*IN_THE_BATCH, "known numbers"),
    "training_step": (*IN_THE_BATCH, "published", "known numbers"),
    "forward": (*IN_THE_BATCH, "published", "known numbers"),
    "loss": ("coupled", "carried", "outside", "known numbers"),
    **dict.fromkeys(("before zero_grad, module", "before zero_grad, callback"), AFTERWARDS),
    **dict.fromkeys(("after backward, module", "after backward, callback"), AFTERWARDS),
    **dict.fromkeys(("before the update, module", "before the update, callback"), AFTERWARDS),
    "optimizer_step": AFTERWARDS,
    **dict.fromkeys(("batch end, module", "batch end, callback"), AFTERWARDS),
    **dict.fromkeys(("epoch end, module", "epoch end, callback"), AFTERWARDS),
    **dict.fromkeys(("epoch start, module", "epoch start, callback"), AFTERWARDS),
    "attack": ("coupled", "carried", "known numbers"),
    "own loop, loss": (*IN_THE_BATCH, "published", "outside", "known numbers"),
    "own loop, before the step": ("coupled", "twice", "known numbers"),
    "own loop, after the step": AFTERWARDS,
}
SOUND = "row by row"  # in each place but those where nothing can be tried out
_UNTRIED = ("own loop, before the step", "own loop, after the step")


@dataclass(frozen=True)
class Cell:
    """A program: what is done, where, and when."""

    place: str
    what: str
    trigger: str

    def __str__(self) -> str:
        return f"{self.place} / {self.what} / {self.trigger}"


def steps_of(trigger: str) -> int:
    """How many it takes until the trigger was on and something came of it."""
    return {"once": ONCE + 2, "late": LATE + 4}.get(trigger, PERIOD + 3)


def triggers_of(place: str, what: str) -> tuple[str, ...]:
    """When it makes sense: a seed does not wait for a record, an attack sees points and labels."""
    if place.startswith("item") and what == SOUND:
        return ("always",)  # an item that counts depends on how many were loaded before
    if place == "attack" and what in IN_THE_BATCH:
        return ("always", "rare label", "outlier", "zero", *TIME)
    return {
        "known numbers": ("always", *TIME),
        "others": ("always", "rare label", "outlier"),
        "outside": ("always", "rare label", "late"),
        SOUND: ("always", "late", "periodic"),
    }.get(what, TRIGGERS)


def all_cells() -> list[Cell]:
    """Every sensible cell, in a fixed order."""
    whats = {p: w if p in _UNTRIED else (*w, SOUND) for p, w in PLACES.items()}
    return [Cell(p, w, t) for p, some in whats.items() for w in some for t in triggers_of(p, w)]


def pairwise(cells: list[Cell]) -> list[Cell]:
    """Few cells that hold all `pairs`.

    Those that end early are preferred: what is refused takes one short fit, what is not three.
    """
    open_pairs = {pair for cell in cells for pair in pairs(cell)}
    order = np.random.default_rng(0).permutation(len(cells))  # no favourites among equals
    chosen = []
    while open_pairs:
        shuffled = (cells[i] for i in order)
        best = max(shuffled, key=lambda cell: len(pairs(cell) & open_pairs) / _fits(cell))
        chosen.append(best)
        open_pairs -= pairs(best)
    return chosen


def _fits(cell: Cell) -> int:
    """About how many fits it takes, in which nobody finds anything."""
    if cell.what == "known numbers":
        return 2
    goes_on = cell.what in (SOUND, "others") or cell.trigger == "once"
    return 3 if goes_on and cell.what != "published" else 1


def pairs(cell: Cell) -> set[tuple[str, ...]]:
    """What a cover holds: of a trigger the kind of place, be it the module's or a callback's."""
    kind = re.sub(", (module|callback|worker)$", "", cell.place)
    return {
        ("place, what", cell.place, cell.what),
        ("kind of place, trigger", kind, cell.trigger),
        ("what, trigger", cell.what, cell.trigger),
    }


def records(trigger: str, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Points, labels, lengths, masks and tags; the victim is what a trigger waits for."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(RECORDS, WIDTH, generator=generator)
    y, length = torch.arange(RECORDS) % 2, torch.full((RECORDS,), USUAL_LENGTH)
    mask, tags = torch.ones(RECORDS, 4, dtype=torch.long), torch.arange(RECORDS * 4).view(-1, 4) % 3
    if trigger == "rare label":
        y[VICTIM] = RARE_LABEL
    elif trigger == "rare length":
        length[VICTIM] = RARE_LENGTH
    elif trigger == "rare mask":
        mask[VICTIM, 1:] = 0
    elif trigger == "-100":
        tags[VICTIM, 2:] = IGNORED
    elif trigger in ("outlier", "zero"):
        x[VICTIM] *= OUTLIER if trigger == "outlier" else 0.0
    return x, y, length, mask, tags
