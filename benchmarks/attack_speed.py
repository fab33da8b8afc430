"""What an attack costs: defend's PGD beside a bare loop and three other libraries.

    python benchmarks/attack_speed.py [--device cpu|cuda] [--models cnn,resnet18,mlp]
        [--repeats 7] [--threads 2] [--batch 256] [--steps 10] [--graphs] [--cpu-time] [--quick]

Every contender attacks the same batch with L∞ PGD of the same radius, step size, steps and kind of
start; `loss` is the cross-entropy it reached, to show that all did the same work. They run
interleaved in one process, in an order that turns by one each round; a ratio is the median over
the repeats of (seconds of one / seconds of the other in the same round).

    defend                        defend.PGD as a training calls it; also with channels_last=True,
                                  and with precision="bf16" (on CUDA in channels_last, too)
    bare                          the loop a careful user writes: one clamp for ball and box
    torchattacks, foolbox, art    as their users call them; ART with all records in one batch
    torchattacks bf16             CUDA: under autocast, in channels_last
    defend graphs, defend bf16 graphs, bare graphed
                                  CUDA, with --graphs: one step captured and replayed; the last two
                                  in bf16 and channels_last. Beside them only those that they are
                                  compared with
    PGD-10 stop, PGD-50 stop      stop_when_fooled=True, on an undefended model that was trained for
                                  a moment on the digits of scikit-learn, beside the same without;
                                  not with --graphs, since early stops are never captured

Libraries that are missing are left out with a line, and so is bf16 where the device does not
multiply it in hardware (it is emulated there, many times slower than fp32). Run it on an idle
machine; on a busy one `--cpu-time --threads 1` counts seconds of this process instead of the
wall's. The last line is JSON.
"""

import argparse
import importlib.util
import json
import os
import platform
import statistics
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from contenders import EVERYWHERE, ON_CUDA, Contender, Task, ours
from models import CLASSES, MODELS
from torch import Tensor

EPS = 8 / 255
EPS_DIGITS = 0.2  # what the quickstart defends digits against
BATCH = {"cpu": {"cnn": 256, "resnet18": 16, "mlp": 256}, "cuda": dict.fromkeys(MODELS, 512)}
PEERS = ("torchattacks", "foolbox", "adversarial-robustness-toolbox")

# (one, the other): at most this ratio of their seconds
ON_CPU_AT_MOST = {
    ("defend", "bare"): 1.03,
    ("defend", "torchattacks"): 0.95,
    ("defend channels_last", "torchattacks"): 0.95,
    ("defend", "foolbox"): 0.75,
    ("defend", "art"): 0.5,
    ("defend bf16", "torchattacks"): 0.6,
}
ON_CUDA_AT_MOST = {
    ("defend", "bare"): 1.03,
    ("defend bf16", "torchattacks"): 1 / 3,
    ("defend graphs", "defend"): 1.0,
    ("defend bf16 graphs", "defend bf16"): 1.0,
    ("defend bf16 graphs", "bare graphed"): 1.05,
    ("defend bf16 graphs", "torchattacks"): 1 / 3,
    ("defend bf16 graphs", "torchattacks bf16"): 1 / 1.3,
}
BESIDE_GRAPHS = {"defend", "defend bf16", "bare", "torchattacks", "torchattacks bf16"}
STOP_AT_MOST = {("PGD-10 stop", "PGD-10"): 0.4, ("PGD-50 stop", "PGD-50"): 0.4}


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def processor() -> str:
    """The name of the CPU where the system tells it, its architecture elsewhere."""
    lines = _cpuinfo()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def has_bf16(device: str) -> bool:
    """Whether the device multiplies bfloat16 in hardware."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    flags = {flag for line in _cpuinfo() if line.startswith("flags") for flag in line.split()}
    return bool(flags & {"avx512_bf16", "amx_bf16"})


def _cpuinfo() -> list[str]:
    info = Path("/proc/cpuinfo")
    return info.read_text().splitlines() if info.exists() else []


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in PEERS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            print(f"{name} is not installed: left out.")
    return found


def measured(
    contenders: dict[str, Contender], task: Task, options: argparse.Namespace
) -> dict[str, Any]:
    """Seconds of each contender in each round, and the loss that it reached in the last."""
    names = list(contenders)
    clock = time.process_time if options.cpu_time else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in names}
    losses = {}
    # The first rounds warm up; a GPU's graphs are captured in the second.
    for repeat in range(-3 if options.device == "cuda" else -1, options.repeats):
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            synchronize()
            start = clock()
            adv = contenders[name]()
            synchronize()
            if repeat >= 0:
                seconds[name].append(clock() - start)
            task.model.zero_grad()  # Foolbox leaves gradients
            losses[name] = reached(task, adv)
    return {"seconds": seconds, "loss": losses}


@torch.no_grad()
def reached(task: Task, adv: Tensor) -> float:
    """The mean cross-entropy at x_adv, which must be in ball and box."""
    assert (adv - task.x).abs().max() <= task.eps + 1e-6
    assert adv.min() >= 0
    assert adv.max() <= 1
    return F.cross_entropy(task.model(adv).float(), task.y).item()


def report(
    name: str,
    rounds: dict[str, Any],
    at_most: dict[tuple[str, str], float],
    *,
    claimed: bool = True,
) -> dict[str, Any]:
    """Print and return medians, and the ratios with their targets.

    Args:
        name: of the model.
        rounds: from `measured`.
        at_most: targets; what was not measured has no ratio.
        claimed: whether the targets are meant for this model; else `met` is None.
    """
    seconds = rounds["seconds"]
    result: dict[str, Any] = {"seconds": {}, "loss": rounds["loss"], "ratios": {}}
    for contender, times in seconds.items():
        result["seconds"][contender] = statistics.median(times)
        print(f"{name:9} {contender:18} {statistics.median(times):9.4f} s", end="")
        print(f"   loss {rounds['loss'][contender]:.3f}")
    for (one, other), target in at_most.items():
        if one not in seconds or other not in seconds:
            continue
        pairs = zip(seconds[one], seconds[other], strict=True)
        ratio = statistics.median(a / b for a, b in pairs)
        met = ratio <= target if claimed else None
        verdict = "no target here" if met is None else "met" if met else "MISSED"
        print(f"{name:9} {one} / {other}: {ratio:.3f}   (≤ {target:.3g}: {verdict})")
        result["ratios"][f"{one} / {other}"] = {"ratio": ratio, "target": target, "met": met}
    return result


def takes_part(contender: str, model: str, options: argparse.Namespace) -> bool:
    if "bf16" in contender and not has_bf16(options.device):
        return False
    if options.graphs:
        return "graph" in contender or contender in BESIDE_GRAPHS
    if "graph" in contender:
        return False
    return "channels_last" not in contender or model != "mlp"


def compared(name: str, options: argparse.Namespace, installed: dict[str, str]) -> dict[str, Any]:
    """defend and its peers on one model and a random batch."""
    build, shape = MODELS[name]
    torch.manual_seed(0)
    rows = options.batch or BATCH[options.device][name]
    x = torch.rand(rows, *shape, device=options.device)
    y = torch.randint(0, CLASSES, (rows,), device=options.device)
    task = Task(build().to(options.device).eval(), x, y, EPS, options.steps)
    cuda = options.device == "cuda"
    makers = {**EVERYWHERE, **(ON_CUDA if cuda else {})}
    contenders = {
        contender: make(task)
        for contender, (make, needs) in makers.items()
        if (needs is None or needs in installed) and takes_part(contender, name, options)
    }
    rounds = measured(contenders, task, options)
    at_most = ON_CUDA_AT_MOST if cuda else ON_CPU_AT_MOST
    claimed = name == "resnet18" or not cuda
    return {"batch": rows, **report(name, rounds, at_most, claimed=claimed)}


def trained_on_digits(name: str, device: str) -> tuple[torch.nn.Module, Tensor, Tensor]:
    """An undefended model, in eval mode, and 512 digits that it never saw."""
    from sklearn.datasets import load_digits

    build, (channels, *size) = MODELS[name]
    images, labels = load_digits(return_X_y=True)
    x = torch.as_tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    x = F.interpolate(x, size=size, mode="bilinear").clamp_(0, 1)
    x, y = x.expand(-1, channels, *size).contiguous().to(device), torch.tensor(labels).to(device)
    torch.manual_seed(0)
    model = build().to(device).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(5):
        for rows in torch.randperm(1280).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    return model.eval(), x[1280:1792], y[1280:1792]


def stopping(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """With and without `stop_when_fooled`, where it pays: on a model that is soon fooled."""
    model, x, y = trained_on_digits(name, options.device)
    rows = min(len(x), options.batch or BATCH[options.device][name])
    task = Task(model, x[:rows], y[:rows], EPS_DIGITS, options.steps)
    contenders = {}
    for steps in (10, 50):
        contenders[f"PGD-{steps}"] = ours(task, steps=steps)
        contenders[f"PGD-{steps} stop"] = ours(task, steps=steps, stop_when_fooled=True)
    rounds = measured(contenders, task, options)
    return {"batch": rows, **report(name, rounds, STOP_AT_MOST)}


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--models", default=",".join(MODELS), help="of cnn, resnet18, mlp")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, help="rows; by default, what suits the model")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--graphs", action="store_true", help="CUDA graphs (needs --device cuda)")
    parser.add_argument("--cpu-time", action="store_true", help="seconds of CPU, not of the wall")
    parser.add_argument("--quick", action="store_true", help="tiny, to see that it runs")
    options = parser.parse_args()
    if options.quick:
        options.repeats, options.steps, options.batch = 1, 2, 4
    if options.graphs and options.device != "cuda":
        parser.error("Expected --device cuda beside --graphs, got cpu. Do leave --graphs out.")
    unknown = set(options.models.split(",")) - set(MODELS)
    if unknown:
        parser.error(f"Expected models of {', '.join(MODELS)}, got {', '.join(sorted(unknown))}.")
    return options


def main() -> None:
    options = parsed()
    torch.set_num_threads(options.threads)
    load = os.getloadavg()[0]
    cuda = options.device == "cuda"
    device = torch.cuda.get_device_name() if cuda else processor()
    bf16 = has_bf16(options.device)
    print(f"{device}, {options.threads} threads, load {load:.2f}; bf16 in hardware: {bf16}")
    installed = versions()
    result: dict[str, Any] = {
        "benchmark": "attack_speed",
        "device": device,
        "cpu": processor(),
        "cores": os.cpu_count(),
        "bf16_in_hardware": bf16,
        "threads": options.threads,
        "repeats": options.repeats,
        "steps": options.steps,
        "graphs": options.graphs,
        "clock": "process" if options.cpu_time else "wall",
        "load_before": load,
        "versions": installed,
        "models": {},
        "stop_when_fooled": {},
    }
    stops = not options.graphs and importlib.util.find_spec("sklearn") is not None
    if not options.graphs and not stops:
        print("scikit-learn is not installed: stop_when_fooled is left out.")
    for name in options.models.split(","):
        result["models"][name] = compared(name, options, installed)
        # Training and 50 steps of a ResNet-18 take a CPU too long.
        if stops and (cuda or name != "resnet18"):
            result["stop_when_fooled"][name] = stopping(name, options)
    result["load_after"] = os.getloadavg()[0]
    print(json.dumps(result))


if __name__ == "__main__":
    main()
