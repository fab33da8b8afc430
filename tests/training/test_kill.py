"""A real training, killed at twenty random moments: what it took is on the ledger."""

import subprocess
import sys
from pathlib import Path

from defend.privacy import read_ledger
from defend.privacy.accounting.ledger import spent

ROOT = Path(__file__).parents[2]
TIMES = 20


def test_what_was_taken_is_on_the_ledger_and_at_most_one_more(tmp_path):
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.training.killed", str(tmp_path), str(TIMES)],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    taken = [int(line) for line in process.stdout.split()]
    entries = read_ledger(tmp_path / "ledger.jsonl")  # verified, twenty crashes later
    charged = {name: sum(s.steps for s in history) for name, history in spent(entries).items()}
    names = [entry["fit"] for entry in entries if entry["kind"] == "fit"]
    assert len(taken) == len(names) == TIMES
    assert sum(taken) > 20  # they were killed at work
    for name, steps in zip(names, taken, strict=True):
        assert steps <= charged.get(name, 0) <= steps + 1
