"""What defend's callbacks cost: one epoch under a callback against the same epoch by hand.

    python benchmarks/training_overhead.py [--device cpu|cuda] [--repeats 7] [--threads 2]
        [--quick]

Pairs, measured interleaved in one process; a ratio is the median over the repeats of
(seconds with defend / seconds of its baseline in the same round):

    plain     Trainer without callbacks      /  bare loop          (Lightning's own cost)
    robust    Trainer + AdversarialTraining  /  bare PGD-10 loop
    private   Trainer + DifferentialPrivacy  /  bare Opacus loop   (Opacus' make_private, Poisson)

Data: random 1 × 28 × 28 images; a small convolutional net. The last line is JSON.
"""

import argparse
import json
import logging
import platform
import statistics
import time
import warnings

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import defend

RECORDS, BATCH, EPS, STEPS = 2048, 128, 0.1, 10


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 8, 2, 3), nn.Tanh(), nn.MaxPool2d(2, 1),
        nn.Conv2d(16, 32, 4, 2), nn.Tanh(), nn.MaxPool2d(2, 1),
        nn.Flatten(), nn.Linear(512, 32), nn.Tanh(), nn.Linear(32, 10),
    )  # fmt: skip


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class EpochTimer(pl.Callback):
    """Seconds of the epoch itself, without set-up and accounting before it."""

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        synchronize()
        self.start = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        synchronize()
        self.seconds = time.perf_counter() - self.start


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def with_trainer(data: TensorDataset, device: str, callbacks: list[pl.Callback]) -> float:
    timer = EpochTimer()
    trainer = pl.Trainer(
        accelerator="gpu" if device == "cuda" else "cpu", devices=1, max_epochs=1, logger=False,
        callbacks=[*callbacks, timer], enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Module(), DataLoader(data, BATCH, shuffle=True))
    return timer.seconds


def pgd_by_hand(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The loop a careful user writes: eval mode, one clamp for ball and box."""
    low, high = (x - EPS).clamp(min=0), (x + EPS).clamp(max=1)
    adv = (x + torch.empty_like(x).uniform_(-EPS, EPS)).clamp(0, 1)
    model.eval()
    for _ in range(STEPS):
        adv.requires_grad_()
        loss = F.cross_entropy(model(adv), y, reduction="sum")
        (grad,) = torch.autograd.grad(loss, adv)
        adv = torch.clamp(adv.detach() + 2.5 * EPS / STEPS * grad.sign(), low, high)
    model.train()
    return adv.detach()


def by_hand(data: TensorDataset, device: str, attack: bool) -> float:
    model = network().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(data, BATCH, shuffle=True)
    synchronize()
    start = time.perf_counter()
    for batch in loader:
        x, y = (t.to(device) for t in batch)
        if attack:
            x = pgd_by_hand(model, x, y)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    synchronize()
    return time.perf_counter() - start


def by_opacus(data: TensorDataset, device: str) -> float:
    from opacus import PrivacyEngine

    model = network().to(device)
    model, optimizer, loader = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(data, BATCH, shuffle=True),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    synchronize()
    start = time.perf_counter()
    for batch in loader:
        x, y = (t.to(device) for t in batch)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="tiny, to see that it runs")
    options = parser.parse_args()
    records = RECORDS
    if options.quick:
        options.repeats, records = 1, 2 * BATCH
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.manual_seed(0)
    data = TensorDataset(torch.rand(records, 1, 28, 28), torch.randint(0, 10, (records,)))
    device = options.device

    def robust() -> list[pl.Callback]:
        return [defend.AdversarialTraining(defend.PGD(defend.Linf(EPS), steps=STEPS))]

    def private() -> list[pl.Callback]:
        return [
            defend.DifferentialPrivacy(
                delta=1e-5, max_grad_norm=1.0, noise_multiplier=1.0, accountant="rdp"
            )
        ]

    pairs = {
        "plain": (
            lambda: with_trainer(data, device, []),
            lambda: by_hand(data, device, attack=False),
        ),
        "robust": (
            lambda: with_trainer(data, device, robust()),
            lambda: by_hand(data, device, attack=True),
        ),
        "private": (
            lambda: with_trainer(data, device, private()),
            lambda: by_opacus(data, device),
        ),
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in pairs}
    for repeat in range(-1, options.repeats):  # the first round warms up
        for name, (ours, baseline) in pairs.items():
            pair = (ours(), baseline())
            print(f"round {repeat}: {name:8} {pair[0]:9.3f} {pair[1]:11.3f} s", flush=True)
            if repeat >= 0:
                seconds[name].append(pair)

    result: dict[str, object] = {
        "benchmark": "training_overhead",
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "threads": options.threads,
        "repeats": options.repeats,
        "versions": {"torch": torch.__version__, "lightning": pl.__version__},
    }
    print(f"{'pair':8} {'defend s':>9} {'baseline s':>11} {'ratio':>6}")
    for name, rounds in seconds.items():
        ours, baseline = (statistics.median(column) for column in zip(*rounds, strict=True))
        ratio = statistics.median(a / b for a, b in rounds)
        print(f"{name:8} {ours:9.3f} {baseline:11.3f} {ratio:6.2f}")
        result[name] = {"defend_s": ours, "baseline_s": baseline, "ratio": ratio}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
