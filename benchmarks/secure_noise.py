"""What `secure_noise=True` costs: masks and noise from ChaCha20 against torch's own generators.

    python benchmarks/secure_noise.py [--device cpu|cuda] [--repeats 15] [--threads 2] [--quick]

    mask     Randomness.uniforms: one float64 for each record
    noise    Randomness.gaussian: one normal for each coordinate; float32 by default, when secure
             a float64 that is half the sum of four

Default and secure are measured interleaved in one process, each draw with its generator made anew
as in a training step; a ratio is the median over the repeats of (seconds secure / seconds default
in the same round). The keystream is computed on the CPU; with `--device cuda` noise goes to a GPU
from there, and torch's own is drawn on it. Run it on an idle machine: the many short operations of
the secure draw wait for each other where threads are more than free cores. The last line is JSON.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch

from defend.privacy import Randomness

SIZES = (100_000, 1_000_000)


def seconds(draw: Callable[[], torch.Tensor]) -> float:
    synchronize()
    start = time.perf_counter()
    draw()
    synchronize()
    return time.perf_counter() - start


def synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def draws(randomness: Randomness, size: int, device: str) -> dict[str, Callable[[], torch.Tensor]]:
    like = torch.zeros(size, device=device)
    return {
        "mask": lambda: randomness.uniforms(0, size),
        "noise": lambda: randomness.gaussian(0, device)(like),
    }


def processor() -> str:
    """The name of the CPU where the system tells it, its architecture elsewhere."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="tiny, to see that it runs")
    options = parser.parse_args()
    sizes = SIZES
    if options.quick:
        options.repeats, sizes = 1, (1000,)
    device = options.device
    torch.set_num_threads(options.threads)
    load = os.getloadavg()[0]

    rounds: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for repeat in range(-2, options.repeats):  # the first rounds warm up
        for size in sizes:
            default, secure = (draws(Randomness(secure=s), size, device) for s in (False, True))
            for name in default:
                pair = (seconds(default[name]), seconds(secure[name]))
                if repeat >= 0:
                    rounds.setdefault((name, size), []).append(pair)

    result: dict[str, object] = {
        "benchmark": "secure_noise",
        "device": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": options.threads,
        "repeats": options.repeats,
        "load_before": load,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": version("numpy"),
            "cryptography": version("cryptography"),
        },
    }
    print(f"{'draw':6} {'size':>9} {'default ms':>11} {'secure ms':>10} {'ratio':>6}")
    for (name, size), pairs in rounds.items():
        default_s, secure_s = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(b / a for a, b in pairs)
        print(f"{name:6} {size:9,} {1e3 * default_s:11.2f} {1e3 * secure_s:10.2f} {ratio:6.2f}")
        result[f"{name}_{size}"] = {"default_s": default_s, "secure_s": secure_s, "ratio": ratio}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
