"""The benchmark of attacks runs, and measures what it says."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_attack_speed_compares_all_libraries():
    run = subprocess.run(
        [sys.executable, "benchmarks/attack_speed.py", "--quick", "--models", "mlp"],
        capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    result = json.loads(run.stdout.splitlines()[-1])
    mlp = result["models"]["mlp"]
    assert {"defend", "bare", "torchattacks", "foolbox", "art"} <= mlp["seconds"].keys()
    # All did the same work: the losses that they reached agree.
    losses = [loss for name, loss in mlp["loss"].items() if "bf16" not in name]
    assert max(losses) - min(losses) < 0.05
    assert mlp["ratios"]["defend / bare"]["target"] == 1.03
    assert result["stop_when_fooled"]["mlp"]["seconds"].keys() > {"PGD-10", "PGD-10 stop"}
