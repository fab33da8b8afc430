"""Records, batches and loaders."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)

from defend.privacy import Chunking, PoissonBatchSampler, Randomness, Shard
from tests.contracts.defend_does.hooks import released_sum
from tests.contracts.defend_does.optimizers import in_a_loop
from tests.contracts.defend_does.yardstick import (
    Plain,
    breaks,
    dp,
    fit,
    holds,
    judge,
    loader,
    promised,
    records,
)
from tests.contracts.outcomes import Outcome
from tests.contracts.small import batch, flat, net, sensitivity, too_long

BREAKS = breaks()


class Counts(Plain):
    """How often each record came; records are told apart by their first feature."""

    def __init__(self) -> None:
        super().__init__()
        self.known = records().tensors[0][:, 0].clone()
        self.sizes: list[int] = []
        self.counts = torch.zeros(64, dtype=torch.long)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.counts += (batch[0][:, :1] == self.known).sum(0)
        self.sizes.append(len(batch[0]))


def _poisson(**settings: Any) -> Outcome:
    """Four epochs: do batches differ in size, and records in how often they come; is ε that?"""
    module, callback = Counts(), dp()
    fit(module, loader(**settings), callback, max_epochs=4)
    varied = len(set(module.sizes)) > 1 and int(module.counts.min()) != int(module.counts.max())
    right = abs(callback.epsilon - promised(64)) < 1e-6
    return holds(varied and right, f"batches are Poisson-sampled; ε {callback.epsilon:.2f}")


@BREAKS.add
def shuffled_batches_accounted_as_poisson() -> Outcome:
    return _poisson(shuffle=True)


@BREAKS.add
def batches_in_order_accounted_as_poisson() -> Outcome:
    return _poisson()


@BREAKS.add
def original_loader_used() -> Outcome:
    """The loop goes over the loader that was given, not over the one that came back."""
    original = loader(shuffle=True)
    with in_a_loop(net(), data=original) as private:
        for pair in original:
            private.step(pair)
    return Outcome("open", "it went on")


@BREAKS.add
def batch_used_twice() -> Outcome:
    with in_a_loop(net()) as private:
        for pair in private.loader:
            private.step(pair)
            private.step(pair)
    return Outcome("open", "it went on")


def _given(data: DataLoader) -> Outcome:
    fit(Plain(), data)
    return Outcome("open", "it went on")


@BREAKS.add
def weighted_random_sampler() -> Outcome:
    return _given(loader(sampler=WeightedRandomSampler(torch.ones(64), 64)))


@BREAKS.add
def batch_sampler_of_my_own() -> Outcome:
    sampler = [list(range(i, i + 4)) for i in range(32, 64, 4)]
    return _given(DataLoader(records(), batch_sampler=sampler))


@BREAKS.add
def iterable_data_set() -> Outcome:
    class Stream(IterableDataset):
        def __iter__(self) -> Iterator:
            return iter(records())

        def __len__(self) -> int:
            return 64

    return _given(DataLoader(Stream(), 4))


@BREAKS.add
def repeated_index() -> Outcome:
    return _given(DataLoader(Subset(records(8), [0, *range(8)]), 9))


@BREAKS.add
def empty_batch() -> Outcome:
    """64 batches of one expected record out of 16: a third of them are empty."""
    module, callback = Counts(), dp(noise_multiplier=5.0)
    spent = fit(module, loader(16, 1), callback, max_epochs=4).global_step
    sound = bool(flat(module.parameters()).isfinite().all())
    return holds(sound and callback.steps == spent == 64, "64 of 64 steps noised and charged")


@BREAKS.add
def empty_batch_distributed() -> Outcome:
    """Rank 1 of 2, half a record expected: padding stands in where there is none."""
    sampler = PoissonBatchSampler(
        50, 0.01, 100, Randomness(insecure_seed=1), chunks=Chunking(size=8), shard=Shard(1, 2)
    )
    sizes = [len(rows) for rows in sampler]
    return holds(len(sizes) == 100 and min(sizes) > 0, "100 of 100 noised steps taken")


@BREAKS.add
def steps_lost_to_rounding() -> Outcome:
    """int(1 / (1 / n)) is not n for every n."""
    callback = dp(noise_multiplier=5.0)
    fit(Plain(), loader(93, 1), callback, max_epochs=1)
    return holds(callback.steps == 93, f"{callback.steps} of 93 noised steps taken")


@BREAKS.add
def batch_memory_manager_truncated() -> Outcome:
    """The loop leaves an epoch after a batch was drawn, and begins another. q = 1, chunks of 4."""

    def total(x: Tensor, y: Tensor) -> Tensor:
        model = net()
        data = DataLoader(TensorDataset(x, y), len(x))
        settings = {"chunk_size": 4, "noise_multiplier": 0.0, "insecure_seed": 7}
        with in_a_loop(model, torch.optim.SGD(model.parameters(), lr=1.0), data, **settings) as p:
            for _ in p.loader:
                break
            before = flat(model.parameters())
            for pair in p.loader:
                p.step(pair)
            return (before - flat(model.parameters())) * len(x)

    return judge(sensitivity(total, *batch()) / 0.1)


@BREAKS.add
def nan_record() -> Outcome:
    x, y = batch()
    x[0, 0] = float("nan")
    callback = dp()
    module = Plain()
    fit(module, DataLoader(TensorDataset(x, y), len(x)), callback)
    broken = flat(module.parameters()).isnan().float().mean()
    return holds(not broken, f"{broken:.0%} of the weights are NaN")


@BREAKS.add
def gradient_norm_overflows() -> Outcome:
    """A record so long that its gradient is finite, but not the square of it in float32."""
    x, y = too_long(1e30)
    settings = {"max_grad_norm": 0.1, "selftest": False}
    entered = [released_sum(net()[0], x[i:], y[i:], **settings) for i in (0, 1)]
    return judge(float((entered[0] - entered[1]).norm()) / 0.1)
