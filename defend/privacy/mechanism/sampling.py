"""Poisson batches: each record joins each batch on its own, with probability q."""

import math
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch.utils.data import DataLoader, Dataset, Sampler

from defend.errors import PrivacyError
from defend.privacy.mechanism.randomness import Randomness
from defend.privacy.mechanism.shard import Shard
from defend.privacy.mechanism.user_randomness import SecretWorker


class Drawn(NamedTuple):
    """What one rank was handed for one logical step.

    Attributes:
        records: sampled records; they come first.
        slots: records in the batch, padding included. Each takes as many rows as it has views.
        chunks: chunks to run them in, the same on every rank.
    """

    records: int
    slots: int
    chunks: int


class Chunking(NamedTuple):
    """How a rank's rows of one logical step are cut.

    Attributes:
        size: most rows of a rank in one chunk, but never less than one record's; None means one
            chunk.
        views: rows of a record, K ≥ 1.
        fixed: fill every chunk with padding, where a new shape costs more than the rows (cuDNN's
            autotuner tries all its algorithms for each shape).
    """

    size: int | None = None
    views: int = 1
    fixed: bool = False


class PoissonBatchSampler(Sampler[list[int]]):
    """Yields the indices of Poisson-sampled batches, one list a step.

    For each step every rank draws the same mask over the whole data set (so a record joins with
    probability q exactly once, however many ranks there are) and takes every `world_size`-th hit.
    A rank with fewer rows than it needs is padded with record 0, which `Drawn.records` leaves out
    of the sum: an empty batch still takes its noised step, as the accounting assumes.

    With K views each index is handed out K times in a row: the data set is asked for the record K
    times and may augment it anew each time. It joins once, whatever K.

    Args:
        size: records in the data set.
        sample_rate: q in (0, 1].
        steps: batches in an epoch.
        randomness: source of the masks; each step has a generator of its own.
        chunks: how a rank's rows are cut.
        shard: this process among all.

    Attributes:
        next_step: number of the step that comes next; an epoch begins with it. Set from outside.
        chunk_size: most rows of a rank in one chunk; may be set to another value before an epoch
            starts.
        drawn: a queue of what was yielded and not yet consumed, in order. The training step takes
            one entry a batch; loader workers and prefetching cannot mix the order up.
        epochs: how many were started.
        before_batch: called before each batch is drawn, in the process that draws it, with
            search=True at the start of an epoch; without workers its items come next. Set from
            outside.
    """

    def __init__(
        self,
        size: int,
        sample_rate: float,
        steps: int,
        randomness: Randomness,
        *,
        chunks: Chunking = Chunking(),
        shard: Shard = Shard(),
    ) -> None:
        self.size = size
        self.sample_rate = sample_rate
        self.steps = steps
        self.randomness: Randomness | None = randomness
        self.next_step = 0
        self.chunk_size, self.views, self.fixed = chunks
        self.shard = shard
        self.drawn: deque[Drawn] = deque()
        self.epochs = 0
        self.before_batch: Callable[..., None] = _do_nothing

    def begin_anew(self, *, chunk_size: int | None) -> None:
        """What was drawn so far, ahead of the first step, is given up; other chunks will be run."""
        self.drawn.clear()
        self.epochs, self.chunk_size = 0, chunk_size

    def forget(self) -> None:
        """Drop the source of the masks; only the sizes stay."""
        self.randomness, self.before_batch = None, _do_nothing
        self.drawn.clear()

    def __getstate__(self) -> dict[str, Any]:
        """A copy, and a pickle, hold no secret: they draw nothing."""
        return {
            **vars(self), "randomness": None, "before_batch": _do_nothing, "drawn": deque(),
        }  # fmt: skip

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        self.drawn.clear()
        self.epochs += 1
        first = self.next_step
        for step in range(first, first + self.steps):
            hits = self.sample(step)
            rank, world_size = self.shard
            largest = len(hits[::world_size])  # rank 0 has the most
            most = self.records_in_a_chunk
            chunks = max(1, math.ceil(largest / most)) if most else 1
            mine = hits[rank::world_size]
            least = chunks * most if self.fixed and most else chunks
            padding = max(least - len(mine), 0)
            self.drawn.append(Drawn(len(mine), len(mine) + padding, chunks))
            self.before_batch(search=step == first)
            yield [i for i in mine + [0] * padding for _ in range(self.views)]

    @property
    def records_in_a_chunk(self) -> int | None:
        """Most records of a rank in one chunk, at least one; None where it is not split."""
        return None if self.chunk_size is None else max(1, self.chunk_size // self.views)

    def sample(self, step: int) -> list[int]:
        """The records of the whole logical batch of one step, over all ranks."""
        if self.randomness is None:
            raise PrivacyError(
                "Expected an open loop, got a batch asked for after its end or after an error. "
                "Start another fit."
            )
        # Of 53 bits: the 24 of float32 would round a small q.
        draws = self.randomness.uniforms(step, self.size)
        return (draws < self.sample_rate).nonzero().flatten().tolist()


def _do_nothing(*, search: bool = False) -> None:
    """Before a batch, where nothing is to be done."""


def poisson_loader(loader: DataLoader, sampler: PoissonBatchSampler) -> DataLoader:
    """The user's loader with its batches drawn by `sampler`; everything else as it was.

    But for its `generator`: what it would seed are the workers' augmentations, by a known number.
    For the same reason its workers draw secret numbers (`SecretWorker`), unless the run has an
    `insecure_seed` and is to repeat exactly.
    """
    settings: dict[str, Any] = {
        name: getattr(loader, name)
        for name in (
            "num_workers",
            "collate_fn",
            "pin_memory",
            "timeout",
            "worker_init_fn",
            "multiprocessing_context",
            "prefetch_factor",
            "persistent_workers",
        )
    }
    known = sampler.randomness is not None and not sampler.randomness.private
    if loader.num_workers > 0 and not known:
        worker = SecretWorker(loader.worker_init_fn, loader.collate_fn)
        settings |= {"worker_init_fn": worker.init, "collate_fn": worker.collate}
    dataset = loader.dataset
    if hasattr(dataset, "__getitems__"):
        dataset = OneByOne(dataset)
    return DataLoader(dataset, batch_sampler=sampler, **settings)


class OneByOne(Dataset):
    """A data set that is asked for one record at a time, as the self-test asks it.

    `__getitems__` gets all records of a batch at once: what it makes of them, padding to the
    longest say, may depend on the others.

    Args:
        dataset: the user's; has all attributes.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        if name == "dataset" or name.startswith("__"):  # of a copy in the making; `__getitems__`
            raise AttributeError(name)
        return getattr(self.dataset, name)
