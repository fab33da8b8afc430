"""MNIST, robust and private at once: ε = 1.04, and the only published figure beaten.

| run | ε (δ = 1e-5) | clean % | AutoAttack % | each seed: clean / AutoAttack |
|---|---:|---:|---:|---|
| robust and private | 1.0396 | 98.41 | 93.3 | 98.41 / 92.9, 98.42 / 93.4, 98.41 / 93.7 |
| private alone | 1.0396 | 98.33 | 90.8 | 98.33 / 90.8 |
| robust alone | – | 99.05 | 95.2 (first 250) | 99.05 / 95.2 |
| DP-Adv, from shuffled batches | 1.04 | 97.4 | 78.3 | published |

(Full test set; first 1,000 test images at L∞ 0.1. One core of an AMD EPYC beside other work, torch
2.13 CPU: 27 to 34 minutes of training and 13 to 15 of attack a seed.)

    python recipes/mnist_robust_private.py --data-file mnist.npz

trains a classifier four ways, three seeds each, and prints such a table. The file is a Keras-style
npz (x_train, y_train, x_test, y_test); without it torchvision's MNIST is used where torchvision is
installed.

What it is made of:

- **True Poisson sampling.** The published figure (DP-Adv, Bu et al. 2021, OpenReview 1hw-h1C8bch)
  came from shuffled batches, for which the accounting that it used proves nothing. Here
  `DifferentialPrivacy` draws the batches.
- **Fixed features, a linear classifier.** A scattering network (Bruna & Mallat 2013, arXiv
  1203.1513) of two layers of oriented wavelets is computed, not learned, so all of the budget goes
  into 12,260 weights (Tramèr & Boneh 2021, arXiv 2011.11660: at small ε it beats deep networks).
  Attacks go through it: it is differentiable.
- **Group normalization** of the features, record by record.
- **A contrast curve** on the pixels, σ(10 (x − ½)). Ink is nearly black or white, and an attacker's
  0.1 moves such a pixel by 0.01 behind the curve; networks trained on adversarial digits learn such
  thresholds by themselves (Madry et al. 2018, arXiv 1706.06083, appendix C). It is prior knowledge
  of this data, no defense for pictures in general; `--contrast 0` leaves it out. It does not hide
  gradients: it is monotone, so it changes no gradient's sign, and its slope is at least 0.067.
- **Large batches** (2,048 expected), momentum, a cosine schedule.
- **Every record adversarial**: two steps of PGD, whose ε grows over the first fifth (as in Pang et
  al. 2020, arXiv 2010.00467).

*AutoAttack* is that of torchattacks, "standard", on the first 1,000 test images: APGD, APGD-T and
FAB-T with 10 steps each, then Square with 5,000 queries. Its authors' own code takes 100 steps:
*100 steps* is the worst case of these three with as many, on the first 250 images.

The wavelets, the curve, the learning rate, C, the batch and the number of epochs were chosen on
5,000 to 10,000 of the *training* images that were held out (`--validate`), never on test images.
Such choices look at the data and are **not covered by ε**. A choice among seeds would not be
either: the table has the mean over all of them, and each. A seed fixes the weights that training
starts from; masks, noise and random starts come from the operating system, so a private run does
not repeat.
"""

import argparse
import json
import math
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import defend

EPS = 0.1  # L∞ radius, in units of the [0, 1] box
EPSILON, DELTA = 1.04, 1e-5
BALL = {"norm": "Linf", "eps": EPS}
AUTOATTACK = {"autoattack": defend.TorchAttack("AutoAttack", {**BALL, "version": "standard"})}
LONGER = {
    "apgd": defend.TorchAttack("APGD", {**BALL, "steps": 100}),
    "apgdt": defend.TorchAttack("APGDT", {**BALL, "steps": 100}),
    "fab": defend.TorchAttack("FAB", {**BALL, "steps": 100, "multi_targeted": True}),
}


# --- data -----------------------------------------------------------------------------------------


def load(path: Path | None) -> tuple[TensorDataset, TensorDataset]:
    """Training and test images `[N, 1, 28, 28]` in [0, 1], with their labels."""
    if path is None:
        try:
            from torchvision.datasets import MNIST
        except ImportError:
            raise SystemExit(
                "Expected --data-file, an npz with x_train, y_train, x_test and y_test, since "
                "torchvision is not installed. Keras' mnist.npz is such a file."
            ) from None
        parts = [MNIST("data", train=train, download=True) for train in (True, False)]
        arrays = [(part.data.numpy(), part.targets.numpy()) for part in parts]
    else:
        with np.load(path) as file:
            missing = {"x_train", "y_train", "x_test", "y_test"} - set(file)
            if missing:
                raise SystemExit(f"Expected {sorted(missing)} in {path}, got {sorted(file)}.")
            arrays = [(file[f"x_{part}"], file[f"y_{part}"]) for part in ("train", "test")]
    train, test = (_records(x, y) for x, y in arrays)
    return train, test


def _records(x: np.ndarray, y: np.ndarray) -> TensorDataset:
    if x.ndim != 3 or x.shape[1:] != (28, 28) or x.dtype != np.uint8:
        raise SystemExit(f"Expected uint8 images of 28 × 28, got {x.dtype} of shape {x.shape}.")
    images = torch.from_numpy(x).float().div(255).unsqueeze(1)
    return TensorDataset(images, torch.from_numpy(y).long())


# --- the model: it knows nothing of defend --------------------------------------------------------


def morlet(angles: int, size: int = 7, width: float = 1.2, frequency: float = 1.5) -> Tensor:
    """Oriented waves under a Gaussian, without a mean: `[2 · angles, 1, size, size]`.

    First the real parts, then the imaginary ones.
    """
    r = torch.arange(size) - (size - 1) / 2
    envelope = torch.exp(-(r[:, None] ** 2 + r**2) / (2 * width**2))
    real, imaginary = [], []
    for k in range(angles):
        angle = math.pi * k / angles
        along = frequency * (r * math.cos(angle) + r[:, None] * math.sin(angle))
        wave = envelope * torch.cos(along)
        real.append(wave - envelope * (wave.sum() / envelope.sum()))
        imaginary.append(envelope * torch.sin(along))
    return torch.stack([*real, *imaginary]).unsqueeze(1) / envelope.sum()


def blur(size: int, kept: int, width: float) -> Tensor:
    """A Gaussian blur of size × size maps, taken at kept × kept places: `[size², kept²]`."""
    centres = (torch.arange(kept) + 0.5) * size / kept - 0.5
    weights = torch.exp(-((torch.arange(size) - centres[:, None]) ** 2) / (2 * width**2))
    weights /= weights.sum(1, keepdim=True)
    return torch.kron(weights, weights).T.contiguous()


def contrast(x: Tensor, steepness: float) -> Tensor:
    """A logistic curve through (0, 0), (½, ½) and (1, 1); steepness 0 leaves x as it is."""
    if not steepness:
        return x
    low = 1 / (1 + math.exp(steepness / 2))
    return (torch.sigmoid(steepness * (x - 0.5)) - low) / (1 - 2 * low)


class Scattering(nn.Module):
    """Two layers of wavelet moduli at two scales: 28 × 28 images to 25 maps of 7 × 7.

    Args:
        contrast: steepness of the curve that the pixels go through first; 0 for none.
        angles: orientations of the wavelets.
    """

    wavelets: Tensor
    blur: Tensor

    def __init__(self, contrast: float = 10.0, angles: int = 4) -> None:
        super().__init__()
        self.contrast, self.angles = contrast, angles
        self.register_buffer("wavelets", morlet(angles), persistent=False)
        self.register_buffer("blur", blur(14, 7, width=1.2), persistent=False)
        self.maps = 1 + 2 * angles + angles**2
        self.norm = nn.GroupNorm(self.maps // (angles + 1), self.maps, affine=False)
        self.features = 49 * self.maps

    def moduli(self, x: Tensor) -> Tensor:
        real, imaginary = F.conv2d(x, self.wavelets, padding="same").chunk(2, 1)
        return (real**2 + imaginary**2 + 1e-6).sqrt()  # with a slope at 0

    def forward(self, x: Tensor) -> Tensor:
        x = contrast(x, self.contrast)
        small = F.avg_pool2d(x, 2)
        fine = F.avg_pool2d(self.moduli(x), 2)
        coarse = self.moduli(small)
        twice = self.moduli(fine.flatten(0, 1).unsqueeze(1)).unflatten(0, (-1, self.angles))
        maps = torch.cat([small, fine, coarse, twice.flatten(1, 2)], 1)
        return self.norm((maps.flatten(2) @ self.blur).unflatten(2, (7, 7))).flatten(1)


class Classifier(pl.LightningModule):
    """A linear classifier on fixed features."""

    def __init__(self, lr: float, contrast: float) -> None:
        super().__init__()
        self.lr = lr
        self.features = Scattering(contrast)
        self.head = nn.Linear(self.features.features, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), self.lr, momentum=0.9)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


# --- what defend adds: callbacks ------------------------------------------------------------------


def robust(options: argparse.Namespace) -> defend.AdversarialTraining:
    attack = defend.PGD(defend.Linf(EPS), steps=2, step_size=0.125)
    return defend.AdversarialTraining(attack, warmup_epochs=options.epochs / 5)


def private(_: argparse.Namespace) -> defend.DifferentialPrivacy:
    return defend.DifferentialPrivacy(target_epsilon=EPSILON, delta=DELTA, max_grad_norm=1.0)


KEPT_OUT = ("data_file", "output", "runs", "seeds", "tracking_uri")  # of the settings in results

Make = Callable[[argparse.Namespace], pl.Callback]
RUNS: dict[str, tuple[Make, ...]] = {
    "plain": (),
    "robust": (robust,),
    "private": (private,),
    "robust and private": (robust, private),
}


def train(name: str, seed: int, data: TensorDataset, options: argparse.Namespace) -> dict[str, Any]:
    """Fit one module; the callbacks are all that differs between the runs."""
    pl.seed_everything(seed, verbose=False)
    module = Classifier(options.lr, options.contrast)
    callbacks = [make(options) for make in RUNS[name]]
    trainer = pl.Trainer(
        accelerator="auto",
        devices=1,
        max_epochs=options.epochs,
        callbacks=callbacks,
        logger=False if options.tracking_uri is None else _mlflow(f"{name}, {seed}", options),
        default_root_dir=options.output,  # the ledgers of the private runs go there
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    start = time.perf_counter()
    trainer.fit(module, DataLoader(data, batch_size=options.batch_size, shuffle=True))
    epsilons = [c.epsilon for c in callbacks if isinstance(c, defend.DifferentialPrivacy)]
    return {
        "module": module,
        "epsilon": epsilons[0] if epsilons else None,
        "train_seconds": time.perf_counter() - start,
    }


def _mlflow(name: str, options: argparse.Namespace) -> Any:
    from lightning.pytorch.loggers import MLFlowLogger

    return MLFlowLogger("defend-mnist", run_name=name, tracking_uri=options.tracking_uri)


def measure(module: Classifier, test: TensorDataset, options: argparse.Namespace) -> dict[str, Any]:
    """Clean accuracy on all of `test`, the attacks on its first images."""
    start = time.perf_counter()
    right = 0
    with torch.no_grad():
        for x, y in DataLoader(test, batch_size=250):
            right += int(
                (module.eval()(x.to(module.device)).argmax(1) == y.to(module.device)).sum()
            )
    return {
        "clean": 100 * right / len(test),
        "autoattack": robust_accuracy(module, test, AUTOATTACK, options.attacked),
        "longer": robust_accuracy(module, test, LONGER, options.longer),
        "attack_seconds": time.perf_counter() - start,
    }


def robust_accuracy(
    module: Classifier, test: TensorDataset, attacks: dict[str, Any], count: int
) -> float:
    """Percent of the first `count` images that stay right, clean and under every attack."""
    first = DataLoader(TensorDataset(*test[:count]), batch_size=250)
    return 100 * defend.evaluate(module, first, attacks, progress=False).worst_case_accuracy


def held_out(train: TensorDataset, count: int) -> tuple[TensorDataset, TensorDataset]:
    """Training images split in two, the same way every time: to choose settings on the second."""
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    return TensorDataset(*train[order[count:]]), TensorDataset(*train[order[:count]])


# --- the table ------------------------------------------------------------------------------------


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: for each kind of run the mean over seeds, and each seed."""
    lines = [
        f"| run | ε, δ = {DELTA:g} | clean % | AutoAttack % | 100 steps % | each seed | minutes |",
        "|---|---:|---:|---:|---:|---|---:|",
    ]
    for name in dict.fromkeys(r["run"] for r in results):
        runs = [r for r in results if r["run"] == name]
        spent = max((r["epsilon"] for r in runs if r["epsilon"] is not None), default=None)
        seeds = ", ".join(f"{r['clean']:.2f} / {r['autoattack']:.1f}" for r in runs)
        clean, attacked, longer, seconds = (
            float(np.mean([r[key] for r in runs]))
            for key in ("clean", "autoattack", "longer", "train_seconds")
        )
        epsilon = "–" if spent is None else f"{spent:.3f}"
        figures = f"{clean:.2f} | {attacked:.1f} | {longer:.1f}"
        lines.append(f"| {name} | {epsilon} | {figures} | {seeds} | {seconds / 60:.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-file", type=Path, help="npz with x_train, y_train, x_test, y_test")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=2048, help="expected, where private")
    parser.add_argument("--lr", type=float, default=0.5)
    parser.add_argument("--contrast", type=float, default=10.0, help="0 leaves the curve out")
    parser.add_argument("--attacked", type=int, default=1000, help="test images for AutoAttack")
    parser.add_argument("--longer", type=int, default=250, help="and for attacks of 100 steps")
    parser.add_argument(
        "--validate", type=int, default=0, help="measure on so many held-out training images"
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/mnist_robust_private"))
    parser.add_argument("--tracking-uri", help="log to MLflow too, say sqlite:///mlflow.db")
    options = parser.parse_args()

    data, test = load(options.data_file)
    if options.validate:
        data, test = held_out(data, options.validate)
    options.output.mkdir(parents=True, exist_ok=True)
    settings = {k: v for k, v in vars(options).items() if k not in KEPT_OUT}
    results = []
    for name in options.runs:
        for seed in options.seeds:
            trained = train(name, seed, data, options)
            module = trained.pop("module")
            result = {"run": name, "seed": seed, **trained}
            result |= measure(module, test, options)
            results.append(result)
            print(json.dumps(result), flush=True)
            with (options.output / "results.jsonl").open("a") as file:
                file.write(json.dumps({**result, "settings": settings}) + "\n")
    print(f"\n{table(results)}\n")
    host = {"torch": torch.__version__, "machine": platform.machine(), "cpus": os.cpu_count()}
    print(json.dumps({"settings": settings, "host": host, "results": results}))


if __name__ == "__main__":
    main()
