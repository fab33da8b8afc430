"""How test programs of several processes are started, begin and end.

PyTorch 2.13 kills some of them with *terminate called without an active exception* (exit −6) after
all work is done, if a DistributedDataParallel outlives its process group. So a program drops its
models first, then the group.
"""

import functools
import gc
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[1]
# In seconds, for a machine that runs two tests at once, and something else beside them.
TIMEOUT = 400  # for a whole program
WAIT = 60  # that one process waits for another


def torchrun(processes: int, *program: str) -> None:
    """Run `python -m program…` in so many processes, on a port that nobody else has."""
    group = ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m"]
    launch(*group, *program)


@functools.cache
def two_processes() -> str:
    """The folder of what two processes under `torch.distributed.run` ended with, started once."""
    folder = tempfile.mkdtemp(prefix="defend-torchrun-")
    torchrun(2, "tests.training.two_processes", folder)
    return folder


def launch(*program: str) -> None:
    """Run `python -m program…`, with a time limit; what it wrote is told where it failed."""
    done = subprocess.run(
        [sys.executable, "-m", *program],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@contextmanager
def process_group(wait: float = WAIT) -> Iterator[None]:
    """Around all of a program's work: its group, on one thread in each process.

    torchrun leaves it to the program to make the group; Lightning's own launcher makes it later.
    """
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        dist.init_process_group("gloo", timeout=timedelta(seconds=wait))
    try:
        yield
    finally:
        end_of_program()


def end_of_program() -> None:
    """Collect what no name holds any more, then leave the group, whoever made it."""
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()
