"""Runs all cells, two at a time, and writes the table: `make matrix`. Goes on where it was stopped.

python -m tests.contracts.matrix [--only PART] [--again]
"""

import argparse
import json
import logging
import os
import subprocess
import sys
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.contracts.matrix.cells import PLACES, TRIGGERS, Cell, all_cells

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / ".matrix.jsonl"  # of this machine; the table is committed
TABLE = ROOT / "docs" / "matrix.md"
SIGNS = {"refused": "R", "detected": "D", "safe": "·", "promise": "P"}
_AT_ONCE = 50  # cells in a process


def results() -> dict[Cell, tuple[str, str]]:
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    rows = [json.loads(line) for line in lines]
    return {Cell(*row["cell"]): (row["verdict"], row["how"]) for row in rows}


def table(found: dict[Cell, tuple[str, str]]) -> str:
    """The matrix in Markdown."""
    cells = all_cells()
    counts = Counter(found[cell][0] for cell in cells)
    shares = ", ".join(f"{counts[name]} {name}" for name in SIGNS)
    others = len(cells) - sum(counts[name] for name in SIGNS)
    lines = [
        "# Where user code can break a private run: the matrix",
        "",
        f"{len(cells)} small programs, each with one break: {shares}, {others} others. "
        "`make matrix` runs them all and writes this page; `make test` runs a part that holds "
        "every pair of place and what, what and trigger, trigger and kind of place.",
        "",
        "R: refused before the first step. D: detected in the fit, which ends with an error. ·: "
        "one record moves no released sum by more than C (2 C replaced), or nothing known is "
        "drawn. P: the user's promise ([where your code runs](where_your_code_runs.md)).",
        "",
        "| place | what | " + " | ".join(TRIGGERS) + " |",
        "|---|---|" + ":-:|" * len(TRIGGERS),
    ]
    for place in PLACES:
        for what in dict.fromkeys(c.what for c in cells if c.place == place):
            row = [
                SIGNS.get(found[Cell(place, what, t)][0], "**!**")
                if Cell(place, what, t) in found
                else ""
                for t in TRIGGERS
            ]
            lines.append(f"| {place} | {what} | " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def run_some(cells: list[Cell]) -> None:
    """Cells in a process of their own, a line for each."""
    command = [sys.executable, "-m", "tests.contracts.matrix", "--cells"]
    given = json.dumps([[c.place, c.what, c.trigger] for c in cells])
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, input=given, text=True, cwd=ROOT, env=environment, check=True)


def judge_some(cells: list[Cell]) -> None:
    from tests.contracts.matrix.judge import verdict

    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for cell in cells:
        word, how = verdict(cell)
        row = {"cell": [cell.place, cell.what, cell.trigger], "verdict": word, "how": how}
        with RESULTS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if word not in SIGNS:
            print(f"{cell}: {word} ({how})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="a part of a cell's name")
    parser.add_argument("--again", action="store_true", help="forget earlier results")
    parser.add_argument("--cells", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cells:
        judge_some([Cell(*names) for names in json.load(sys.stdin)])
        return
    if arguments.again:
        RESULTS.unlink(missing_ok=True)
    known = results()
    todo = [c for c in all_cells() if c not in known and arguments.only in str(c)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run_some, [todo[i : i + _AT_ONCE] for i in range(0, len(todo), _AT_ONCE)]))
    found = results()
    if all(cell in found for cell in all_cells()):
        TABLE.write_text(table(found))
    counts = Counter(word for word, _ in found.values())
    print(json.dumps({"cells": len(all_cells()), **counts}))


if __name__ == "__main__":
    main()
