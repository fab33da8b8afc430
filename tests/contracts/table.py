"""The README's table of silent breaks. `python -m tests.contracts.table` runs all and writes it."""

import logging
import re
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import torch

from tests.contracts import opacus_alone
from tests.contracts.outcomes import Outcome
from tests.contracts.rows import ROWS
from tests.contracts.verdicts import defend, opacus

README = Path(__file__).parents[2] / "README.md"
HEADING = "## What breaks DP-SGD in silence"
BEGIN, END = "<!-- silent breaks: begin -->", "<!-- silent breaks: end -->"
NEXT = "## Where to look next"

INTRO = """\
Each row was run twice, on Opacus alone and on defend, by `python -m tests.contracts.table`, which
writes this table; `tests/contracts/test_silent_breaks.py` holds it to what is found.
"""

LEGEND = """\
"accepts: 1.63 C": it goes on in silence, and one record moves the clipped sum by 1.63 times what
the noise is made for, or more. "refused": an error with a cure, before the break reaches a released
weight. "detected by the self-test": the same, from the probe of the user's own step on seven
records, before the first step or when it looks again later. "safe": it goes on, and what is
measured is right. "–": not measured; most of these need Lightning, and Opacus has no callback.
"""

_DEFEND = {
    "refused": "refused",
    "self-test": "detected by the self-test",
    "open": "**open**",
}


def _sensitivity(outcome: Outcome) -> str | None:
    found = re.match(r"sensitivity ([\d.]+) C", outcome.detail)
    if found is None:
        return None
    value = float(found[1])
    return "just above 1 C" if 1.001 < value < 1.01 else f"{value:.2f} C"


def opacus_cell(key: str) -> str:
    if key not in opacus_alone.BREAKS:
        return "–"
    outcome = opacus(key)
    figure = _sensitivity(outcome)
    worth_telling = outcome.verdict == "accepts" and figure and "1.00 C" not in figure
    return f"{outcome.verdict}: {figure}" if worth_telling else outcome.verdict


def defend_cell(key: str) -> str:
    outcome = defend(key)
    if outcome.verdict != "safe":
        return _DEFEND[outcome.verdict]
    return f"safe: {_sensitivity(outcome) or outcome.detail}"


def lines() -> Iterator[str]:
    """The section between the markers, line by line."""
    yield from INTRO.splitlines()
    yield ""
    yield from LEGEND.splitlines()
    yield ""
    yield from (f"<details><summary>{_summary()}</summary>", "")
    yield f"| what breaks the guarantee | Opacus {version('opacus')} alone | defend |"
    yield "|---|---|---|"
    for group, rows in ROWS.items():
        yield f"| **{group}** | | |"
        for title, key in rows:
            yield f"| {title} | {opacus_cell(key)} | {defend_cell(key)} |"
    yield from ("", "</details>")


def _summary() -> str:
    keys = [key for rows in ROWS.values() for _, key in rows]
    accepted = [k for k in keys if k in opacus_alone.BREAKS and opacus(k).verdict == "accepts"]
    verdicts = [defend(key).verdict for key in keys]
    counts = f"{verdicts.count('refused')} refused, {verdicts.count('self-test')} detected"
    return (
        f"{len(keys)} rows: Opacus alone accepts {len(accepted)} of the breaks; under defend "
        f"{counts}, {verdicts.count('safe')} safe, {verdicts.count('open')} open"
    )


def section() -> str:
    return "\n".join([BEGIN, *lines(), END])


def write(text: str, new: str) -> str:
    """`text` with the section replaced, or put before the last heading where there is none yet."""
    if BEGIN in text:
        head, rest = text.split(BEGIN)
        return head + new + rest.split(END)[1]
    return text.replace(NEXT, f"{HEADING}\n\n{new}\n\n{NEXT}", 1)


def main() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    new = section()  # first: it takes a minute, and the file may change meanwhile
    README.write_text(write(README.read_text(), new))


if __name__ == "__main__":
    main()
