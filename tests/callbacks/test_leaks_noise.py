"""Noise is never drawn twice, neither by a second run nor by a resume."""

import json
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from tests.callbacks.leaks import Planted, private, watched_fit
from tests.helpers import Net, flat, loader, trainer

ROOT = Path(__file__).parents[2]


class Silent(Net):
    """Its loss has a zero gradient: what is released is the noise, divided by the batch."""

    def training_step(self, batch, batch_idx):
        return 0.0 * self(batch[0]).mean()


class Noise(Callback):
    """The released gradients minus the sums, and the sizes of the batches."""

    def __init__(self):
        self.drawn, self.sizes = {}, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.sizes.append(len(batch[0]))

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        gradients = torch.cat([p.grad.flatten() for p in pl_module.parameters()])
        self.drawn[trainer.global_step] = (gradients * 32 / (30.0 * 0.5)).double()


def noise_of(ckpt=None, save=None, **settings):
    pl.seed_everything(7)
    spy = Noise()
    extra = [] if save is None else [ModelCheckpoint(save, every_n_train_steps=3, filename="{step}",
                                                     save_top_k=-1)]  # fmt: skip
    run = trainer(
        callbacks=[private(ledger=False, **settings), spy, *extra],
        max_epochs=2,
        enable_checkpointing=bool(extra),
    )
    run.fit(Silent(), loader(256, 32), ckpt_path=ckpt)
    return spy


def related(one, other):
    """The largest correlation between any noise of one run and any of another."""
    a, b = (torch.nn.functional.normalize(torch.stack(list(d.values()))) for d in (one, other))
    return float((a @ b.T).abs().max())


CHANCE = 0.6  # 195 coordinates, 256 pairs: 0.6 is eight deviations


@pytest.mark.parametrize("secure", [False, True])
def test_neither_a_second_run_nor_a_resume_draws_the_same_noise(tmp_path, secure):
    settings = {"secure_noise": secure}
    first, second = noise_of(save=tmp_path, **settings), noise_of(**settings)
    resumed = noise_of(ckpt=tmp_path / "step=6.ckpt", **settings)
    assert sorted(first.drawn) == list(range(16))
    assert sorted(resumed.drawn) == list(range(6, 16))
    for drawn in (first.drawn, resumed.drawn):
        noise = torch.cat(list(drawn.values()))
        assert abs(noise.std() - 1) < 4 / (2 * noise.numel()) ** 0.5
    assert related(first.drawn, second.drawn) < CHANCE
    assert related(first.drawn, resumed.drawn) < CHANCE
    assert first.sizes != second.sizes
    assert first.sizes[6:] != resumed.sizes


def test_the_comparison_sees_noise_that_is_replayed(tmp_path):
    """With a fixed seed a resume replays it, by design; such a run counts as not private."""
    first = noise_of(save=tmp_path, insecure_seed=1)
    resumed = noise_of(ckpt=tmp_path / "step=6.ckpt", insecure_seed=1)
    assert related(first.drawn, resumed.drawn) > 0.999
    assert first.sizes[6:] == resumed.sizes


PROGRAM = """
import json, sys
from tests.callbacks.test_leaks_noise import noise_of
spy = noise_of(ckpt=sys.argv[1])
print(json.dumps([{k: v.tolist() for k, v in spy.drawn.items()}, spy.sizes]))
"""


def test_nor_does_a_resume_in_another_process(tmp_path):
    first = noise_of(save=tmp_path)
    here = noise_of(ckpt=tmp_path / "step=6.ckpt")
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, tmp_path / "step=6.ckpt"],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    drawn, sizes = json.loads(process.stdout.splitlines()[-1])
    there = {int(step): torch.tensor(v, dtype=torch.float64) for step, v in drawn.items()}
    assert sorted(there) == list(range(6, 16))
    assert related(first.drawn, there) < CHANCE
    assert related(here.drawn, there) < CHANCE
    assert sizes not in (first.sizes[6:], here.sizes)


def test_weights_alone_are_noise():
    """With this much noise the trained weights are far from what the data would make of them."""
    module, _, _, _ = watched_fit()
    assert (flat(module) - flat(Planted())).abs().max() > 1e-3
