"""A set-up under DifferentialPrivacy: does it train, by which engine, and rightly?"""

import statistics
import tempfile
import time
from dataclasses import dataclass

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader

from defend import DifferentialPrivacy
from defend.errors import PrivacyError
from tests.zoo.check import collated, dense, loss_of, norm, silent
from tests.zoo.setup import SetUp
from tests.zoo.stilled import stilled


@dataclass(frozen=True)
class Trial:
    """What came of it.

    Attributes:
        engine: what took the steps, "hooks" or "record"; None where the set-up was refused.
        why: the first sentence of the refusal, or why it goes record by record; "" for neither.
        distance: of the gradient that is released without noise from that of the loop over records,
            relative to its norm.
        times: the time of a private step over that of a plain one; None where not measured.
    """

    engine: str | None
    why: str = ""
    distance: float = 0.0
    times: float | None = None


def tried(setup: SetUp, *, timed: bool = False) -> Trial:
    """One step as the set-up comes, with its dropout; and one stilled, by the same engine."""
    callback = private(noise_multiplier=1.0)
    try:
        fit(setup, setup.module(), callback)
    except PrivacyError as error:
        return Trial(None, str(error).replace("\n", " "))
    engine = callback.settings()["engine"]
    expected, clip = gradient_of_a_loop(setup)
    released = _Released()
    settings = {"noise_multiplier": 0.0, "max_grad_norm": clip, "engine": engine}
    fit(setup, stilled(setup.module()), private(**settings), released)
    apart = norm({n: released.gradient[n] - g for n, g in expected.items()})
    times = _times(setup, engine) if timed else None
    return Trial(engine, "", apart / norm(expected), times)


def private(**settings) -> DifferentialPrivacy:
    defaults = {"delta": 1e-3, "max_grad_norm": 1.0, "insecure_seed": 1, "ledger": False}
    return DifferentialPrivacy(**{**defaults, **settings})


def fit(setup: SetUp, module: pl.LightningModule, *callbacks: Callback, steps: int = 1) -> None:
    """Steps on all records."""
    data = setup.data()
    batches = DataLoader(data, batch_size=len(data), collate_fn=setup.collate)
    with tempfile.TemporaryDirectory() as folder:
        pl.Trainer(
            max_epochs=steps,
            callbacks=list(callbacks),
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        ).fit(module, batches)


def gradient_of_a_loop(setup: SetUp) -> tuple[dict[str, Tensor], float]:
    """By the definition: a loop that collates each record, clips its gradient, and adds it up.

    Returns:
        What it divides by the number of records, and C, to which half of the others are clipped.
    """
    module, data = silent(stilled(setup.module()).train()), setup.data()
    buffers = {n: b.clone() for n, b in module.named_buffers()}
    gradients = []
    for i in range(len(data)):
        with torch.no_grad():
            for n, b in module.named_buffers():
                b.copy_(buffers[n])
        module.zero_grad(set_to_none=True)
        loss_of(module, collated(setup, [data[i]])).backward()
        named = module.named_parameters()
        gradients.append({n: dense(p) for n, p in named if p.requires_grad})
    norms = [norm(g) for g in gradients]
    clip = statistics.median(length for length in norms if length)  # a margin may be kept: 0
    scales = [min(1.0, clip / max(length, clip)) / len(data) for length in norms]
    pairs = list(zip(scales, gradients, strict=True))
    return {n: sum(scale * g[n] for scale, g in pairs) for n in gradients[0]}, clip


class _Released(Callback):
    """Takes the gradient that the optimizer gets."""

    def on_before_optimizer_step(self, trainer, module, optimizer):
        named = module.named_parameters()
        self.gradient = {n: dense(p) for n, p in named if p.requires_grad}


class _Clock(Callback):
    """Seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self._start = time.perf_counter()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.seconds.append(time.perf_counter() - self._start)


def _times(setup: SetUp, engine: str) -> float:
    """Medians of nine steps each, the first of which is left out."""
    plain, clock = _Clock(), _Clock()
    fit(setup, setup.module(), plain, steps=10)
    settings = {"noise_multiplier": 1.0, "engine": engine, "selftest": False}
    fit(setup, setup.module(), private(**settings), clock, steps=10)
    return statistics.median(clock.seconds[1:]) / statistics.median(plain.seconds[1:])
