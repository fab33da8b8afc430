"""All that needs a GPU, in order of importance, within some minutes.

    python -m benchmarks.gpu [--minutes 9] [--out benchmarks/results/gpu.jsonl]
        [--only PART,PART] [--device cuda|cpu] [--quick]

First the tests marked `cuda`, then the benchmarks. Each part is a process of its own with a share
of the time that is left; what it does not use goes to the parts after it. After each part one line
of JSON is appended to `--out`, flushed and printed, so that a run that is cut off loses nothing:

    part, command, status   "ok", "failed", "killed" (by its limit) or "skipped", with a `reason`
    result                  the last line of the part's output where that is JSON
    tail                    the end of its output where it is not, or where the part failed
    device, versions        the GPU; torch, CUDA, driver and packages

It needs torch ≥ 2.6 and Python ≥ 3.11, and neither MLflow nor the network. What cannot be imported
is named in `missing`: tests that need it are skipped or are errors of collection, benchmarks leave
it out or are skipped. `--device cpu --quick` tries the script itself where there is no GPU.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
OUT = ROOT / "benchmarks" / "results" / "gpu.jsonl"
TAIL = 12_000  # characters of a failed part's output

# module → its distribution: what parts may want to import
PACKAGES = {
    "torch": "torch", "lightning": "lightning", "opacus": "opacus", "numpy": "numpy",
    "scipy": "scipy", "pytest": "pytest", "hypothesis": "hypothesis", "sklearn": "scikit-learn",
    "torchattacks": "torchattacks", "foolbox": "foolbox", "art": "adversarial-robustness-toolbox",
    "cryptography": "cryptography",
}  # fmt: skip

PROBE = """
import json, torch
found = torch.cuda.is_available()
print(json.dumps({
    "cuda": found, "device": torch.cuda.get_device_name() if found else None,
    "versions": {"torch": torch.__version__, "cuda": torch.version.cuda,
                 "cudnn": torch.backends.cudnn.version() if found else None}}))
"""


@dataclasses.dataclass(frozen=True)
class Part:
    """One process: what it runs, the share of the time that it gets, what it cannot do without."""

    name: str
    command: list[str]
    share: float
    needs: tuple[str, ...] = ()


def parts(device: str, quick: bool) -> list[Part]:
    """All there is to run, the most important first."""
    graphs = "tests/attacks/cuda_graphs/test_cuda.py"
    others = [path for path in tests_on_cuda() if path != graphs]
    fits = ("lightning", "opacus")
    found = [
        Part("tests", tested(others), 5, ("pytest",)),
        # Apart, and after the others: a capture that goes wrong may spoil the whole process.
        Part("tests of graphs", tested([graphs]), 2, ("pytest",)),
        timed("attack_speed", device, quick, 2, models="resnet18" if device == "cuda" else "mlp"),
    ]
    if device == "cuda":
        found.append(timed("attack_speed", device, quick, 2, models="resnet18", graphs=True))
    found += [
        timed("training_overhead", device, quick, 2, fits),
        timed("privacy_overhead", device, quick, 2, fits),
        timed("secure_noise", device, quick, 0.5, ("cryptography",)),
    ]
    if device == "cuda":
        found += [
            timed("attack_speed", device, quick, 1, models="cnn,mlp", graphs=graphed)
            for graphed in (True, False)
        ]
    return found


def tests_on_cuda() -> list[str]:
    """The files with tests marked `cuda`, found without importing them."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(f.relative_to(ROOT)) for f in files if "pytest.mark.cuda" in f.read_text("utf-8")]


def tested(files: list[str]) -> list[str]:
    return [
        sys.executable, "-m", "pytest", "-m", "cuda", "-v", "--tb=short", "-p", "no:cacheprovider",
        "--continue-on-collection-errors", *files,
    ]  # fmt: skip


def timed(
    script: str, device: str, quick: bool, share: float, needs: tuple[str, ...] = (),
    *, models: str | None = None, graphs: bool = False,
) -> Part:  # fmt: skip
    """A benchmark as a part."""
    command = [sys.executable, f"benchmarks/{script}.py", "--device", device]
    command += ["--quick"] * quick + ["--graphs"] * graphs
    command += ["--models", models] if models else []
    name = " ".join([script, *([models] if models else []), *["graphs"] * graphs])
    return Part(name, command, share, needs)


def run(part: Part, limit: float, folder: Path) -> dict[str, Any]:
    """Run one part for at most `limit` seconds, with all processes that it starts."""
    paths = folder / "stdout", folder / "stderr"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    start, killed = time.monotonic(), False
    with paths[0].open("wb") as out, paths[1].open("wb") as err:
        process = subprocess.Popen(
            part.command, stdout=out, stderr=err, cwd=ROOT, env=env, start_new_session=True
        )
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            killed = True
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    status = "killed" if killed else "failed" if process.returncode else "ok"
    said, errors = (path.read_text("utf-8", "replace") for path in paths)
    result = last_json(said)
    line = {
        "status": status,
        "seconds": round(time.monotonic() - start, 2),
        "limit": round(limit, 1),
        "exit_code": process.returncode,
        "result": result,
    }
    if status != "ok":
        line["tail"] = said[-TAIL:] + errors[-TAIL:]
    elif result is None:
        line["tail"] = said[-1000:]
    return line


def last_json(text: str) -> Any:
    lines = text.strip().splitlines()
    try:
        return json.loads(lines[-1]) if lines else None
    except json.JSONDecodeError:
        return None


def surroundings() -> dict[str, Any]:
    """Device and versions, asked for in another process: this one leaves the GPU alone."""
    probe = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True)
    if probe.returncode:
        raise SystemExit(f"Expected a torch that can be imported, got:\n{probe.stderr[-2000:]}")
    found = json.loads(probe.stdout.splitlines()[-1])
    versions = {"python": platform.python_version(), **found["versions"], "driver": driver()}
    for name in PACKAGES.values():
        try:
            versions.setdefault(name, version(name))
        except PackageNotFoundError:
            versions[name] = None
    return {"cuda": found["cuda"], "device": found["device"], "versions": versions}


def driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(asked, capture_output=True, text=True)
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout else None


def first_limit(remaining: float, shares: list[float]) -> float:
    """Seconds of the first part, when all parts that are left share what remains."""
    return remaining * shares[0] / sum(shares)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="for all parts together")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--only", help="parts whose names begin with one of these, by commas")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny, to see that it runs")
    return parser.parse_args()


def main() -> int:
    options = parsed()
    around = surroundings()
    if options.device == "cuda" and not around["cuda"]:
        print(
            f"Expected a CUDA device, got none that torch {around['versions']['torch']} sees. Do "
            "run this on a machine with a GPU, or with --device cpu --quick to try the script.",
            file=sys.stderr,
        )
        return 2
    around["device"] = around["device"] or platform.processor() or platform.machine()
    missing = [module for module in PACKAGES if importlib.util.find_spec(module) is None]
    todo = parts(options.device, options.quick)
    if options.only:
        todo = [part for part in todo if part.name.startswith(tuple(options.only.split(",")))]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * options.minutes
    bad = 0
    for i, part in enumerate(todo):
        limit = first_limit(end - time.monotonic(), [p.share for p in todo[i:]])
        line = attempted(part, limit, missing)
        bad += line["status"] in ("failed", "killed")
        line = {
            "part": part.name,
            **line,
            "command": ["python", *part.command[1:]],
            "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "missing": missing,
            **{name: around[name] for name in ("device", "versions")},
        }
        text = json.dumps(line, ensure_ascii=False)
        with options.out.open("a", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        print(text, flush=True)
    return 1 if bad else 0


def attempted(part: Part, limit: float, missing: list[str]) -> dict[str, Any]:
    lacks = [module for module in part.needs if module in missing]
    if lacks:
        return {"status": "skipped", "reason": f"{', '.join(lacks)} cannot be imported"}
    if limit <= 0:
        return {"status": "skipped", "reason": "no time is left"}
    with tempfile.TemporaryDirectory() as folder:
        return run(part, limit, Path(folder))


if __name__ == "__main__":
    sys.exit(main())
