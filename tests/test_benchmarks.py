"""The benchmarks run, and measure what they say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import parts

ROOT = Path(__file__).parents[1]


def test_attack_speed_compares_all_libraries():
    run = subprocess.run(
        [sys.executable, "benchmarks/attack_speed.py", "--quick", "--models=mlp", "--threads=1"],
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


def gpu(out, *options):
    """The lines that a run on the CPU writes, by part."""
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--quick", "--out", str(out),
         *options],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    lines = out.read_text().splitlines()
    assert run.stdout.splitlines() == lines
    return run.returncode, {line["part"]: line for line in map(json.loads, lines)}


def test_what_a_gpu_is_asked_leaves_a_line_after_each_part(tmp_path):
    out = tmp_path / "gpu.jsonl"
    code, lines = gpu(out, "--only", "secure_noise", "--minutes", "2")
    assert code == 0
    assert lines["secure_noise"]["status"] == "ok"
    assert lines["secure_noise"]["result"]["benchmark"] == "secure_noise"
    assert lines["secure_noise"]["versions"]["torch"]
    assert lines["secure_noise"]["device"]


def test_a_part_that_is_killed_by_its_limit_leaves_a_line_too(tmp_path):
    out = tmp_path / "gpu.jsonl"
    code, lines = gpu(out, "--only", "training_overhead,secure_noise", "--minutes", "0.01")
    assert code == 1
    assert list(lines) == ["training_overhead", "secure_noise"]
    assert {line["status"] for line in lines.values()} <= {"killed", "skipped"}
    killed = lines["training_overhead"]
    assert (killed["status"], killed["exit_code"], killed["result"]) == ("killed", -9, None)
    assert killed["seconds"] < 10


def test_without_a_gpu_it_says_so(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    out = tmp_path / "gpu.jsonl"
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--out", str(out)],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert run.returncode == 2
    assert "Expected a CUDA device, got none" in run.stderr
    assert not out.exists()


def test_what_a_gpu_is_asked_first_are_the_tests_that_need_one():
    every = parts("cuda", quick=False)
    assert [part.name for part in every[:2]] == ["tests", "tests of graphs"]
    assert [part.name for part in every if "graphs" in part.name and "attack" in part.name]
    files = [arg for part in every[:2] for arg in part.command if arg.startswith("tests/")]
    assert "tests/attacks/cuda_graphs/test_cuda.py" in files
    assert "tests/callbacks/test_together.py" in files
    assert "tests/test_benchmarks.py" not in files
