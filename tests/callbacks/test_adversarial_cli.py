"""LightningCLI builds AdversarialTraining and RobustnessEvaluation from YAML."""

import lightning.pytorch as pl
import pytest

from defend import L2, PGD, AdversarialTraining, Linf
from defend.attacks.free import Free
from defend.attacks.presets import fgsm_rs
from defend.attacks.torchattacks.adapter import TorchAttack
from defend.evaluation.overfitting import OverfittingAlarm
from defend.objectives import AWP, TRADES, Madry
from tests.callbacks.by_hand import ATTACK, EPS
from tests.helpers import Net, loader

CONFIG = """
trainer:
  accelerator: cpu
  devices: 1
  max_epochs: 1
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  default_root_dir: {folder}
  callbacks:
    - class_path: defend.AdversarialTraining
      init_args:
{settings}
"""
PGD_YAML = """
        attack:
          class_path: defend.PGD
          init_args:
            ball:
              class_path: defend.Linf
              init_args: {eps: 0.1}
            steps: 2
"""
YAML = {
    "trades": (
        PGD_YAML
        + """
        objective:
          class_path: defend.objectives.TRADES
          init_args: {beta: 4.0}
        warmup_epochs: 2
""",
        {"attack": ATTACK, "objective": TRADES(4.0), "warmup_epochs": 2},
    ),
    "awp": (
        PGD_YAML
        + """
        objective:
          class_path: defend.objectives.AWP
          init_args:
            objective:
              class_path: defend.objectives.TRADES
              init_args: {beta: 4.0}
            gamma: 0.005
""",
        {"attack": ATTACK, "objective": AWP(TRADES(4.0), 0.005)},
    ),
    "torchattacks": (
        """
        attack:
          class_path: defend.attacks.torchattacks.adapter.TorchAttack
          init_args:
            name: FGSM
            settings: {eps: 0.1}
        clean_fraction: 0.5
""",
        {"attack": TorchAttack("FGSM", {"eps": 0.1}), "clean_fraction": 0.5},
    ),
    "alarm": (
        PGD_YAML
        + """
        alarm:
          class_path: defend.evaluation.overfitting.OverfittingAlarm
          init_args:
            every_n_steps: 2
            switch: true
""",
        {"attack": ATTACK, "alarm": OverfittingAlarm(every_n_steps=2, switch=True)},
    ),
    "no alarm": (PGD_YAML + "        alarm: null\n", {"attack": ATTACK, "alarm": None}),
    "preset": (
        """
        attack:
          class_path: defend.attacks.presets.fgsm_rs
          init_args: {eps: 0.1}
""",
        {"attack": fgsm_rs(EPS)},
    ),
    "free": (
        """
        attack:
          class_path: defend.attacks.free.Free
          init_args:
            ball:
              class_path: defend.Linf
              init_args: {eps: 0.1}
            replays: 2
""",
        {"attack": Free(Linf(EPS), replays=2)},
    ),
}


class Data(pl.LightningDataModule):
    def train_dataloader(self):
        return loader(32, 16)


@pytest.mark.parametrize("name", YAML)
def test_lightning_cli_builds_it_from_yaml_and_from_what_it_saved(tmp_path, name):
    pytest.importorskip("jsonargparse", reason="LightningCLI needs jsonargparse, an extra")
    from lightning.pytorch.cli import LightningCLI

    settings, expected = YAML[name]
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.format(folder=tmp_path, settings=settings))
    saved = tmp_path / "saved.yaml"
    keep = {"save_config_kwargs": {"config_filename": saved.name}}
    for file, save in ((config, keep), (saved, {"save_config_callback": None})):
        cli = LightningCLI(Net, Data, args=["fit", "--config", str(file)], **save)
        callback = next(c for c in cli.trainer.callbacks if isinstance(c, AdversarialTraining))
        for setting, value in {"objective": Madry(), "alarm": "auto", **expected}.items():
            given = callback._alarm if setting == "alarm" else getattr(callback._settings, setting)
            assert given == value
        assert cli.trainer.global_step > 0


EVALUATION = CONFIG.replace("AdversarialTraining", "RobustnessEvaluation")
ATTACKS = """
        attacks:
          pgd:
            class_path: defend.PGD
            init_args:
              ball:
                class_path: defend.L2
                init_args: {eps: 0.1}
              steps: 2
          theirs:
            class_path: defend.attacks.torchattacks.adapter.TorchAttack
            init_args:
              name: FGSM
              settings: {eps: 0.1}
        chunk_size: 8
"""


def test_lightning_cli_builds_an_evaluation(tmp_path):
    pytest.importorskip("jsonargparse", reason="LightningCLI needs jsonargparse, an extra")
    from lightning.pytorch.cli import LightningCLI

    class Both(Data):
        def val_dataloader(self):
            return loader(32, 16)

    config = tmp_path / "config.yaml"
    config.write_text(EVALUATION.format(folder=tmp_path, settings=ATTACKS))
    args = ["fit", "--config", str(config)]
    cli = LightningCLI(Net, Both, args=args, save_config_callback=None)
    evaluation = cli.trainer.callbacks[0]
    attacks = {"pgd": PGD(L2(0.1), steps=2), "theirs": TorchAttack("FGSM", {"eps": 0.1})}
    assert (evaluation.attacks, evaluation.chunk_size) == (attacks, 8)
    assert evaluation.report.records == 32
