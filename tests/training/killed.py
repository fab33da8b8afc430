"""A private loop that is killed: `python -m tests.training.killed FOLDER TIMES`.

Apart from `tests.processes`, whose imports take longer than all of it.
"""

import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from tests.loops import private_loop


def _train_and_tell(folder, pipe, planned):
    """A private loop of its own that writes one byte after each step that was taken."""
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 3)
    with private_loop(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        DataLoader(TensorDataset(torch.randn(64, 8), torch.arange(64) % 3), 8),
        loss=lambda m, batch: F.cross_entropy(m(batch[0]), batch[1]),
        epochs=planned,
        delta=1e-3,
        max_grad_norm=1.0,
        noise_multiplier=1.0,
        accountant="rdp",
        ledger=Path(folder) / "ledger.jsonl",
    ) as private:
        os.write(pipe, b"(")
        for _ in range(planned):
            for batch in private.loader:
                private.step(batch)
                os.write(pipe, b".")


def kill_at_random_moments(folder, times):
    """Start a training `times` times and SIGKILL it each time; print steps told, one a line.

    All of them are on one ledger, so each has to live with what the ones before it left there.
    """
    torch.set_num_threads(1)
    chance = random.Random(0)
    with tempfile.TemporaryDirectory() as elsewhere, Path(os.devnull).open("wb") as nobody:
        _train_and_tell(elsewhere, nobody.fileno(), planned=1)  # so that children import nothing
    for _ in range(int(times)):
        out, into = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(out)
            _train_and_tell(folder, into, planned=1000)
            os._exit(1)  # killed long before
        os.close(into)
        told = os.read(out, 1)
        time.sleep(chance.uniform(0.0, 0.1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        while chunk := os.read(out, 4096):
            told += chunk
        os.close(out)
        assert told.startswith(b"("), told
        print(told.count(b"."))


if __name__ == "__main__":
    kill_at_random_moments(*sys.argv[1:])
