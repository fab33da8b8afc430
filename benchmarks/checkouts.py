"""The ratios of a benchmark in two checkouts, interleaved: is the second one slower?

    python benchmarks/checkouts.py OLD NEW [--rounds 9] [--script benchmarks/training_overhead.py]
        [--repeats 1]

Runs the script of each checkout in turn, in processes of their own, the order changing from round
to round, and compares the medians of each of its ratios. The last line is JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path


def ratios(checkout: Path, script: str, repeats: int) -> dict[str, float]:
    """The ratios that one run prints on its last line."""
    done = subprocess.run(
        [sys.executable, script, "--repeats", str(repeats)],
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": str(checkout)},
        capture_output=True,
        text=True,
        check=True,
    )
    result = json.loads(done.stdout.splitlines()[-1])
    return {k: v["ratio"] for k, v in result.items() if isinstance(v, dict) and "ratio" in v}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--script", default="benchmarks/training_overhead.py")
    options = parser.parse_args()
    found: dict[str, dict[str, list[float]]] = {"old": defaultdict(list), "new": defaultdict(list)}
    for number in range(options.rounds):
        for which in ("old", "new") if number % 2 else ("new", "old"):
            checkout = getattr(options, which).resolve()
            for name, ratio in ratios(checkout, options.script, options.repeats).items():
                found[which][name].append(ratio)
        print(f"round {number + 1} of {options.rounds}", flush=True)
    result = {}
    print(f"{'ratio':10} {'old':>7} {'new':>7} {'new / old':>10}")
    for name in found["old"]:
        old, new = (statistics.median(found[which][name]) for which in ("old", "new"))
        # Of the same round, so that what else the machine does falls on both.
        pairs = zip(found["new"][name], found["old"][name], strict=True)
        change = statistics.median(a / b for a, b in pairs)
        result[name] = {"old": old, "new": new, "change": change}
        print(f"{name:10} {old:7.3f} {new:7.3f} {change:10.3f}")
    print(json.dumps({"benchmark": "checkouts", "rounds": options.rounds, **result}))


if __name__ == "__main__":
    main()
