"""Robust and private at once: one record, one contribution, whatever the order."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from defend import L2, PGD, AdversarialTraining, DifferentialPrivacy, Linf, RobustnessEvaluation
from defend.privacy import PoissonBatchSampler, Randomness
from tests.helpers import ConvNet, Net, data, flat, loader, trainer
from tests.reference.dpsgd import clipped_sum

C = 0.5


def adversarial(attack=None, **settings):
    return AdversarialTraining(attack or PGD(Linf(0.1), steps=3), **settings)


def private(**settings):
    return DifferentialPrivacy(
        **{
            "delta": 1e-3,
            "max_grad_norm": C,
            "noise_multiplier": 0.7,
            "insecure_seed": 7,
            **settings,
        }
    )


def fit(callbacks, module=Net, batches=None, **settings):
    pl.seed_everything(0)
    instance = module()
    run = trainer(callbacks=callbacks, **settings)
    run.fit(instance, batches or loader(256, 32), loader(16, 16))
    return instance


def test_neither_order_nor_chunks_change_the_result():
    results = []
    for chunk_size in (None, 8, 3):
        for swap in (False, True):
            callbacks = [adversarial(), private(chunk_size=chunk_size)]
            evaluation = RobustnessEvaluation({"pgd": PGD(Linf(0.1), steps=3)})
            callbacks.insert(1, evaluation)
            results.append(flat(fit(callbacks[::-1] if swap else callbacks, max_epochs=2)))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=1e-6)
    # Not vacuous: both callbacks matter.
    for alone in ([private()], [adversarial()]):
        assert (flat(fit(alone, max_epochs=2)) - results[0]).abs().max() > 1e-3


def test_equals_the_slow_reference_on_adversarial_records():
    attack = PGD(Linf(0.1), steps=3, random_start=False)
    module = fit([private(noise_multiplier=0.0), adversarial(attack)], max_steps=2)
    pl.seed_everything(0)
    reference = Net()
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.05, momentum=0.9)
    x, y = data(256).tensors
    sampler = PoissonBatchSampler(256, 1 / 8, 8, Randomness(insecure_seed=7))
    for step in range(2):
        pairs = []
        for i in sampler.sample(step):
            row, label = x[i : i + 1], y[i : i + 1]
            pairs.append((attack(reference, row, label), label))
        total = clipped_sum(
            reference, lambda a, b: nn.functional.cross_entropy(reference(a), b), pairs, C
        )
        for p, t in zip(reference.parameters(), total, strict=True):
            p.grad = t / 32
        optimizer.step()
    torch.testing.assert_close(flat(module), flat(reference), rtol=0, atol=1e-5)


class Release(Callback):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.gradient = torch.cat([p.grad.flatten() for p in pl_module.parameters()])


class Mixing(Net):
    """A planted wrong answer: records see each other."""

    def forward(self, x):
        x = x.flatten(1)
        return self.net(x - x.mean(0))


def sum_of_one_step(records, module, attack, chunk_size):
    """The clipped sum over all `records`: q = 1, noise off, one step."""
    spy = Release()
    callbacks = [
        adversarial(attack),
        private(noise_multiplier=0.0, chunk_size=chunk_size, selftest=False),
        spy,
    ]
    fit(callbacks, module, DataLoader(records, batch_size=len(records)), max_steps=1)
    return spy.gradient.double() * len(records)


def largest_move(module, attack, chunk_size=None, n=8):
    """max over records of ‖change of the clipped sum when it is left out‖, in units of C."""
    full = data(n) if module is not ConvNet else images(n)
    whole = sum_of_one_step(full, module, attack, chunk_size)
    moves = []
    for i in range(n):
        rest = Subset(full, [j for j in range(n) if j != i])
        without = sum_of_one_step(rest, module, attack, chunk_size)
        moves.append((whole - without).norm().item() / C)
    return max(moves)


def images(n):
    x = torch.rand(n, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, torch.arange(n) % 3)


class Eager(ConvNet):
    """Without dropout, whose masks would differ between the runs that are compared."""

    def __init__(self):
        super().__init__()
        self.net[4] = nn.Identity()


@pytest.mark.parametrize("ball", [Linf(0.1), L2(0.3)], ids=lambda b: b.name)
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_leaving_one_record_out_moves_the_clipped_sum_by_at_most_C(ball, chunk_size):  # noqa: N802
    attack = PGD(ball, steps=3, random_start=False)
    assert 0.2 < largest_move(Net, attack, chunk_size) <= 1 + 1e-4


def test_with_convolutions_too():
    def module():
        return Eager()

    attack = PGD(Linf(0.1), steps=3, random_start=False)
    full = images(6)
    whole = sum_of_one_step(full, module, attack, None)
    for i in range(6):
        rest = Subset(full, [j for j in range(6) if j != i])
        assert (whole - sum_of_one_step(rest, module, attack, 4)).norm() / C <= 1 + 1e-4


def test_the_harness_flags_records_that_see_each_other():
    assert largest_move(Mixing, PGD(Linf(0.1), steps=3, random_start=False)) > 1.01


class Own(Linf):
    """Each record's random start is its own, wherever it stands in the batch.

    The coupling that the guarantee rests on: with secret, independent starts, a run without a
    record is distributed as one in which every other record keeps its start.
    """

    def random_start(self, like, generator, *, eps=None, free=None):
        rows = []
        for row in like:
            seed = int(row.double().sum().mul(1e9)) % 2**31
            own = torch.Generator().manual_seed(seed)
            rows.append(torch.empty_like(row).uniform_(-self.eps, self.eps, generator=own))
        return torch.stack(rows)


@pytest.mark.parametrize("steps", [1, 3])
def test_with_random_starts_of_their_own_too(steps):
    attack = PGD(Own(0.3), steps=steps, step_size=0.05)
    assert 0.2 < largest_move(Net, attack, 3) <= 1 + 1e-4


def test_known_starts_by_position_would_break_it():
    """Why starts are secret: leaving out the first record shifts those of all others."""
    full = data(16)
    attack = PGD(Linf(0.3), steps=1, step_size=0.05)
    whole = sum_of_one_step(full, Net, attack, None)
    without = sum_of_one_step(Subset(full, range(1, 16)), Net, attack, None)
    assert (whole - without).norm() / C > 1.01


class Watching(Net):
    def __init__(self):
        super().__init__()
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append((batch[0].clone(), torch.rand(4)))
        return super().training_step(batch, batch_idx)


def test_starts_and_dropout_are_secret_and_the_global_rng_is_put_back():
    runs, left = [], []
    for seed in (None, None, 7, 7):
        callbacks = [adversarial(), private(insecure_seed=seed, noise_multiplier=0.0)]
        pl.seed_everything(0)
        module = Watching()
        run = trainer(callbacks=callbacks, max_steps=1)
        batches = DataLoader(data(16), batch_size=16)  # q = 1: the same records in each run
        run.fit(module, batches)
        left.append(torch.get_rng_state())  # of the seed again, not of the secret
        runs.append(module.seen[0])
    assert torch.equal(left[0], left[1])
    (x1, u1), (x2, u2), (x3, u3), (x4, u4) = runs
    assert not torch.equal(x1, x2)
    assert not torch.equal(u1, u2)
    assert torch.equal(x3, x4)
    assert torch.equal(u3, u4)


def test_the_attack_runs_in_the_private_chunks():
    sizes = []

    class Sized(Net):
        def forward(self, x):
            sizes.append((self.training, len(x)))
            return super().forward(x)

    fit([adversarial(), private(chunk_size=8)], Sized, max_steps=2)
    assert max(size for training, size in sizes if training) <= 8
    attacks = [size for training, size in sizes if not training and size != 16]
    assert attacks
    assert max(attacks) <= 8


def test_the_attack_is_charged_nothing():
    both, alone = private(), private()
    fit([adversarial(), both])
    fit([alone])
    assert both.history == alone.history


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_on_cuda(precision):
    results = []
    for chunk_size in (None, 8):
        private_ = private(chunk_size=chunk_size)
        evaluation = RobustnessEvaluation({"pgd": PGD(Linf(0.1), steps=3)})
        module = fit([adversarial(), private_, evaluation], accelerator="gpu", precision=precision)
        results.append(flat(module).cpu())
        assert private_.steps == 8
        assert evaluation.report.records == 16
    tolerance = 1e-5 if precision == "32-true" else 1e-2
    torch.testing.assert_close(*results, rtol=0, atol=tolerance)
    assert all(p.grad is None for p in module.parameters())
