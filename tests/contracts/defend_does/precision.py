"""Precision and noise."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from tests.contracts.defend_does.yardstick import (
    Plain,
    Released,
    breaks,
    dp,
    fit,
    holds,
    measure,
)
from tests.contracts.mistakes import ComplexScale
from tests.contracts.outcomes import Outcome
from tests.contracts.small import ROWS, batch, loss, net

BREAKS = breaks()


@BREAKS.add
def fp16_grad_scaler() -> Outcome:
    """precision="16-mixed", with its scaler on the CPU too."""
    scaler = torch.amp.GradScaler("cpu")
    fit(Plain(), plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    return Outcome("open", "it went on")


@BREAKS.add
def grad_scaler_skips_the_step() -> Outcome:
    return fp16_grad_scaler()


@BREAKS.add
def bf16_norms() -> Outcome:
    return measure(precision="bf16-mixed")


@BREAKS.add
def bf16_weights() -> Outcome:
    fit(Plain(), precision="bf16-true")
    return Outcome("open", "it went on")


@BREAKS.add
def complex_weights() -> Outcome:
    found: list[Tensor] = []

    class Spy(Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            found.append(pl_module.network.scale.grad.clone())

    data = DataLoader(TensorDataset(*batch()), ROWS)
    fit(Still(ComplexScale()), data, dp(), (Spy(),), max_epochs=2)
    noise = (found[0] - found[1]) * ROWS / 0.1 / 2**0.5
    parts = [float(part.std()) for part in (noise.real, noise.imag)]
    return holds(all(abs(p - 1) < 0.1 for p in parts), "noise of σC on each part")


# --- noise ---------------------------------------------------------------------------------------


class Still(Plain):
    """Never moves: every step starts from the same weights."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def _releases(module: Plain | None = None, **settings: Any) -> list[Tensor]:
    """What three steps on the same records and weights release: they differ by their noise."""
    spy = Released()
    data = DataLoader(TensorDataset(*batch()), ROWS)
    fit(Still() if module is None else module, data, dp(**settings), (spy,), max_epochs=3)
    assert len(spy.gradients) == 3
    return spy.gradients


def _different(first: Tensor, second: Tensor, how: str) -> Outcome:
    far = float((first - second).std()) * ROWS / 0.1
    return holds(far > 0.7, f"{how}: different noise")


@BREAKS.add
def seeded_noise_replayed_after_resume() -> Outcome:
    """A script that seeds and fits, run twice."""
    found = []
    for _ in range(2):
        pl.seed_everything(42, verbose=False)
        found.append(_releases()[0])
    return _different(*found, "two runs of a seeded script")


@BREAKS.add
def noise_32_bit_seed() -> Outcome:
    found = [_releases(insecure_seed=seed)[0] for seed in (7, 7 + 2**32)]
    return _different(*found, "seeds 7 and 7 + 2³²")


@BREAKS.add
def attack_reseeds_global_rng() -> Outcome:
    class Reseeds(Still):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            torch.manual_seed(0)  # what some attacks do in each call
            return loss(self, *batch)

    first, second, _ = _releases(Reseeds(net()))
    return _different(first, second, "two steps")


@BREAKS.add
def sigma_zero() -> Outcome:
    callback = dp(noise_multiplier=0.0)
    fit(Plain(), callback=callback)
    right = callback.epsilon == float("inf") and not callback.private
    return holds(right, "trains without noise; ε is inf, and the run is marked not private")
