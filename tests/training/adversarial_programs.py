"""Adversarial loops that must come out alike in one process and in two.

`tests.training.two_processes` runs every case in each process, and writes what it ended with.
"""

import functools
import os
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from defend import PGD, Linf
from defend.attacks.free import Free
from defend.objectives import AWP, MART, TRADES
from tests.distributed import two_processes
from tests.helpers import flat
from tests.training.adversarial_cases import batches as rows_of
from tests.training.adversarial_cases import loop_of, net, sgd

# No random start, so that both kinds of run attack alike.
ATTACK = PGD(Linf(0.1), steps=2, random_start=False, loss="margin")
ROWS = 16  # of a batch, on all processes together


def mlp(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)).to(dtype)


def plain(world, *, model=mlp, attack=ATTACK, accumulate=1, ddp=None, **settings):
    """A plain loop, under DDP if there are several processes; each has every `world`-th row."""
    bare = model()
    optimizer = sgd(bare)
    wrapped = bare if world == 1 else DistributedDataParallel(bare, **(ddp or {}))
    loop = loop_of(wrapped, attack, optimizer, **settings)
    return _train(loop, bare, optimizer, world, accumulate)


def fabric(world, *, precision="64-true", model=mlp, attack=ATTACK, **settings):
    """The same under Fabric."""
    strategy = "auto" if world == 1 else "ddp"
    run = Fabric(accelerator="cpu", devices=world, precision=precision, strategy=strategy)
    run.launch()
    bare = model(torch.float32)
    seen = set()
    bare.register_forward_hook(lambda m, args, out: seen.add(str(out.dtype)))
    wrapped, optimizer = run.setup(bare, sgd(bare))
    loop = loop_of(wrapped, attack, optimizer, fabric=run, **settings)
    return _train(loop, bare, optimizer, world, dtype=torch.float32) | {"seen": seen}


def _train(loop, bare, optimizer, world, accumulate=1, dtype=torch.float64):
    rank = dist.get_rank() if world > 1 else 0
    losses = []
    for x, y in rows_of(4, ROWS, dtype):
        mine = x[rank::world], y[rank::world]
        if accumulate == 1:
            losses.append(loop.step(mine))
            continue
        optimizer.zero_grad()
        for part in range(accumulate):
            losses.append(loop.backward([t[part::accumulate] for t in mine], 1 / accumulate))
        optimizer.step()
    x, y = rows_of(1, ROWS, dtype)[0]
    starts = loop_of(
        loop._runtime.model, PGD(Linf(0.1), steps=1), fabric=getattr(loop._runtime, "_fabric", None)
    )
    return {
        "weights": flat(bare),
        "loss": torch.stack(losses).double().mean(),
        "attacked": starts.attacked((x, y))[0],
        "seed": loop_of(
            loop._runtime.model, seed=None, fabric=getattr(loop._runtime, "_fabric", None)
        ).state_dict()["seed"],
        "rates": loop.rates(),
    }


def not_wrapped(world):
    """No DistributedDataParallel around it; an error where there are several processes."""
    loop_of(mlp())
    return {"error": None}


CASES = {
    "plain madry": (plain, {}),
    "plain trades": (plain, {"objective": TRADES()}),
    "plain mart": (plain, {"objective": MART()}),
    "plain unused": (plain, {"objective": TRADES(), "ddp": {"find_unused_parameters": True}}),
    "plain accumulated": (plain, {"objective": MART(), "accumulate": 2}),
    "plain free": (plain, {"attack": Free(Linf(0.1), replays=2)}),
    "plain awp": (plain, {"objective": AWP(TRADES(), 0.05)}),
    "plain batch norm": (plain, {"objective": TRADES(), "model": net}),
    "fabric madry": (fabric, {}),
    "fabric trades": (fabric, {"objective": TRADES()}),
    "fabric half": (fabric, {"objective": MART(), "precision": "bf16-mixed"}),
    "not wrapped": (not_wrapped, {}),
}


def run_case(name, world):
    loop, settings = CASES[name]
    try:
        return loop(world, **settings)
    except Exception as error:
        return {"error": type(error).__name__, "message": str(error)}


@functools.cache
def alone(name):
    return run_case(name, 1)


def reports(name):
    """What each of two processes ended a case with."""
    return [torch.load(Path(two_processes(), f"{name}-{rank}.pt")) for rank in range(2)]


def run_cases(folder):
    """Run every case in one of two processes."""
    for name in CASES:
        torch.save(run_case(name, 2), Path(folder, f"{name}-{os.environ['LOCAL_RANK']}.pt"))
