"""`make_private` in a plain PyTorch loop: the mechanism, ε, and what users bring."""

from collections import namedtuple

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from defend import PGD, Adversarial, AdversarialTraining, BudgetError, Linf, PrivacyError
from defend.callbacks import DifferentialPrivacy
from defend.privacy import PoissonBatchSampler, Randomness, epsilon, noise_multiplier_for
from tests.helpers import data, flat, loader, trainer
from tests.reference.dpsgd import clipped_sum
from tests.training.loops import (
    SETTINGS,
    TARGET,
    assert_closed,
    mean_loss,
    net,
    private,
    sgd,
    some_steps,
    steps_in,
    train,
)


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # for the ledgers


# --- the mechanism ----------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_size", [None, 8, 3])
def test_equals_the_slow_reference(chunk_size):
    """A pass without noise: Poisson batch, clip per record, sum, ÷ expected batch, momentum."""
    model, reference = net(), net()
    train(private(model, noise_multiplier=0.0, insecure_seed=5, chunk_size=chunk_size))
    optimizer = sgd(reference)
    x, y = data(256).tensors
    sampler = PoissonBatchSampler(256, 32 / 256, 8, Randomness(insecure_seed=5))
    for step in range(8):
        total = clipped_sum(
            reference,
            lambda a, b: F.cross_entropy(reference(a), b),
            [(x[i : i + 1], y[i : i + 1]) for i in sampler.sample(step)],
            0.5,
        )
        for p, t in zip(reference.parameters(), total, strict=True):
            p.grad = t / 32
        optimizer.step()
    torch.testing.assert_close(flat(model), flat(reference), rtol=0, atol=1e-5)


@pytest.mark.parametrize("robust", [False, True])
def test_equals_the_callback(robust):
    """Of the same seed, with noise, and with random starts of an attack."""
    module, model = net(), net()
    attack = PGD(Linf(0.1), steps=2)
    callback = DifferentialPrivacy(**SETTINGS, insecure_seed=5)
    callbacks = [callback, *([AdversarialTraining(attack)] if robust else [])]
    trainer(callbacks=callbacks, max_epochs=2).fit(module, loader(256, 32))
    adversarial = Adversarial(attack) if robust else None
    loop = private(model, epochs=2, insecure_seed=5, adversarial=adversarial)
    train(loop, epochs=2)
    torch.testing.assert_close(flat(model), flat(module), rtol=0, atol=1e-6)
    assert loop.epsilon == callback.epsilon
    assert loop.history == callback.history


def released(sigma, chunk_size):
    """Eight passes that never move: what reached the optimizer, × expected batch."""
    model, seen = net(), []
    settings = {"noise_multiplier": sigma, "chunk_size": chunk_size, "insecure_seed": 1}
    with private(model, sgd(model, lr=0.0), epochs=8, **settings) as loop:
        for _ in range(8):
            for batch in loop.loader:
                loop.step(batch)
                seen.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    return torch.stack(seen) * 32


@pytest.mark.parametrize("chunk_size", [None, 8])
def test_the_noise_has_the_promised_deviation(chunk_size):
    sigma, C = 1.5, 0.5
    noise = (released(sigma, chunk_size) - released(0.0, chunk_size)).double()
    error = sigma * C / (2 * noise.numel()) ** 0.5
    assert abs(noise.std() - sigma * C) < 4 * error
    assert abs(noise.mean()) < 4 * sigma * C / noise.numel() ** 0.5
    # The same test rejects noise added once a chunk, or 3% too little.
    assert abs(noise.std() - sigma * C * 4**0.5) > 4 * error
    assert abs(0.97 * noise.std() - sigma * C) > 4 * error


def test_two_loops_of_one_seed_draw_different_noise_and_batches():
    for sigma in (0.7, 0.0):
        one, other = net(), net()
        for model in (one, other):
            torch.manual_seed(1)
            train(private(model, noise_multiplier=sigma))
        assert not torch.equal(flat(one), flat(other))


def test_random_starts_are_secret_and_new_at_each_step():
    starts = []

    def attack(model, x, y, *, generator, chunk_size):
        starts.append(tuple(torch.rand(4, generator=generator).tolist()))
        return x

    for _ in range(2):
        torch.manual_seed(0)
        train(private(net(), adversarial=Adversarial(attack), selftest=False))
    assert len(starts) == len(set(starts)) == 16


# --- what goes into a step ------------------------------------------------------------------------


def mixed(batch):
    return [0.7 * batch[0] + 0.3 * batch[0].roll(1, 0), batch[1]]


def standardized_in_place(batch):
    batch[0].sub_(batch[0].mean(0))
    return batch


def labels_moved(batch):
    return [batch[0], batch[1].roll(1)]


def another(batch):
    return [torch.rand_like(batch[0]), batch[1]]


@pytest.mark.parametrize("change", [mixed, standardized_in_place, labels_moved, another])
def test_a_batch_that_was_changed_before_its_step_is_refused(change):
    model = net()
    before = flat(model).clone()
    with private(model) as loop:
        batch = next(iter(loop.loader))
        with pytest.raises(
            PrivacyError, match="as the private loader gave it, got another, or one that was"
        ):
            loop.step(change(batch))
    assert loop.steps == 0
    assert torch.equal(flat(model), before)
    assert_closed(model)


def test_batches_may_be_kept_and_copied_before_their_steps():
    loop = private(net())
    with loop:
        for batch in list(loop.loader):
            loop.step([batch[0].clone(), batch[1].clone()])
    assert loop.steps == len(loop.loader) == 8
    assert loop.loader.batch_sampler is not None  # an attribute of the loader itself


class Criterion(torch.nn.Module):
    """Cross-entropy with a temperature of its own, or a centre for each class."""

    def __init__(self, grad=True):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(3), requires_grad=grad)

    def forward(self, model, batch):
        return F.cross_entropy(model(batch[0]) * self.scale, batch[1])


def with_a_teacher(model, batch):
    soft = TEACHER(batch[0]).softmax(1)
    return F.cross_entropy(model(batch[0]), soft)


torch.manual_seed(1)
TEACHER = torch.nn.Linear(8, 3)


@pytest.mark.parametrize("loss", [Criterion(), with_a_teacher], ids=["criterion", "teacher"])
def test_weights_outside_the_model_are_refused(loss):
    with pytest.raises(PrivacyError, match=r"outside of it, raw\. Make it a part of the module"):
        private(net(), loss=loss)


def test_what_gets_no_gradient_outside_of_the_model_may_be_there():
    def taught(model, batch):
        with torch.no_grad():
            soft = TEACHER(batch[0]).softmax(1)
        return F.cross_entropy(model(batch[0]), soft)

    for loss in (Criterion(grad=False), taught):
        assert train(private(net(), loss=loss)).steps == 8


def test_a_criterion_inside_of_the_model_trains():
    class Scale(Criterion):
        def forward(self, x):
            return x * self.scale

    model = net()
    model.criterion = Scale()

    def loss(model, batch):
        return F.cross_entropy(model.criterion(model(batch[0])), batch[1])

    assert train(private(model, loss=loss)).steps == 8
    assert not torch.equal(model.criterion.scale, torch.ones(3))


def test_empty_batches_take_their_noised_step():
    model = net()
    loop = train(private(model, batches=loader(16, 1), epochs=4), epochs=4)
    assert loop.steps == 64  # q = 1/16: a third of the batches are empty
    assert flat(model).isfinite().all()


# --- ε ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
def test_a_target_is_met_over_the_plan(accountant):
    loop = private(net(), epochs=3, accountant=accountant, **TARGET)
    assert (loop.epsilon, loop.steps, loop.exhausted) == (0.0, 0, False)
    expected = noise_multiplier_for(
        3.0, delta=1e-3, sample_rate=1 / 8, steps=24, accountant=accountant
    )
    assert (loop.noise_multiplier, loop.sample_rate) == (expected, 1 / 8)
    train(loop, epochs=3)
    assert loop.steps == 24
    assert loop.exhausted
    assert 2.9 < loop.epsilon <= 3.0
    assert loop.epsilon == epsilon([(expected, 1 / 8, 24)], 1e-3, accountant)
    assert loop.private


def test_a_plan_without_a_target_ends_too():
    with private(net()) as loop:
        for batch in loop.loader:
            assert not loop.exhausted
            loop.step(batch)
        assert loop.exhausted


def test_a_step_beyond_the_budget_is_refused_and_nothing_is_lost():
    model = net()
    loop = private(model, epochs=20, noise_multiplier=1.0, target_epsilon=2.0)
    with pytest.raises(BudgetError, match=r"stop at ε = 2.0, got a further step"):  # noqa: PT012
        while True:
            for batch in loop.loader:
                before = flat(model).clone()
                loop.step(batch)
    assert torch.equal(flat(model), before)
    assert_closed(model)
    assert loop.exhausted
    assert loop.epsilon <= 2.0 < epsilon([(1.0, 1 / 8, loop.steps + 1)], 1e-3)
    assert steps_in(loop.ledger_path) == loop.steps > 0
    again = private(net(), epochs=20, noise_multiplier=1.0, target_epsilon=2.0,
                    state=loop.state_dict())  # fmt: skip
    assert again.exhausted
    again.close()


def test_without_noise_or_with_a_seed_it_is_not_private():
    assert not train(private(net(), noise_multiplier=0.0)).private
    seeded = train(private(net(), insecure_seed=1))
    assert not seeded.private
    # Nor after going on without the seed.
    assert not train(private(net(), epochs=2, state=seeded.state_dict())).private


# --- what users bring -------------------------------------------------------------------------


def test_schedulers_and_parameter_groups_stay_the_users():
    model = net()
    groups = [
        {"params": model.net[0].parameters(), "lr": 1e-2},
        {"params": model.net[2].parameters(), "lr": 1e-3},
    ]
    optimizer = torch.optim.AdamW(groups)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
    with private(model, optimizer) as loop:
        for batch in loop.loader:
            loop.step(batch)
            scheduler.step()
    assert [g["lr"] for g in optimizer.param_groups] == [1e-2 / 16, 1e-3 / 16]
    assert len(optimizer.state) == 4


Pair = namedtuple("Pair", ["x", "y"])


class Bag:
    """A batch that knows how to move, as tokenizers give them."""

    def __init__(self, rows):
        self.x = torch.stack([r[0] for r in rows])
        self.y = torch.stack([r[1] for r in rows])

    def to(self, device):
        return {"x": self.x.to(device), "y": self.y.to(device)}


def as_dict(rows):
    return {**as_pair(rows)._asdict(), "name": [f"record {int(r[1])}" for r in rows]}


def as_pair(rows):
    return Pair(torch.stack([r[0] for r in rows]), torch.stack([r[1] for r in rows]))


def loss_of_fields(model, batch):
    x, y = (batch.x, batch.y) if isinstance(batch, Pair) else (batch["x"], batch["y"])
    return F.cross_entropy(model(x), y)


@pytest.mark.parametrize("collate", [as_dict, as_pair, Bag])
def test_any_kind_of_batch(collate):
    model = net()
    batches = DataLoader(data(256), batch_size=32, collate_fn=collate)
    settings = {"noise_multiplier": 0.0, "insecure_seed": 5, "chunk_size": 8}
    train(private(model, batches=batches, loss=loss_of_fields, **settings))
    expected = net()
    train(private(expected, **settings))
    assert torch.equal(flat(model), flat(expected))


def test_workers_and_an_epoch_that_was_left_early():
    with private(net(), batches=loader(256, 32, num_workers=1), epochs=2) as loop:
        some_steps(loop, 3)
        some_steps(loop, 8)
    assert loop.steps == 11


def test_autocast_inside_the_loss():
    def half(model, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return mean_loss(model, batch)

    model = net()
    loop = train(private(model, loss=half))
    assert loop.selftest.passed
    assert loop.steps == 8


def test_looking_at_the_model_between_steps_changes_nothing():
    models = [net(), net()]
    x = data(16, seed=1).tensors[0]
    for look, model in enumerate(models):
        with private(model, noise_multiplier=0.0, insecure_seed=5) as loop:
            for batch in loop.loader:
                if look:
                    model.eval()
                    with torch.no_grad():
                        model(x)
                    model.train()
                loop.step(batch)
    assert torch.equal(flat(models[0]), flat(models[1]))


def test_the_loss_that_is_returned_is_detached():
    with private(net(), chunk_size=None) as loop:
        batch = next(iter(loop.loader))
        expected = mean_loss(net(), batch)
        loss = loop.step(batch)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected.detach())
