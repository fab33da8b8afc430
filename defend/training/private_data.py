"""The data of one private fit: Poisson-sampled, with the secrets that the fit draws from."""

import math
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from defend.batching.records import RecordCollate
from defend.errors import PrivacyError
from defend.privacy.accounting.fingerprint import DataIdentity, identify
from defend.privacy.checks.preconditions import Setup, check
from defend.privacy.mechanism.randomness import Randomness
from defend.privacy.mechanism.sampling import Chunking, PoissonBatchSampler, poisson_loader
from defend.privacy.mechanism.shard import Shard
from defend.training.config import Privacy
from defend.training.processes import Processes

# Per-record gradients take rows × parameters of memory. This many rows fit small machines.
_CHUNK_ON_CPU = 256


class PrivateData:
    """A training loader of the user's, its batches drawn by Poisson sampling.

    Args:
        loader: the user's own.
        settings: what was asked for.
        processes: this process among all; rank 0's secret root is everybody's.
        loaders: training loaders that the fit has seen, this one included.

    Attributes:
        original: the user's own loader.
        loader: the one that trains.
        sampler: draws its batches.
        randomness: the secret root of the fit.
        isolated: whether each record has a batch of its own.
        released: the last released gradient, by parameter name; empty before the first, or where
            nobody asked to keep it.

    Raises:
        PrivacyError: for data that cannot be sampled so.
    """

    def __init__(
        self, loader: Any, settings: Privacy, processes: Processes, *, loaders: int = 1
    ) -> None:
        check(Setup(loader=loader, loaders=loaders, world_size=processes.world_size))
        self.original, self.settings, self.processes = loader, settings, processes
        self.randomness = _shared_randomness(settings, processes)
        self.released: Mapping[str, Tensor] = {}
        self.ends_epoch: Callable[[], bool] = _never  # the step at hand, before the loader does
        records = len(loader.dataset)
        if settings.delta >= 1 / records and processes.rank == 0:
            warnings.warn(
                f"delta={settings.delta} is not below 1 / {records} records: a mechanism that "
                "publishes one record in full would satisfy it. Choose a smaller delta.",
                stacklevel=2,
            )
        asked = settings.chunk_size
        self.sampler = PoissonBatchSampler(
            records,
            loader.batch_size * processes.world_size / records,
            len(loader),
            self.randomness,
            chunks=Chunking(
                size=_CHUNK_ON_CPU if isinstance(asked, str) else asked,
                views=settings.views,
                fixed=torch.cuda.is_available() and torch.backends.cudnn.benchmark,
            ),
            shard=Shard(processes.rank, processes.world_size),
        )
        self.loader: DataLoader = poisson_loader(loader, self.sampler)
        self.isolated = False

    def isolate(self) -> None:
        """Each record of a batch is put together alone, under secret numbers of its own.

        Whoever iterates over the loader already has to begin anew.
        """
        if not self.isolated:
            renew = partial(_renew, self.sampler)
            self.loader.collate_fn = RecordCollate(self.loader.collate_fn, self.views, renew)
            self.loader._iterator = None  # workers that stay have the other function
            self.sampler.begin_anew(chunk_size=self.views)
            self.isolated = True

    @property
    def chunk_size(self) -> int | None:
        """Most rows in one chunk; None where batches are not split."""
        return self.sampler.chunk_size

    @property
    def views(self) -> int:
        """Rows of a record."""
        return self.settings.views

    @property
    def expected_batch_size(self) -> float:
        """q · N, over all processes."""
        return self.sampler.sample_rate * self.sampler.size

    @property
    def ordinary_rows(self) -> int:
        """Rows of a process in a batch of the expected size, views included."""
        records = math.ceil(self.expected_batch_size / self.processes.world_size)
        return records * self.views

    def identity(self) -> DataIdentity:
        """What is known of the data set, to tell it from others.

        Raises:
            PrivacyError: if it is not the same on all processes.
        """
        identity = identify(self.original.dataset, self.settings.data_id)
        if not self.processes.agree(identity):
            raise PrivacyError(
                "Expected the same data set in the same order on every process, got different "
                "ones: a record could join one batch twice. Split and shuffle with a fixed seed "
                "(a generator of its own, or seed_everything)."
            )
        return identity

    def attack_generator(
        self, device: torch.device, *, number: int | None = None
    ) -> torch.Generator:
        """Secret numbers for the random starts of this rank's records in the current step.

        Args:
            device: where they are drawn.
            number: others, of this number, for trying the attack out.
        """
        rank = self.processes.rank
        if number is not None:
            return self.randomness.generator("probe", number, device, rank=rank)
        return self.randomness.generator("attack", self.sampler.next_step, device, rank=rank)

    def coin(self, step: int) -> float:
        """A secret number in [0, 1) for a step of the fit, the same on all processes.

        With `insecure_seed` it is 1: such a run is to repeat exactly, and nothing in it is private.
        """
        if not self.randomness.private:
            return 1.0
        generator = self.randomness.generator("look", step)
        return float(torch.rand((), generator=generator))

    def forget(self) -> None:
        """The loader draws no further batch, and holds no secret. Safe to call twice."""
        self.sampler.forget()
        self.released = {}


def _shared_randomness(settings: Privacy, processes: Processes) -> Randomness:
    if settings.insecure_seed is not None:
        return Randomness(settings.insecure_seed)
    root = processes.broadcast(Randomness().root)
    return Randomness(root=root, secure=settings.secure_noise)


def _renew(sampler: PoissonBatchSampler) -> None:
    sampler.before_batch()


def _never() -> bool:
    return False
