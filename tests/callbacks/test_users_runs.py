"""What users bring to a private fit: weight averaging, the command line, and whole runs."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.callbacks.weight_averaging import EMAWeightAveraging
from lightning.pytorch.strategies import SingleDeviceStrategy

from defend import DifferentialPrivacy
from defend.privacy.mechanism.clipping import AdaptiveClipping, FlatClipping, PerLayerClipping
from tests.callbacks.users import fit, private
from tests.helpers import Net, flat, loader

# --- weight averaging ---------------------------------------------------------------------------


class Averages(Callback):
    """The exponential average by hand, over the weights that the steps released."""

    def __init__(self, decay):
        self.decay, self.now, self.after = decay, None, {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        weights = flat(pl_module).clone()
        if self.now is None:
            self.now = weights
        else:
            self.now = self.decay * self.now + (1 - self.decay) * weights
        self.after[trainer.global_step] = (self.now, weights)


class Watched(Net):
    """Keeps the weights that it was validated with."""

    def __init__(self):
        super().__init__()
        self.validated = {}

    def validation_step(self, batch, batch_idx):
        self.validated[self.trainer.global_step] = flat(self).clone()
        super().validation_step(batch, batch_idx)


def weights_in(state):
    return torch.cat([value.flatten() for value in state.values()])


def test_an_exponential_average_of_the_released_weights(tmp_path):
    by_hand, callback = Averages(0.6), private(ledger=False)
    saved = ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=-1, filename="{step}")
    module, _ = fit(
        callback,
        Watched,
        val=loader(32, 32, seed=1),
        extra=[EMAWeightAveraging(decay=0.6), by_hand, saved],
        max_epochs=2,
        enable_checkpointing=True,
        num_sanity_val_steps=0,
    )
    assert callback.steps == 16
    torch.testing.assert_close(flat(module), by_hand.now, rtol=0, atol=1e-6)
    assert sorted(module.validated) == [8, 16]
    for step in (8, 16):
        average, current = by_hand.after[step]
        assert not torch.allclose(average, current, atol=1e-4)
        torch.testing.assert_close(module.validated[step], average, rtol=0, atol=1e-6)
        checkpoint = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)
        torch.testing.assert_close(weights_in(checkpoint["state_dict"]), average)
        torch.testing.assert_close(weights_in(checkpoint["current_model_state"]), current)
    resumed, _ = fit(
        private(ledger=False),
        Watched,
        ckpt=tmp_path / "step=8.ckpt",
        extra=[EMAWeightAveraging(decay=0.6)],
        max_epochs=2,
    )
    torch.testing.assert_close(flat(resumed), flat(module), rtol=0, atol=1e-6)


# --- the command line ---------------------------------------------------------------------------

CONFIG = """
trainer:
  max_epochs: 2
  accelerator: cpu
  devices: 1
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  default_root_dir: {folder}
  callbacks:
    - class_path: defend.DifferentialPrivacy
      init_args:
        delta: 1.0e-3
        max_grad_norm: 0.5
        noise_multiplier: 0.7
        chunk_size: 8
        noise_schedule:
          class_path: defend.privacy.mechanism.schedules.Decay
          init_args: {{gamma: 0.9, every: 4}}
        clipping:
          class_path: defend.privacy.mechanism.clipping.{clipping}
          init_args: {settings}
model:
  lr: 0.01
"""


class Plain(pl.LightningDataModule):
    def train_dataloader(self):
        return loader(64, 16)


@pytest.mark.parametrize(
    ("clipping", "settings"),
    [
        (FlatClipping(), "{}"),
        (PerLayerClipping(), "{}"),
        (AdaptiveClipping(target_quantile=0.9), "{target_quantile: 0.9}"),
    ],
    ids=["flat", "per_layer", "adaptive"],
)
def test_lightning_cli_builds_it_from_yaml(tmp_path, clipping, settings):
    pytest.importorskip("jsonargparse", reason="LightningCLI needs jsonargparse, an extra")
    from lightning.pytorch.cli import LightningCLI

    config = tmp_path / "config.yaml"
    name = type(clipping).__name__
    config.write_text(CONFIG.format(folder=tmp_path, clipping=name, settings=settings))
    cli = LightningCLI(
        Net,
        Plain,
        args=["fit", "--config", str(config)],
        save_config_callback=None,
    )
    callback = cli.trainer.callbacks[0]
    assert type(callback) is DifferentialPrivacy
    assert callback._training.settings.clipping == clipping
    assert callback.history == (
        (0.7, 1 / 4, 4),
        (0.7 * 0.9, 1 / 4, 4),
    )


def test_the_loss_goes_down_with_a_little_noise():
    val = loader(256, 256)
    losses = []
    for epochs in (1, 12):
        _, run = fit(private(noise_multiplier=0.01, insecure_seed=None), val=val, max_epochs=epochs)
        losses.append(float(run.callback_metrics["val_loss"]))
    assert losses[1] < 0.9 * losses[0]  # 0.72: batches and noise are new each time


class Own(SingleDeviceStrategy):
    """A strategy that somebody made from Lightning's."""


def test_a_strategy_of_ones_own_trains():
    callback = private(ledger=False)
    fit(callback, Net, max_epochs=1, strategy=Own(device=torch.device("cpu")))
    assert callback.steps == 8
