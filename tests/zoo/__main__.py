"""`python -m tests.zoo` tries all set-ups, and writes `docs/zoo.md`; it goes on where it stopped.

python -m tests.zoo --again     from the start
"""

import dataclasses
import json
import logging
import sys
import warnings
from pathlib import Path

import torch

from tests.zoo import all_setups
from tests.zoo.trial import Trial, tried

ROOT = Path(__file__).parents[2]
RESULTS, PAGE = ROOT / ".zoo.jsonl", ROOT / "docs" / "zoo.md"
RIGHT = 1e-5

HEAD = """\
# What trains, and how

Written by `python -m tests.zoo`, which `make matrix` runs: {count} set-ups as people write them,
each built from scratch or from a config (`tests/zoo/`), with its dropout, buffers and all. Each
takes a step under `DifferentialPrivacy`, nothing set but the noise. Then once more without noise,
its dropout off: the gradient that is released is compared with a loop that collates each record
alone, clips it and adds it up. {trained} train, {hooks} of them by the layers' hooks, {record} one
record at a time (`engine="record"`, which `auto` takes by itself where rows cannot be told apart);
{refused} are refused. The largest difference from the loop is {worst:.0e} of its norm.

The last column is the time of a private step over that of a plain one, medians of nine, on two CPU
cores that did other things beside: a hint, no benchmark. The set-ups are tiny; what a step costs
before its first multiplication weighs more here than in real models.

| family | set-up | engine | difference | time |
|---|---|---|---:|---:|
"""


def page(results: dict[str, dict]) -> str:
    """The table."""
    trials = {name: (row["family"], Trial(**row["trial"])) for name, row in results.items()}
    engines = [trial.engine for _, trial in trials.values()]
    head = HEAD.format(
        count=len(trials),
        trained=len(trials) - engines.count(None),
        hooks=engines.count("hooks"),
        record=engines.count("record"),
        refused=engines.count(None) or "none",
        worst=max(trial.distance for _, trial in trials.values()),
    )
    rows = [
        f"| {family} | {name} | {trial.engine or 'refused'} | {trial.distance:.0e} | "
        f"{'' if trial.times is None else f'{trial.times:.1f}'} |"
        for name, (family, trial) in trials.items()
    ]
    return head + "\n".join(rows) + "\n"


def main(arguments: list[str]) -> int:
    """The exit status is 1 where a set-up is refused, or takes another step than the loop."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if "--again" in arguments:
        RESULTS.unlink(missing_ok=True)
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    done = {row["name"]: row for row in map(json.loads, lines)}
    setups = all_setups()
    for name, setup in setups.items():
        if name not in done:
            trial = dataclasses.asdict(tried(setup, timed=True))
            done[name] = {"name": name, "family": setup.family, "trial": trial}
            with RESULTS.open("a") as file:
                file.write(json.dumps(done[name]) + "\n")
            print(name, trial, flush=True)
    results = {name: done[name] for name in setups}
    PAGE.write_text(page(results))
    trials = [Trial(**row["trial"]) for row in results.values()]
    return int(any(t.engine is None or not t.distance < RIGHT for t in trials))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
