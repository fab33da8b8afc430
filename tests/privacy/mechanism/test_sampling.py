import pickle
import random

import numpy as np
import pytest
import torch
from scipy import stats
from torch.utils.data import DataLoader, Dataset, TensorDataset, get_worker_info

from defend.privacy import Chunking, PoissonBatchSampler, Randomness, Shard
from defend.privacy.mechanism.sampling import poisson_loader
from defend.privacy.mechanism.user_randomness import SecretWorker

N, Q, STEPS = 200, 0.1, 3000


def sampler(steps=STEPS, size=N, rate=Q, **settings):
    return PoissonBatchSampler(size, rate, steps, Randomness(insecure_seed=0), **settings)


def follows_binomial(sizes, size=N, rate=Q):
    """Chi-square test of batch sizes against Binomial(size, rate)."""
    edges = stats.binom.ppf(np.linspace(0.1, 0.9, 9), size, rate)
    cells = np.searchsorted(edges, sizes, side="left")
    counts = np.bincount(cells, minlength=len(edges) + 1)
    cumulative = np.concatenate([[0], stats.binom.cdf(edges, size, rate), [1]])
    expected = np.diff(cumulative) * len(sizes)
    return stats.chisquare(counts, expected).pvalue > 1e-4


def test_batch_sizes_follow_the_binomial_and_fixed_ones_are_rejected():
    sizes = [len(sampler().sample(step)) for step in range(STEPS)]
    assert follows_binomial(sizes)
    # Planted wrong answers: shuffled batches, a wrong rate, a Poisson *count* of records.
    rng = np.random.default_rng(0)
    assert not follows_binomial([int(N * Q)] * STEPS)
    assert not follows_binomial(rng.binomial(N, 1.05 * Q, STEPS))
    assert not follows_binomial(rng.poisson(N * Q, STEPS) + rng.integers(-2, 3, STEPS))


def test_every_record_joins_equally_often_and_on_its_own():
    joined = np.zeros((STEPS, N))
    for step in range(STEPS):
        joined[step, sampler().sample(step)] = 1
    per_record = joined.sum(0)
    deviation = np.sqrt(STEPS * Q * (1 - Q))
    assert np.abs(per_record - STEPS * Q).max() < 5 * deviation
    # Independent: correlations between records, and between steps, are those of chance.
    correlation = np.corrcoef(joined[:, :50].T) - np.eye(50)
    assert np.abs(correlation).max() < 5.5 / np.sqrt(STEPS)
    lag = ((joined[1:] - Q) * (joined[:-1] - Q)).mean() / (Q * (1 - Q))
    assert abs(lag) < 5 / np.sqrt(joined.size)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("chunk_size", [None, 4])
def test_ranks_share_one_mask_and_run_the_same_number_of_chunks(world, chunk_size):
    chunks = Chunking(size=chunk_size)
    samplers = [sampler(20, chunks=chunks, shard=Shard(r, world)) for r in range(world)]
    batches = [list(s) for s in samplers]
    for step in range(20):
        drawn = [s.drawn[step] for s in samplers]
        real = [b[step][: d.records] for b, d in zip(batches, drawn, strict=True)]
        assert sorted(i for part in real for i in part) == sampler().sample(step)
        assert len({d.chunks for d in drawn}) == 1
        for b, d in zip(batches, drawn, strict=True):
            assert len(b[step]) == d.slots >= d.chunks
            if chunk_size:
                assert -(-d.slots // d.chunks) <= chunk_size


def test_an_empty_batch_is_padded_and_counts_no_record():
    empty = sampler(50, size=3, rate=0.01)
    batches = list(empty)
    drawn = list(empty.drawn)
    assert any(d.records == 0 for d in drawn)
    assert all(len(b) == d.slots == max(d.records, 1) for b, d in zip(batches, drawn, strict=True))


def test_an_epoch_starts_where_the_step_count_says():
    later = sampler(5)
    later.next_step = 7
    assert list(later) == [sampler().sample(s) for s in range(7, 12)]


def test_a_new_epoch_forgets_batches_that_were_drawn_but_never_used():
    once = sampler(5)
    iterator = iter(once)
    next(iterator), next(iterator)
    list(once)
    assert len(once.drawn) == 5


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_keeps_the_users_settings_and_the_order(workers):
    data = TensorDataset(torch.arange(N))
    plain = DataLoader(
        data, batch_size=20, shuffle=True, num_workers=workers, collate_fn=lambda rows: list(rows)
    )
    mine = sampler(6)
    loader = poisson_loader(plain, mine)
    assert len(loader) == 6
    assert loader.collate_fn is plain.collate_fn
    assert loader.num_workers == workers
    for batch in loader:
        drawn = mine.drawn.popleft()
        assert len(batch) == drawn.slots
    assert not mine.drawn


class Augmented(Dataset):
    """Each record is what the three global RNGs say, and what the user's function left behind."""

    def __len__(self):
        return N

    def __getitem__(self, index):
        draws = torch.rand(()).item(), np.random.rand(), random.random()  # noqa: NPY002
        return [*draws, getattr(get_worker_info().dataset, "mark", -1)]


def seed_all(worker):
    torch.manual_seed(42 + worker)
    np.random.seed(42 + worker)  # noqa: NPY002
    random.seed(42 + worker)
    get_worker_info().dataset.mark = worker


def first_draws(randomness, worker_init_fn=seed_all, context="fork"):
    """What two workers drew for the first row of their first batch, shape [2, 4]."""
    torch.manual_seed(0)  # a main process whose RNG is known
    plain = DataLoader(
        Augmented(),
        20,
        num_workers=2,
        collate_fn=torch.tensor,
        worker_init_fn=worker_init_fn,
        multiprocessing_context=context,
    )
    loader = poisson_loader(plain, PoissonBatchSampler(N, Q, 2, randomness))
    return torch.stack([batch[0] for batch in loader])


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_draw_by_secret_seeds_after_the_users_function(context):
    once, again = (first_draws(Randomness(), context=context) for _ in range(2))
    assert once[:, 3].tolist() == again[:, 3].tolist() == [0, 1]  # the user's function ran
    assert (once[:, :3] != again[:, :3]).all()  # torch, numpy and random, in both workers
    assert (once[0, :3] != once[1, :3]).all()


def test_workers_without_a_function_draw_by_secret_seeds_too():
    once, again = (first_draws(Randomness(), None) for _ in range(2))
    assert (once[:, :3] != again[:, :3]).all()


def test_a_run_with_an_insecure_seed_keeps_the_users_seeds():
    # Also the planted wrong answer of the tests above: unwrapped, the draws repeat.
    once, again = (first_draws(Randomness(insecure_seed=0)) for _ in range(2))
    assert torch.equal(once, again)


def test_only_loaders_with_workers_get_functions():
    data = TensorDataset(torch.arange(N))
    mine = PoissonBatchSampler(N, Q, 2, Randomness())
    plain = DataLoader(data, 20, collate_fn=list)
    alone = poisson_loader(plain, mine)
    assert (alone.worker_init_fn, alone.collate_fn) == (None, list)
    wrapped = poisson_loader(DataLoader(data, 20, num_workers=1, collate_fn=list), mine)
    assert wrapped.worker_init_fn.__self__ is wrapped.collate_fn.__self__
    assert wrapped.collate_fn([1, 2]) == [1, 2]


def test_the_workers_functions_can_be_pickled_and_stay_one_object():
    worker = SecretWorker(seed_all, torch.tensor)
    init, collate = pickle.loads(pickle.dumps((worker.init, worker.collate)))
    assert init.__self__ is collate.__self__
    assert init.__self__.users_init is seed_all


class SeedsItself(Augmented):
    """The first item of each worker's batch is drawn before it seeds."""

    def __getitem__(self, index):
        found = super().__getitem__(index)
        seed_all(0)
        return found


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_draw_secret_numbers_for_each_batch(context):
    plain = DataLoader(
        SeedsItself(), N, num_workers=1, collate_fn=torch.tensor, multiprocessing_context=context
    )
    for randomness, known in ((Randomness(), False), (Randomness(insecure_seed=0), True)):
        loader = poisson_loader(plain, PoissonBatchSampler(N, 1.0, 3, randomness))
        _, second, third = (batch[0, :3] for batch in loader)
        assert torch.equal(second, third) == known
