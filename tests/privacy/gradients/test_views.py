"""Several rows of one record: merged before the one clip, drawn together, tried out together."""

import warnings
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from defend import (
    PGD,
    Adversarial,
    DifferentialPrivacy,
    InputError,
    Linf,
    PrivacyError,
)
from defend.privacy import Chunking, PoissonBatchSampler, Randomness, Shard
from defend.privacy.checks.selftest import selftest
from defend.privacy.checks.step_under_test import StepUnderTest
from defend.privacy.gradients.per_record import PerRecordGradients, mean_of_views
from tests.helpers import data
from tests.privacy.gradients.alone import inputs, loss, targets
from tests.privacy.gradients.layer_table import EQUAL
from tests.privacy.mechanism.test_step import B, C, make
from tests.reference.dpsgd import clipped_sum
from tests.training.loops import mean_loss, net, private, some_steps

RECORDS = 4


def test_the_mean_over_the_views_of_each_record():
    rows = torch.arange(12.0).reshape(6, 2)
    expected = torch.stack([(rows[2 * i] + rows[2 * i + 1]) / 2 for i in range(3)])
    assert torch.equal(mean_of_views(rows, 2), expected)
    assert mean_of_views(rows, 1) is rows
    assert not torch.equal(mean_of_views(rows, 2), rows.reshape(2, 3, 2).mean(0))


# --- gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize("name", EQUAL)
def test_a_records_gradient_is_the_mean_of_its_views(name, views, reduction):
    torch.manual_seed(0)
    kind, build = EQUAL[name]
    module, rows = build(), RECORDS * views
    x, y = inputs(kind, rows), targets(rows)
    watch = PerRecordGradients(module, views=views, loss_reduction=reduction)
    watch.expect(rows)
    (loss(module, x, y) * (rows if reduction == "sum" else 1)).backward()
    found = watch.read(rows)
    watch.remove()
    parameters = [p for p in module.parameters() if p.requires_grad]
    for i in range(RECORDS):
        own = slice(i * views, (i + 1) * views)
        alone = torch.autograd.grad(
            loss(module, x[own], y[own]), parameters, allow_unused=True, materialize_grads=True
        )
        for mine, expected in zip(found, alone, strict=True):
            assert len(mine) == RECORDS
            expected = expected.to_dense()
            torch.testing.assert_close(mine[i], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("cut", [1, 2, 4])
def test_a_step_equals_the_slow_reference_however_it_is_cut(cut):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.randn(RECORDS * 3, 6), torch.arange(RECORDS * 3) % 3
    step, _ = make(module, views=3, loss_reduction="sum")
    step.begin()
    for part, labels in zip(x.split(cut * 3), y.split(cut * 3), strict=True):
        step.expect(len(part), len(part) // 3)
        F.cross_entropy(module(part), labels, reduction="sum").backward()
        step.fold()
    step.release()
    found = [p.grad.clone() for p in module.parameters()]
    step.close()
    records = list(zip(x.split(3), y.split(3), strict=True))
    total = clipped_sum(module, lambda a, b: F.cross_entropy(module(a), b), records, C)
    for mine, expected in zip(found, total, strict=True):
        torch.testing.assert_close(mine, expected / B, rtol=0, atol=1e-6)


def test_padding_is_counted_in_records():
    torch.manual_seed(0)
    module = nn.Linear(6, 3)
    x, y = torch.randn(8, 6), torch.arange(8) % 3
    step, _ = make(module, views=2, loss_reduction="sum")
    step.begin()
    step.expect(8, 3)  # the last of four is padding
    F.cross_entropy(module(x), y, reduction="sum").backward()
    step.release()
    found = module.weight.grad.clone()
    step.close()
    records = list(zip(x.split(2), y.split(2), strict=True))[:3]
    total = clipped_sum(module, lambda a, b: F.cross_entropy(module(a), b), records, C)
    torch.testing.assert_close(found, total[0] / B, rtol=0, atol=1e-6)


def test_rows_that_are_no_whole_records_are_refused():
    watch = PerRecordGradients(nn.Linear(6, 3), views=2)
    with pytest.raises(PrivacyError, match="a multiple of 2 rows, 2 a record, got 5"):
        watch.expect(5)
    watch.remove()


def test_views_that_were_joined_on_the_way_are_refused():
    module = nn.Linear(6, 3)
    watch = PerRecordGradients(module, views=2)
    watch.expect(8)
    both = torch.cat([torch.randn(8, 6)] * 2)
    loss(module, both, targets(16)).backward()
    with pytest.raises(PrivacyError, match=r"Expected 8 rows, one a record, .* got 16"):
        watch.read(8)
    watch.remove()


# --- batches --------------------------------------------------------------------------------------


def sampler(rate=0.3, shard=Shard(), **chunks):
    randomness = Randomness(insecure_seed=0)
    return PoissonBatchSampler(20, rate, 30, randomness, chunks=Chunking(**chunks), shard=shard)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("chunk_size", [None, 6, 2])
def test_a_record_is_drawn_once_and_handed_out_for_each_view(chunk_size, world):
    ranks = [sampler(views=3, size=chunk_size, shard=Shard(r, world)) for r in range(world)]
    batches = [list(rank) for rank in ranks]
    for step in range(30):
        drawn = [rank.drawn[step] for rank in ranks]
        real = []
        for batch, d in zip(batches, drawn, strict=True):
            indices = batch[step]
            assert len(indices) == 3 * d.slots
            assert indices == [i for i in indices[::3] for _ in range(3)]
            real += indices[::3][: d.records]
            if chunk_size:  # whole records in each chunk, at least one
                assert -(-d.slots // d.chunks) <= max(1, chunk_size // 3)
        assert sorted(real) == sampler().sample(step)
        assert len({d.chunks for d in drawn}) == 1


def test_an_empty_batch_is_one_record_of_padding():
    empty = sampler(rate=1e-6, views=3)
    assert all(batch == [0, 0, 0] for batch in empty)
    assert all((d.records, d.slots) == (0, 1) for d in empty.drawn)


def test_fixed_shapes_are_filled_up_with_whole_records():
    fixed = sampler(views=3, size=7, fixed=True)
    for batch, drawn in zip(list(fixed), fixed.drawn, strict=True):
        assert len(batch) == 3 * drawn.slots == drawn.chunks * 6


# --- the self-test --------------------------------------------------------------------------------


def records(count=7):
    generator = torch.Generator().manual_seed(0)
    return [(torch.rand(6, generator=generator), torch.tensor(i % 3)) for i in range(count)]


def collate(items):
    """Two views of each: the second is another image of the same record."""
    x = torch.stack([x for pair in items for x in (pair[0], pair[0].flip(0))])
    return x, torch.stack([pair[1] for pair in items for _ in range(2)])


def tried(loss=mean_loss, attack=None, **settings):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    step = StepUnderTest(loss=loss, collate=collate, attack=attack, views=2)
    return selftest(module, records(), step, **settings)


def test_a_sound_step_passes():
    assert tried().passed
    assert tried(rows=16).passed
    assert 0 < tried(max_grad_norm=1e-3).largest_move <= 1 + 1e-4


def test_a_loss_between_the_views_of_a_record_is_its_own():
    def agreement(module, batch):
        logits = module(batch[0]).unflatten(0, (-1, 2))
        return mean_loss(module, batch) + (logits[:, 0] - logits[:, 1]).pow(2).sum(1).mean()

    assert tried(agreement).passed


def test_a_loss_between_views_of_different_records_is_found():
    def contrast(module, batch):
        logits = module(batch[0])
        return mean_loss(module, batch) + (logits * logits.roll(2, 0)).sum(1).mean()

    assert not tried(contrast).passed


def test_an_attack_on_one_view_that_looks_at_another_record_is_found():
    def coupled(module, batch):
        x, y = batch
        return (x + 0.1 * x.roll(2, 0)).clamp(0, 1), y

    assert not tried(attack=coupled).passed


def test_an_attack_that_looks_at_the_other_view_is_the_records_own():
    def paired(module, batch):
        x, y = batch
        return (x + 0.1 * x.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)).clamp(0, 1), y

    assert tried(attack=paired).passed


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize("views", [0, -1, 1.5, True, None, "2"])
def test_views_out_of_range_are_refused(views):
    with pytest.raises(InputError, match="`views` to be an integer ≥ 1"):
        DifferentialPrivacy(delta=1e-5, max_grad_norm=1.0, noise_multiplier=1.0, views=views)


def test_views_that_are_all_alike_are_told():
    def loop(batches, **settings):
        return private(net(), batches=batches, views=3, selftest=False, **settings)

    plain = TensorDataset(*data(64).tensors)
    with pytest.warns(UserWarning, match="views=3 asks .* the same each time"):
        loop(DataLoader(plain, batch_size=8)).close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loop(DataLoader(Augmented(), batch_size=8)).close()
        attack = Adversarial(PGD(Linf(0.1), steps=1))
        loop(DataLoader(plain, batch_size=8), adversarial=attack).close()


class Augmented(Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        return torch.rand(8), index % 3


def sizes_of(**settings):
    """Rows of each batch that the self-test runs."""
    note = mock.Mock()  # a list would be put back as it was before the trial

    def loss(model, batch):
        note(len(batch[0]))
        return mean_loss(model, batch)

    batches = DataLoader(Augmented(), batch_size=32)
    private(net(), batches=batches, loss=loss, **settings).close()
    return [call.args[0] for call in note.call_args_list]


def test_the_selftest_runs_no_more_rows_at_once_than_training():
    assert max(sizes_of(views=4, chunk_size=16)) == 16
    assert max(sizes_of(views=16, chunk_size=16)) == 32  # two records are the least
    # Not split, a batch may have more rows than expected: twice as many are tried.
    assert max(sizes_of(views=2, chunk_size=None)) == 128


def test_a_loss_that_mixes_only_many_records_is_found_with_views_too():
    def crowded(model, batch):
        x, y = batch
        x = x - x.mean(0) if len(x) > 10 * 8 else x
        return F.cross_entropy(model(x), y)

    with pytest.raises(PrivacyError, match="the same alone and in a batch"):
        private(net(), batches=DataLoader(Augmented(), batch_size=32), loss=crowded, views=8)


def test_views_that_do_not_fit_are_told_so():
    def greedy(model, batch):
        raise torch.OutOfMemoryError("out of memory")

    loop = private(net(), batches=DataLoader(Augmented(), batch_size=1), loss=greedy, views=4,
                   selftest=False)  # fmt: skip
    with pytest.raises(torch.OutOfMemoryError) as caught:
        some_steps(loop, 1)
    assert caught.value.__notes__ == ["The 4 views of a record run at once: lower `views`."]


def test_a_wrong_count_is_not_outvoted_by_a_right_one():
    """A layer called on the rows, and on the rows twice over."""
    for views in (1, 2):
        module = nn.Linear(6, 3)
        x, y = torch.randn(8, 6), targets(8)
        watch = PerRecordGradients(module, views=views)
        watch._checked.update({("weight", None), ("bias", None)})  # as later in a training
        watch.expect(8)
        (loss(module, x, y) + loss(module, torch.cat([x, x]), targets(16))).backward()
        with pytest.raises(PrivacyError, match="one a record, in the gradient of"):
            watch.read(8)
        watch.remove()
