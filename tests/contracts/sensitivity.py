"""How far one record moves the clipped sum, for every objective × views × chunk × processes.

`python -m tests.contracts.sensitivity_table` puts the figures into the README.

Moves are in units of C. A record is left out, which may move the sum by C, or another one takes its
place, which is a removal and an addition: half of that move is what has to stay within C. Noise is
off, every record is in the batch, and random numbers of a record are its own, wherever it stands:
the coupling that the guarantee rests on (`defend.privacy`, "Randomness").
"""

import dataclasses
import functools
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from defend import PGD, Linf
from defend.objectives import AWP, MART, TRADES
from defend.training import Adversarial
from defend.training.adversarial import AdversarialSteps
from defend.training.step import TrainingStep
from tests.contracts.small import flat, same_weights
from tests.distributed import process_group, torchrun
from tests.loops import private_loop

C = 0.5
BOUND = 1 + 1e-4
COUNT = 5  # records; one more takes another's place

Record = tuple[int, Tensor, Tensor]


class Own(Linf):
    """Random starts that belong to the record: seeded by the row itself."""

    def random_start(self, like, generator, *, eps=None, free=None):
        eps = self.eps if eps is None else float(eps)
        rows = [torch.empty_like(row).uniform_(-eps, eps, generator=own(row)) for row in like]
        return torch.stack(rows) if rows else torch.zeros_like(like)


def own(row: Tensor, extra: int = 0) -> torch.Generator:
    """A generator that is the same wherever a row stands."""
    bits = row.detach().float().contiguous().view(torch.int32).sum()
    return torch.Generator().manual_seed((int(bits) + extra) % 2**31)


ATTACK = PGD(Own(0.3), steps=2, step_size=0.2)
OBJECTIVES: dict[str, Adversarial | None] = {
    "augmented only": None,
    "Madry": Adversarial(ATTACK),
    "half clean": Adversarial(ATTACK, clean_fraction=0.5),
    "TRADES": Adversarial(ATTACK, objective=TRADES(6.0)),
    "MART": Adversarial(ATTACK, objective=MART(5.0)),
    "AWP of Madry": Adversarial(ATTACK, objective=AWP(gamma=5.0)),
    "AWP of TRADES": Adversarial(ATTACK, objective=AWP(TRADES(6.0), gamma=5.0)),
}
VIEWS = (1, 2, 3)
CHUNKS = (None, 4, 1)
# Each process cuts its own share into chunks, as one process does. What several add is that some
# have more chunks than others: 2, 2 and 1 records on three processes, one a chunk. So tests measure
# these; with `EVERY` in the environment, as for the README's table, it is all chunk sizes.
CHUNKS_OF = {1: CHUNKS, 2: (None,), 3: (1,)}
EVERY = "DEFEND_TESTS_EVERY_COMBINATION"
RANKS = tuple(CHUNKS_OF)


@dataclasses.dataclass(frozen=True)
class Combination:
    objective: str
    views: int
    chunk: int | None


def combinations(ranks: int) -> list[Combination]:
    """What is measured under so many processes."""
    chunks = CHUNKS if EVERY in os.environ else CHUNKS_OF[ranks]
    return [Combination(*c) for c in itertools.product(OBJECTIVES, VIEWS, chunks)]


def net() -> nn.Sequential:
    with same_weights():
        module = nn.Sequential(
            nn.Conv2d(1, 2, 3), nn.GroupNorm(1, 2), nn.Tanh(), nn.Flatten(), nn.Linear(32, 3)
        )
        with torch.no_grad():
            module[-1].weight *= 4  # sure of itself: gradients of records differ in size
    return module


def records() -> list[Record]:
    """`COUNT` records and one more, each with a number of its own."""
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(COUNT + 1, 1, 6, 6, generator=generator)
    return [(i, x[i], torch.tensor((i * 2) % 3)) for i in range(COUNT + 1)]


def augmented(batch: Sequence[Record]) -> tuple[Tensor, Tensor]:
    """Collates; each view of a record is another image, the same ones in each batch."""
    seen: dict[int, int] = {}
    rows = []
    for number, x, _ in batch:
        view = seen[number] = seen.get(number, -1) + 1
        noise = torch.rand(x.shape, generator=own(x, 7919 * (view + 1)))
        rows.append((x + 0.3 * (noise - 0.5)).clamp(0, 1))
    return torch.stack(rows), torch.stack([y for _, _, y in batch])


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return F.cross_entropy(model(x), y)


draw_rows = AdversarialSteps._rows_to_attack


def own_coins(steps, x, generator, private, views):
    """Each row's coin is its own too."""
    coins = torch.stack([torch.rand((), generator=own(row, 1)) for row in x])
    with mock.patch("torch.rand", return_value=coins):
        return draw_rows(steps, x, generator, private, views)


@contextmanager
def coupled(released: dict[str, Tensor]) -> Iterator[None]:
    """Random numbers of a record are its own, and earlier releases are the same."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(AdversarialSteps, "_rows_to_attack", own_coins))
        stack.enter_context(mock.patch.object(TrainingStep, "_released", return_value=released))
        yield


def released() -> dict[str, Tensor]:
    """Stands for the last release."""
    generator = torch.Generator().manual_seed(2)
    return {n: torch.randn(p.shape, generator=generator) for n, p in net().named_parameters()}


def clipped_sum(batch: Sequence[Record], combination: Combination) -> Tensor:
    """Σᵢ clip(gᵢ) over all of `batch`, as a training releases it when its noise is off."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    module = net()
    with coupled(released()), private_loop(
        DistributedDataParallel(module) if world > 1 else module,
        torch.optim.SGD(module.parameters(), lr=0.0),
        DataLoader(list(batch), batch_size=1, collate_fn=augmented),
        loss=loss,
        epochs=1,
        delta=1e-3,
        max_grad_norm=C,
        noise_multiplier=0.0,
        insecure_seed=0,
        chunk_size=combination.chunk,
        views=combination.views,
        adversarial=OBJECTIVES[combination.objective],
        ledger=False,
        selftest=False,
    ) as private:  # fmt: skip
        private._open[-1].data.sampler.sample = lambda step: list(range(len(batch)))
        private.step(next(iter(private.loader)))
        return flat([p.grad for p in module.parameters()]).double() * world


def largest_move(total, everybody: Sequence[Record]) -> float:
    """The most that `total`, a function of records, moves for one of them, in units of C."""
    *present, spare = everybody
    whole, moves = total(present), []
    for i in range(len(present)):
        without = total(present[:i] + present[i + 1 :])
        moves.append(float((whole - without).norm()) / C)
        instead = total([*present[:i], spare, *present[i + 1 :]])
        moves.append(float((whole - instead).norm()) / C / 2)
    return max(moves)


def measure(combination: Combination) -> float:
    return largest_move(functools.partial(clipped_sum, combination=combination), records())


@functools.cache
def table(ranks: int) -> dict[Combination, float]:
    """What each combination moves by, under so many processes."""
    if ranks == 1:
        return {c: measure(c) for c in combinations(1)}
    with tempfile.TemporaryDirectory(prefix="defend-sensitivity-") as folder:
        file = Path(folder, "moves.json")
        torchrun(ranks, "tests.contracts.sensitivity", str(file))
        return dict(zip(combinations(ranks), json.loads(file.read_text()), strict=True))


def main(file: str) -> None:
    """One of several processes; rank 0 writes what was measured."""
    with process_group():
        moves = [measure(c) for c in combinations(dist.get_world_size())]
        if dist.get_rank() == 0:
            Path(file).write_text(json.dumps(moves))


if __name__ == "__main__":
    main(*sys.argv[1:])
