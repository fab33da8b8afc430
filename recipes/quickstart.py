"""The quickstart: one unmodified Lightning module, trained four ways, reviewed side by side.

Run it with `make demo`. It trains a small convolutional net on scikit-learn's bundled digits

    plain               no callback
    robust              + AdversarialTraining (PGD-7, L∞ 0.2)
    private             + DifferentialPrivacy (target ε, δ = 1e-4)
    robust and private  + both

and prints a table of clean accuracy, accuracy under PGD-20, and ε. Everything also goes to MLflow,
and a picture of adversarial examples goes to `outputs/`.
"""

import argparse
import logging
import os
import sys
import time
import warnings
from pathlib import Path

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import MLFlowLogger
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import defend

EPS = 0.2  # L∞ radius, in units of the [0, 1] box
DELTA = 1e-4  # below 1 / 1,437 training records


# --- what a user already has: a data module and a module that know nothing of defend --------------


class Digits(pl.LightningDataModule):
    """8 × 8 digits in [0, 1]; a fixed split of 1,437 records for training, 360 for validation."""

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self.batch_size = batch_size
        digits = load_digits()
        x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
        y = torch.tensor(digits.target)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        cut = len(x) * 8 // 10
        self.train = TensorDataset(x[order[:cut]], y[order[:cut]])
        self.val = TensorDataset(x[order[cut:]], y[order[cut:]])

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, batch_size=256)


class DigitNet(pl.LightningModule):
    """Two convolutions and two linear layers."""

    def __init__(self, lr: float = 5e-3) -> None:
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(32 * 16, 64),
            nn.ReLU(),
            nn.Linear(64, 10),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
        x, y = batch
        self.log("val_loss", F.cross_entropy(self(x), y))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.lr)


# --- what defend adds: callbacks ------------------------------------------------------------------


def adversarial_training() -> defend.AdversarialTraining:
    return defend.AdversarialTraining(defend.PGD(defend.Linf(EPS), steps=7))


def differential_privacy(target_epsilon: float) -> defend.DifferentialPrivacy:
    return defend.DifferentialPrivacy(target_epsilon=target_epsilon, delta=DELTA, max_grad_norm=1.0)


def train(
    name: str, callbacks: list[pl.Callback], options: argparse.Namespace
) -> tuple[DigitNet, defend.RobustnessReport]:
    """Fit one module; the callbacks are all that differs between the four runs."""
    pl.seed_everything(options.seed, verbose=False)
    evaluation = defend.RobustnessEvaluation(
        {"pgd20": defend.PGD(defend.Linf(EPS), steps=20)}, every_n_epochs=10
    )
    module = DigitNet()
    trainer = pl.Trainer(
        accelerator="auto",
        devices=1,
        max_epochs=options.epochs,
        check_val_every_n_epoch=min(10, options.epochs),
        callbacks=[*callbacks, evaluation],
        logger=MLFlowLogger("defend-quickstart", run_name=name, tracking_uri=options.tracking_uri),
        default_root_dir="outputs",  # the ledgers of the private runs go there
        enable_checkpointing=False,
        enable_model_summary=False,
        log_every_n_steps=20,
        enable_progress_bar=sys.stdout.isatty(),
    )
    trainer.fit(module, datamodule=Digits(options.batch_size))
    assert evaluation.report is not None
    return module, evaluation.report


def picture(modules: dict[str, DigitNet], data: Digits, path: Path) -> None:
    """Ten validation digits, and what PGD-20 makes of them for each module."""
    from defend.tracking.figures import adversarial_examples_figure

    x, y = data.val[:10]
    rows, captions = {"original": x}, {"original": [str(int(label)) for label in y]}
    for name, module in modules.items():
        attack = defend.PGD(defend.Linf(EPS), steps=20)
        rows[name] = attack(module, x, y, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            predicted = module.eval()(rows[name]).argmax(1)
        captions[name] = [f"→ {int(label)}" for label in predicted]
    path.parent.mkdir(parents=True, exist_ok=True)
    adversarial_examples_figure(rows, captions).savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--target-epsilon", type=float, default=8.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tracking-uri", default="sqlite:///mlflow.db")
    parser.add_argument("--output", type=Path, default=Path("outputs"))
    options = parser.parse_args()
    quiet()

    runs: dict[str, list[pl.Callback]] = {
        "plain": [],
        "robust": [adversarial_training()],
        "private": [differential_privacy(options.target_epsilon)],
        "robust and private": [
            adversarial_training(),
            differential_privacy(options.target_epsilon),
        ],
    }
    modules, table = {}, []
    for name, callbacks in runs.items():
        start = time.perf_counter()
        modules[name], report = train(name, callbacks, options)
        seconds = time.perf_counter() - start
        private = [c for c in callbacks if isinstance(c, defend.DifferentialPrivacy)]
        table.append(
            f"| {name:18} | {100 * report.clean_accuracy:7.1f} "
            f"| {100 * report.attack_accuracy['pgd20']:8.1f} "
            f"| {f'{private[0].epsilon:.2f}' if private else '–':>5} | {seconds:7.0f} |"
        )
        print(f"trained: {name} ({seconds:.0f} s)", flush=True)

    image = options.output / "adversarial_examples.png"
    picture(modules, Digits(options.batch_size), image)
    print(f"\nDigits, PGD-20 at L∞ {EPS}, ε at δ = {DELTA:g}\n")
    print("| run                | clean % | PGD-20 % |     ε | seconds |")
    print("|--------------------|--------:|---------:|------:|--------:|")
    print("\n".join(table))
    print(f"\nAdversarial examples: {image}")
    executable = Path(sys.executable).with_name("mlflow")
    print(f"Review the runs:      {executable} ui --backend-store-uri {options.tracking_uri}")


def quiet() -> None:
    """Leave the table as the only thing on the screen."""
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)


if __name__ == "__main__":
    main()
