"""Records, batches and loaders."""

from collections.abc import Iterator
from typing import Any

import torch
from opacus.data_loader import DPDataLoader
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)

from tests.contracts.opacus_alone.yardstick import (
    added_noise,
    breaks,
    charged,
    clipped,
    epsilon,
    judge,
    loader_of,
    private,
    train,
)
from tests.contracts.outcomes import Outcome
from tests.contracts.small import DELTA, batch, flat, loss, net, sensitivity, too_long

BREAKS = breaks()


def _epoch_counts(loader: Any, epochs: int = 1) -> Tensor:
    """How often each record was drawn; records are told apart by their first feature."""
    known = batch(64)[0][:, 0]
    counts = torch.zeros(64, dtype=torch.long)
    for _ in range(epochs):
        for x, _ in loader:
            counts += (x[:, :1] == known).sum(0)
    return counts


@BREAKS.add
def shuffled_batches_accounted_as_poisson() -> Outcome:
    p = private(net(), loader=loader_of(shuffle=True), poisson_sampling=False)
    counts = _epoch_counts(p.loader)
    for x, y in p.loader:
        train(p, x, y)
    reported, spent = p.engine.get_epsilon(DELTA), epsilon((1.0, 1.0, 1))
    poisson = counts.min() != counts.max()
    return Outcome(
        "safe" if poisson else "accepts",
        f"each record once an epoch; ε {reported:.2f} reported, {spent:.2f} without amplification",
    )


@BREAKS.add
def batches_in_order_accounted_as_poisson() -> Outcome:
    """shuffle=False: who knows the order knows the batch, and ε is that of one Gaussian release."""
    p = private(net(), loader=loader_of(), poisson_sampling=False)
    same = all(torch.equal(a[0], b[0]) for a, b in zip(p.loader, loader_of(), strict=True))
    for x, y in p.loader:
        train(p, x, y)
    reported, spent = p.engine.get_epsilon(DELTA), epsilon((1.0, 1.0, 1))
    return Outcome(
        "accepts" if same and reported < spent else "safe",
        f"ε {reported:.2f} reported, {spent:.2f} spent",
    )


@BREAKS.add
def original_loader_used() -> Outcome:
    """The loop goes over the loader that was given, not over the one that came back."""
    loader = loader_of(shuffle=True)
    p = private(net(), loader=loader)
    counts = _epoch_counts(loader)
    for x, y in loader:
        train(p, x, y)
    reported, whole = p.engine.get_epsilon(DELTA), epsilon((1.0, 1.0, 1))
    return Outcome(
        "safe" if counts.min() != counts.max() else "accepts",
        f"each record once an epoch; ε {reported:.2f} reported, {whole:.2f} without amplification",
    )


@BREAKS.add
def weighted_random_sampler() -> Outcome:
    weights = torch.ones(64)
    weights[:32] = 0
    p = private(net(), loader=loader_of(sampler=WeightedRandomSampler(weights, 64)))
    drawn = int(_epoch_counts(p.loader)[:32].sum())
    return Outcome(
        "accepts" if drawn else "safe",
        f"the weights are dropped: {drawn} draws of records of weight 0",
    )


@BREAKS.add
def batch_sampler_of_my_own() -> Outcome:
    """One that leaves half of the records out."""
    sampler = [list(range(i, i + 4)) for i in range(32, 64, 4)]
    p = private(net(), loader=DataLoader(TensorDataset(*batch(64)), batch_sampler=sampler))
    drawn = int(_epoch_counts(p.loader)[:32].sum())
    return Outcome(
        "accepts" if drawn else "safe",
        f"the sampler is dropped: {drawn} draws of records that it leaves out",
    )


@BREAKS.add
def iterable_data_set() -> Outcome:
    class Stream(IterableDataset):
        def __iter__(self) -> Iterator:
            return iter(TensorDataset(*batch(64)))

        def __len__(self) -> int:
            return 64

    private(net(), loader=DataLoader(Stream(), 4))
    return Outcome("accepts", "it went on")


@BREAKS.add
def repeated_index() -> Outcome:
    """`Subset` with one record twice, as oversampling makes it. All are drawn: q = 1."""
    x, y = batch()

    def total(x: Tensor, y: Tensor) -> Tensor:
        first = [0] if torch.equal(x[0], batch()[0][0]) else []
        data = Subset(TensorDataset(x, y), first + list(range(len(x))))
        p = private(net(), loader=DataLoader(data, len(data)))
        loss(p.module, *next(iter(p.loader))).backward()
        return clipped(p)

    return judge(sensitivity(total, x, y) / 0.1)


@BREAKS.add
def empty_batch() -> Outcome:
    p, (x, y) = private(net()), batch()
    train(p, x[:0], y[:0])
    noise = added_noise(p)
    sound = bool(noise.isfinite().all()) and abs(float(noise.std()) / 0.1 - 1) < 0.3
    return Outcome(
        "safe" if sound and charged(p) == 1 else "accepts",
        f"noise of {noise.std() / 0.1:.2f} C, {charged(p)} step charged",
    )


@BREAKS.add
def empty_batch_distributed() -> Outcome:
    """One process of a distributed run; a batch of 0.5 records is expected."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        data = TensorDataset(*batch(50))
        loader = DPDataLoader(data, sample_rate=0.01, distributed=True)
        promised, came = len(loader), sum(1 for _ in loader)
    finally:
        torch.distributed.destroy_process_group()
    return Outcome(
        "accepts" if came < promised else "safe",
        f"{promised - came} of {promised} noised steps lost",
    )


@BREAKS.add
def steps_lost_to_rounding() -> Outcome:
    """int(1 / (1 / n)) is not n for every n."""
    loader = loader_of(rows=93, size=1)
    came = sum(1 for _ in private(net(), loader=loader).loader)
    return Outcome(
        "accepts" if came < len(loader) else "safe",
        f"{len(loader) - came} of {len(loader)} noised steps lost each epoch",
    )


@BREAKS.add
def batch_memory_manager_truncated() -> Outcome:
    """The loop ends in the middle of a logical batch of 8, and another begins. q = 1."""

    def total(x: Tensor, y: Tensor) -> Tensor:
        loader = DataLoader(TensorDataset(x, y), len(x))
        p = private(net(), loader=loader, sigma=0.0)
        manager = BatchMemoryManager(
            data_loader=p.loader, max_physical_batch_size=4, optimizer=p.optimizer
        )
        for limit in (1, 2):
            with manager as chunks:
                for _, (a, b) in zip(range(limit), chunks, strict=False):
                    train(p, a, b)
        return flat(q.summed_grad for q in p.optimizer.params)

    return judge(sensitivity(total, *batch()) / 0.1)


@BREAKS.add
def nan_record() -> Outcome:
    p, (x, y) = private(net()), batch()
    x[0, 0] = float("nan")
    train(p, x, y)
    broken = flat(p.module.parameters()).isnan()
    verdict = "accepts" if broken.any() else "safe"
    return Outcome(verdict, f"one NaN record makes {broken.float().mean():.0%} of the weights NaN")


@BREAKS.add
def gradient_norm_overflows() -> Outcome:
    """A record so long that its gradient is finite, but not the norm of it."""
    p, (x, y) = private(net()[0]), too_long(1e30)
    loss(p.module, x[:1], y[:1]).backward()
    entered = float(clipped(p).norm()) / 0.1
    verdict = "safe" if entered <= 1 else "accepts"
    return Outcome(verdict, f"it enters the sum as {entered:.2f} C")
