"""Programs that tests run in processes of their own: `python -m tests.processes NAME ARGS…`."""

import json
import os
import signal
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from defend import PGD, AdversarialTraining, DifferentialPrivacy, Linf
from tests.helpers import Net, flat, loader, trainer

NOISE = "noise.jsonl"


class KillAt(Callback):
    """SIGKILL: no exception handler, no teardown, no flush."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class KeepNoise(Callback):
    """Writes a few of the released numbers of each step; with no data they are noise alone."""

    def __init__(self, folder):
        self.path = Path(folder) / NOISE

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        first = next(pl_module.parameters()).grad.flatten()[:4].tolist()
        with self.path.open("a") as file:
            file.write(json.dumps([trainer.global_step, first]) + "\n")


def train_private(folder, seed, kill_at, resume, ledger):
    """Fit for 4 epochs of 8 steps with a checkpoint every 3 steps; die at `kill_at` if > 0."""
    torch.set_num_threads(1)
    pl.seed_everything(0, verbose=False)
    noise = {"target_epsilon": 4.0} if seed == "none" else {"noise_multiplier": 1.2}
    private = DifferentialPrivacy(
        delta=1e-3,
        max_grad_norm=0.5,
        accountant="rdp",
        chunk_size=16,
        ledger=Path(folder).parent / "ledger.jsonl" if ledger == "shared" else None,
        insecure_seed=None if seed == "none" else int(seed),
        **noise,
    )
    callbacks = [
        private,
        AdversarialTraining(PGD(Linf(0.05), steps=2)),
        ModelCheckpoint(folder, every_n_train_steps=3, save_top_k=-1, filename="{step}"),
        KeepNoise(folder),
    ]
    if int(kill_at):
        callbacks.append(KillAt(int(kill_at)))
    module = Net(schedule=True)
    run = trainer(
        callbacks=callbacks, enable_checkpointing=True, max_epochs=4, default_root_dir=folder
    )
    run.fit(module, loader(256, 32), ckpt_path=None if resume == "none" else resume)
    report = {
        "epsilon": private.epsilon,
        "history": [list(segment) for segment in private.history],
        "weights": flat(module).tolist(),
    }
    print(json.dumps(report), flush=True)


def train_in_turn(*runs):
    """`train_private` in a process each, with the arguments FOLDER,SEED,KILL_AT,RESUME,LEDGER.

    Forked, so that what takes seconds to import is imported once; each process draws secrets of its
    own all the same. Prints how each ended: its exit status, negative for a signal.
    """
    import opacus.grad_sample  # noqa: F401  # defend imports it at the first private step

    for run in runs:
        child = os.fork()
        if child == 0:
            train_private(*run.split(","))
            sys.stdout.flush()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    programs = (train_private, train_in_turn)
    {program.__name__: program for program in programs}[sys.argv[1]](*sys.argv[2:])
