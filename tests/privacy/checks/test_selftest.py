"""The self-test: each silent break is found, and sound steps pass."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset, default_collate

from defend import PGD, InputError, Linf, PrivacyError
from defend.attacks.context import no_trace
from defend.errors import IndistinctRowsError
from defend.privacy.checks.module_copy import copy_of_module
from defend.privacy.checks.selftest import RECORDS, selftest
from defend.privacy.checks.step_under_test import StepUnderTest

WIDTH, CLASSES = 6, 3


def records(n=RECORDS):
    generator = torch.Generator().manual_seed(1)
    return [(torch.rand(WIDTH, generator=generator), i % CLASSES) for i in range(n)]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(WIDTH, 8), nn.Linear(8, CLASSES)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


def mean_loss(module, batch):
    x, y = batch
    return F.cross_entropy(module(x), y)


def selftest_of(module, loss=mean_loss, items=None, **settings):
    how = {k: settings.pop(k) for k in ("max_grad_norm", "rows", "turn") if k in settings}
    step = StepUnderTest(**{"loss": loss, "collate": default_collate, **settings})
    return selftest(module, items or records(), step, **how)


# --- what must be found -----------------------------------------------------------------------


class HandWrittenBatchNorm(Net):
    def forward(self, x):
        h = self.first(x)
        h = (h - h.mean(0)) / (h.var(0, unbiased=False) + 1e-5).sqrt()
        return self.last(torch.tanh(h))


class BatchMeanSubtracted(Net):
    def forward(self, x):
        return super().forward(x - x.mean(0))


class WeightOutsideItsModule(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.emb, self.inner = nn.Embedding(5, 4), nn.Linear(4, 4)

    def forward(self, ids):
        return F.linear(torch.tanh(self.inner(self.emb(ids).mean(1))), self.emb.weight)


def words(n=RECORDS):
    generator = torch.Generator().manual_seed(1)
    return [(torch.randint(0, 5, (4,), generator=generator), i % 5) for i in range(n)]


def over_batch_statistic(module, batch):
    x, y = batch
    return F.cross_entropy(module(x), y) / x.std()


def concatenated(module, batch):
    x, y = batch
    return F.cross_entropy(module(torch.cat([x, x + 0.1])), torch.cat([y, y]))


def weighted(module, batch):
    x, y = batch
    return F.cross_entropy(module(x), y, weight=torch.tensor([1.0, 5.0, 0.2]))


def summed(module, batch):
    x, y = batch
    return F.cross_entropy(module(x), y, reduction="sum")


def mixed_up(module, batch):
    x, y = batch
    order = torch.randperm(len(x))
    return F.cross_entropy(module(0.6 * x + 0.4 * x[order]), y)


def mixed_by_sorting(module, batch):
    """The order is drawn with `rand`, which the self-test holds still in its first part."""
    x, y = batch
    order = torch.rand(len(x)).argsort()
    return F.cross_entropy(module(0.6 * x + 0.4 * x[order]), y)


def mixed_by_numpy(module, batch):
    x, y = batch
    order = torch.from_numpy(np.random.permutation(len(x)))  # noqa: NPY002
    return F.cross_entropy(module(0.6 * x + 0.4 * x[order]), y)


def flipped(module, batch):
    x, y = batch
    return F.cross_entropy(module(0.6 * x + 0.4 * x.flip(0)), y)


def permuted_second_forward(module, batch):
    x, y = batch
    order = torch.randperm(len(x))
    return F.cross_entropy(module(x), y) + F.cross_entropy(module(x[order]), y[order])


def two_backwards(module, batch):
    mean_loss(module, batch).backward()
    return mean_loss(module, batch)


def contrastive(module, batch):
    z = F.normalize(module(batch[0]), dim=1)
    return F.cross_entropy(z @ z.T, torch.arange(len(z)))


def hardest_half(module, batch):
    """Only the records with the largest losses count: which those are depends on the others."""
    x, y = batch
    losses = F.cross_entropy(module(x), y, reduction="none")
    return losses.topk(max(len(x) // 2, 1)).values.mean()


class FilledBuffer(Net):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x):
        self.mean.copy_(0.9 * self.mean + 0.1 * x.detach().mean(0))
        return super().forward(x)


class MovedWeight(Net):
    def forward(self, x):
        out = super().forward(x)
        self.last.bias.data.add_(0.01)
        return out


class Squeezing(Net):
    def forward(self, x):
        return super().forward(x).squeeze()


class SequenceFirst(nn.Module):
    """Records in the second dimension of what the layer sees, positions in the first."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(1, CLASSES)

    def forward(self, x):
        return self.layer(x.T.unsqueeze(-1)).mean(0)


def mixing_collate(items):
    x, y = default_collate(items)
    return [0.6 * x + 0.4 * x.flip(0), y]


def dropping_collate(items):
    x, y = default_collate(items)
    return [x[1:], y[1:]] if len(x) > 1 else [x, y]


BROKEN = {
    "hand-written batch norm": (HandWrittenBatchNorm, {}, "alone and in a batch"),
    "batch mean subtracted": (BatchMeanSubtracted, {}, "alone and in a batch"),
    "weight outside its module": (WeightOutsideItsModule, {"items": words()}, "`emb.weight`"),
    "loss over a batch statistic": (Net, {"loss": over_batch_statistic}, "alone and in a batch"),
    "concatenated rows": (Net, {"loss": concatenated}, "6 rows, one a record"),
    "class weights": (Net, {"loss": weighted}, "weighted or normalized over the batch"),
    "summed loss": (Net, {"loss": summed}, "not the plain mean"),
    "mixup": (Net, {"loss": mixed_up}, "alone and in a batch"),
    "mixup by sorting": (Net, {"loss": mixed_by_sorting}, "mixes records"),
    "mixup by numpy": (Net, {"loss": mixed_by_numpy}, "mixes records"),
    "mixup by flipping": (Net, {"loss": flipped}, "alone and in a batch"),
    "mixup in collate": (Net, {"collate": mixing_collate}, "alone and in a batch"),
    "rows dropped in collate": (Net, {"collate": dropping_collate}, "6 rows, one a record"),
    "permuted second forward": (Net, {"loss": permuted_second_forward}, "change places"),
    "two backwards": (Net, {"loss": two_backwards}, "one backward a batch"),
    "contrastive loss": (Net, {"loss": contrastive}, "alone and in a batch"),
    "hardest half": (Net, {"loss": hardest_half}, "alone and in a batch"),
    "buffer filled from data": (FilledBuffer, {}, "`mean`, which the step fills"),
    "weight moved in forward": (MovedWeight, {}, "`last.bias` changed"),
    "no batch of one": (Squeezing, {}, "works on one record.*squeeze"),
    "positions before records": (SequenceFirst, {}, "."),
}


# Of these each record's own part is its own; only the hooks cannot tell (or do not get so far).
HIDES_ROWS = {
    "weight outside its module", "concatenated rows", "rows dropped in collate",
    "permuted second forward", "two backwards", "positions before records",
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_finds(name):
    module, settings, message = BROKEN[name]
    found = selftest_of(module(), **settings)
    assert not found.passed
    with pytest.raises(PrivacyError, match=f"(?s){message}") as caught:
        found.require()
    assert found.hides_rows == isinstance(caught.value, IndistinctRowsError)
    assert found.hides_rows == (name in HIDES_ROWS)
    assert found.hides_rows != ("self-test on your own step" in str(caught.value))


# --- what must pass -----------------------------------------------------------------------------


class Dropped(Net):
    def forward(self, x):
        h = F.dropout(torch.tanh(self.first(x)), 0.5, self.training)
        return self.last(nn.functional.alpha_dropout(h, 0.2, self.training))


class Noisy(Net):
    """Augments each record on its own, with every kind of random number."""

    def forward(self, x):
        shape = (len(x), 1)
        x = x + 0.1 * torch.randn_like(x) + 0.1 * torch.rand(shape)
        x = x * torch.empty(shape).uniform_(0.5, 1.5) * torch.bernoulli(torch.full(shape, 0.5))
        x = torch.where(torch.randint(0, 2, shape) > 0, x, x.flip(1))
        return super().forward(x + torch.normal(0.0, 0.1, shape))


class Counting(Net):
    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x):
        self.steps += 1
        return super().forward(x)


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(2, 4) for _ in range(3))
        self.out = nn.Linear(4, CLASSES)

    def forward(self, x):
        x = x.view(len(x), 3, 2)
        h = F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x), dropout_p=0.3)
        return self.out(h.mean(1))


def aligned_second_forward(module, batch):
    x, y = batch
    clean, other = module(x), module(x + 0.1)
    kl = F.kl_div(other.log_softmax(1), clean.softmax(1), reduction="batchmean")
    return F.cross_entropy(clean, y) + 6 * kl


def own_weights(module, batch):
    """Weighted by a function of each record alone, and a plain mean over rows."""
    x, y = batch
    return (
        torch.tensor([1.0, 5.0, 0.2])[y] * F.cross_entropy(module(x), y, reduction="none")
    ).mean()


class Reading(nn.Module):
    """Words of different lengths, padded, with the padding masked."""

    def __init__(self, masked=True):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.out, self.masked = nn.Embedding(9, 4), nn.Linear(4, CLASSES), masked

    def forward(self, ids):
        mask = (ids > 0).unsqueeze(-1).float()
        h = self.table(ids)
        return self.out((h * mask).sum(1) / mask.sum(1) if self.masked else h.mean(1))


def sentences():
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randint(1, 9, (2 + i,), generator=generator), i % CLASSES) for i in range(RECORDS)
    ]


def padding_collate(items):
    ids = nn.utils.rnn.pad_sequence([i for i, _ in items], batch_first=True)
    return ids, torch.tensor([y for _, y in items])


SOUND = {
    "plain": (Net, {}),
    "dropout": (Dropped, {}),
    "augmentation": (Noisy, {}),
    "step counter": (Counting, {}),
    "attention with dropout": (Attending, {}),
    "aligned second forward": (Net, {"loss": aligned_second_forward}),
    "weights of each record alone": (Net, {"loss": own_weights}),
    "masked padding": (Reading, {"collate": padding_collate, "items": sentences()}),
}


@pytest.mark.parametrize("name", SOUND)
def test_passes(name):
    module, settings = SOUND[name]
    found = selftest_of(module(), max_grad_norm=1e-3, **settings)
    assert found.findings == ()
    assert found.largest_move == pytest.approx(1.0, abs=1e-3)  # the record is clipped to C
    found.require()


def test_padding_that_is_not_masked_couples_records():
    found = selftest_of(Reading(masked=False), collate=padding_collate, items=sentences())
    assert "padding that is not masked" in found.findings[0]


def test_half_precision_is_given_more_slack():
    def loss(module, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(module(batch[0]).float(), batch[1])

    assert selftest_of(Net(), loss, half=True).passed
    assert not selftest_of(BatchMeanSubtracted(), loss, half=True).passed


# --- the attack -----------------------------------------------------------------------------------


def attack_with(pgd):
    def attack(module, batch):
        generator = torch.Generator().manual_seed(5)
        return [pgd(module, *batch, generator=generator), batch[1]]

    return attack


@pytest.mark.parametrize("random_start", [False, True])
def test_a_sound_attack_passes(random_start):
    pgd = PGD(Linf(0.2), steps=3, random_start=random_start)
    found = selftest_of(Net(), attack=attack_with(pgd), max_grad_norm=1e-3)
    assert found.findings == ()
    assert found.largest_move <= 1 + 1e-3


def universal(module, batch):
    """One perturbation for all records of the batch."""
    x, y = batch
    delta = torch.zeros(WIDTH, requires_grad=True)
    with no_trace(module, x.device):
        loss = F.cross_entropy(module(x + delta), y)
        (grad,) = torch.autograd.grad(loss, delta)
    return [(x + 0.5 * grad / grad.norm()).detach(), y]


def through_the_hooks(module, batch):
    x, y = batch
    x = x.clone().requires_grad_()
    F.cross_entropy(module(x), y).backward()
    return [(x + 0.1 * x.grad.sign()).detach(), y]


def leaves_eval_mode(module, batch):
    module.eval()
    return batch


def reseeds(module, batch):
    torch.manual_seed(3)
    return batch


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (universal, "to depend on that record alone"),
        (through_the_hooks, "no trace on the module, got a changed per-record gradient"),
        (leaves_eval_mode, "changed training mode"),
        (reseeds, "changed random state"),
    ],
)
def test_a_bad_attack_is_found(attack, message):
    found = selftest_of(Net(), attack=attack)
    with pytest.raises(PrivacyError, match=f"(?s){message}"):
        found.require()


# --- nothing is left behind ---------------------------------------------------------------


def test_module_and_random_state_are_untouched():
    module = FilledBuffer()
    before = {n: t.clone() for n, t in module.state_dict().items()}
    states = (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate())  # noqa: NPY002
    selftest_of(module)
    assert all(torch.equal(t, before[n]) for n, t in module.state_dict().items())
    assert all(p.grad is None for p in module.parameters())
    assert not any(m._forward_hooks for m in module.modules())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()  # noqa: NPY002
    assert random.getstate() == states[2]


def test_data_on_the_module_is_shared_not_copied():
    class Big(Dataset):
        def __deepcopy__(self, memo):
            raise AssertionError("copied")

    module = Net()
    module.data = Big()
    assert copy_of_module(module).data is module.data


def test_a_module_that_cannot_be_copied_is_an_error():
    module = Net()
    module.lock = __import__("threading").Lock()
    with pytest.raises(PrivacyError, match="can be copied for the self-test, got TypeError"):
        selftest_of(module)


def test_too_few_records():
    with pytest.raises(InputError, match="at least 3 records for the self-test, got 2"):
        selftest_of(Net(), items=records(2))


def test_a_quick_look_finds_what_couples_records():
    for turn in range(1, 8):
        found = selftest_of(BatchMeanSubtracted(), turn=turn)
        assert "alone and in a batch" in found.findings[0]
        assert "`mean`, which the step fills" in selftest_of(FilledBuffer(), turn=turn).findings[0]
        for module, settings in SOUND.values():
            assert selftest_of(module(), turn=turn, **settings).passed


def sometimes(draw, threshold):
    def loss(module, batch):
        x, y = batch
        if draw() < threshold:
            x = 0.6 * x + 0.4 * x.flip(0)
        return F.cross_entropy(module(x), y)

    return loss


@pytest.mark.parametrize("threshold", [0.05, 0.5, 0.95])
@pytest.mark.parametrize(
    "draw",
    [random.random, np.random.rand, lambda: float(torch.rand(1))],
    ids=["python", "numpy", "torch"],
)
def test_mixing_by_chance_is_found(draw, threshold):
    found = selftest_of(Net(), sometimes(draw, threshold))
    assert "alone and in a batch" in found.findings[0]


def test_what_only_large_batches_do_is_found():
    def hardest_eight(module, batch):
        x, y = batch
        losses = F.cross_entropy(module(x), y, reduction="none")
        return losses.topk(8).values.mean() if len(x) > 8 else losses.mean()

    assert selftest_of(Net(), hardest_eight).passed
    assert "alone and in a batch" in selftest_of(Net(), hardest_eight, rows=32).findings[0]


def drop_with_a_known_seed(module, batch):
    x, y = batch
    generator = torch.Generator().manual_seed(0)
    return F.cross_entropy(module(x * torch.rand(x.shape, generator=generator)), y)


def drop_after_a_seed(module, batch):
    torch.manual_seed(0)
    return F.cross_entropy(module(F.dropout(batch[0], 0.5)), batch[1])


@pytest.mark.parametrize("loss", [drop_with_a_known_seed, drop_after_a_seed])
def test_random_numbers_that_are_not_secret_are_found(loss):
    assert "random numbers from the global generators" in selftest_of(Net(), loss).findings[0]
