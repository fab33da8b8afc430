"""Seeds that users set, and generators that they keep: nobody knows what is drawn in a fit."""

import contextlib
import functools
import random

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, default_collate

from defend import DifferentialPrivacy, PrivacyError
from defend.privacy.mechanism.user_randomness import UserRandomness
from tests.helpers import trainer

ROWS, WIDTH = 24, 16
GLOBAL_RNG = np.random.default_rng(0)
SEEN = []  # what each forward of a training step made of its batch of ones


class Watched(pl.LightningModule):
    """Dropout on rows of ones, which items may have flipped: signs and zeros are coins."""

    def __init__(self, dropout=0.5, generator=None):
        super().__init__()
        self.drop, self.net = nn.Dropout(dropout), nn.Linear(WIDTH, 3)
        self.own = generator

    def training_step(self, batch, batch_idx):
        x = batch[0]
        if self.own is not None:
            x = x * signs(torch.rand(x.shape, generator=self.own))
        x = self.drop(x)
        SEEN.append(x.detach().sign())
        return F.cross_entropy(self.net(x), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def signs(uniform):
    return (torch.as_tensor(uniform) < 0.5).float() * 2 - 1


class Ones(Dataset):
    """Rows of ones, each times the coins that `draw(index)` gives."""

    def __init__(self, draw=None):
        self.draw = draw

    def __len__(self):
        return ROWS

    def __getitem__(self, index):
        x = torch.ones(WIDTH)
        return (x if self.draw is None else x * signs(self.draw(index))), index % 3


class Seeding(pl.Callback):
    def __init__(self, hook):
        setattr(self, hook, lambda *_: pl.seed_everything(0, verbose=False))


class NewEachEpoch(pl.Callback):
    """Gives the data set a new generator, from a known seed, in each epoch."""

    def __init__(self, keeps):
        self.keeps = keeps

    def on_train_epoch_start(self, trainer, pl_module):
        self.keeps.parts[0]["rng"] = np.random.default_rng(trainer.current_epoch)


def renewed():
    keeps = Keeps(new("numpy"))
    return Watched(0), Ones(keeps), [NewEachEpoch(keeps)], {}


def seeds_torch(index):
    torch.manual_seed(index)
    return torch.ones(WIDTH)


class Keeps:
    """Draws from a generator that it holds."""

    def __init__(self, generator):
        self.parts = [{"rng": generator}]

    def __call__(self, index):
        return draw(self.parts[0]["rng"])


class Lazy(Keeps):
    """Makes its generator when it is first asked."""

    def __call__(self, index):
        self.parts[0]["rng"] = self.parts[0]["rng"] or np.random.default_rng(0)
        return super().__call__(index)


class OfItsClass:
    rng = np.random.RandomState(0)

    def __call__(self, index):
        return draw(self.rng)


def of_the_file(index):
    return draw(GLOBAL_RNG)


def draw(rng):
    if isinstance(rng, torch.Generator):
        return torch.rand(WIDTH, generator=rng)
    if isinstance(rng, random.Random):
        return torch.tensor([rng.random() for _ in range(WIDTH)])
    return rng.random(WIDTH) if isinstance(rng, np.random.Generator) else rng.random_sample(WIDTH)


def flipping(rng):
    def collate(items):
        x, y = default_collate(items)
        return x * signs(torch.stack([torch.as_tensor(draw(rng)) for _ in items])), y

    return collate


def new(kind):
    """A generator from a known seed, in the same place each time."""
    if kind == "torch":
        return torch.Generator().manual_seed(0)
    return {"numpy": np.random.default_rng, "legacy": np.random.RandomState}.get(
        kind, random.Random
    )(0)


# What is known: (module, data set, hooks, settings of the loader), each as a user has it at first.
KNOWN = {
    **{
        f"a seed in {hook}": lambda hook=hook: (Watched(), Ones(), [Seeding(hook)], {})
        for hook in ("on_train_start", "on_train_epoch_start", "on_train_batch_start")
    },
    "a seed in each item": lambda: (Watched(), Ones(seeds_torch), [], {}),
    **{
        f"a data set's generator, {kind}": lambda kind=kind: (
            Watched(0), Ones(Keeps(new(kind))), [], {},
        )
        for kind in ("torch", "numpy", "legacy", "python")
    },
    "a generator made when it is needed": lambda: (Watched(0), Ones(Lazy(None)), [], {}),
    "a generator made for each epoch": renewed,
    "a class's generator": lambda: (Watched(0), Ones(OfItsClass()), [], {}),
    "a generator of the file": lambda: (Watched(0), Ones(of_the_file), [], {}),
    "a generator in a partial": lambda: (
        Watched(0), Ones(functools.partial(lambda rng, _: draw(rng), new("numpy"))), [], {},
    ),
    "a generator of the collate function": lambda: (
        Watched(0), Ones(), [], {"collate_fn": flipping(new("python"))},
    ),
    "a generator of the module": lambda: (Watched(0, new("torch")), Ones(), [], {}),
    "a data set's generator, in a worker": lambda: (
        Watched(0), Ones(Keeps(new("numpy"))), [], {"num_workers": 1},
    ),
}  # fmt: skip


def coins(make):
    """What the last step of a fit saw, after four of them; each fit starts in the same state."""
    pl.seed_everything(0, verbose=False)
    global GLOBAL_RNG
    GLOBAL_RNG, OfItsClass.rng = np.random.default_rng(0), np.random.RandomState(0)
    module, records, hooks, settings = make()
    dp = DifferentialPrivacy(noise_multiplier=1.0, delta=1e-3, max_grad_norm=1.0, ledger=False)
    run = trainer(callbacks=[dp, *hooks], max_epochs=4)
    run.fit(module, DataLoader(records, batch_size=ROWS, **settings))
    assert dp.steps == 4
    assert dp.selftest.passed
    return SEEN[-1]


@pytest.mark.parametrize("make", KNOWN.values(), ids=KNOWN.keys())
def test_what_is_known_before_a_fit_says_nothing_about_its_numbers(make):
    one, other = coins(make), coins(make)
    assert one.shape == other.shape == (ROWS, WIDTH)
    assert 0.3 < (one != other).float().mean() < 0.7  # coins: half of them agree


@pytest.mark.parametrize("name", list(KNOWN)[:12:3])
def test_without_the_guard_they_repeat(name, monkeypatch):
    """The planted wrong answer of the test above."""
    monkeypatch.setattr(UserRandomness, "renew", lambda self, **_: None)
    monkeypatch.setattr(UserRandomness, "secret", lambda self: contextlib.nullcontext())
    assert torch.equal(coins(KNOWN[name]), coins(KNOWN[name]))


def test_generators_stand_where_they_stood_after_the_fit():
    kept = [new("torch"), new("numpy"), new("legacy"), new("python")]
    records = Ones(Keeps(kept[1]))
    records.others = kept
    dp = DifferentialPrivacy(noise_multiplier=1.0, delta=1e-3, max_grad_norm=1.0, ledger=False)
    run = trainer(callbacks=[dp], max_epochs=1)
    run.fit(Watched(), DataLoader(records, batch_size=ROWS))
    for kind, generator in zip(("torch", "numpy", "legacy", "python"), kept, strict=True):
        assert np.array_equal(draw(generator), draw(new(kind)))


# --- numbers that no fit can make secret: they are seeded, or made, in the step itself ------------


def by_row(x, rows):
    return x * signs(rows).float()[:, None]


def seeded_mask(x):
    torch.manual_seed(0)
    return F.dropout(x, 0.5)


def seeded_numpy(x):
    np.random.seed(0)  # noqa: NPY002
    return by_row(x, np.random.rand(len(x)))  # noqa: NPY002


def seeded_python(x):
    random.seed(0)
    return by_row(x, [random.random() for _ in x])


def new_generator(x):
    return by_row(x, torch.rand(len(x), generator=torch.Generator().manual_seed(0)))


def new_rng(x):
    return by_row(x, np.random.default_rng(0).random(len(x)))


def new_state(x):
    return by_row(x, np.random.RandomState(0).rand(len(x)))


def new_random(x):
    rng = random.Random(0)
    return by_row(x, [rng.random() for _ in x])


def beside_a_secret_mask(x):
    return new_rng(F.dropout(x, 0.2))


def secret_everywhere(x):
    coins = np.random.rand(len(x)) + random.random()  # noqa: NPY002
    x = by_row(x, torch.from_numpy(coins % 1)) * torch.rand(len(x), 1)
    return F.dropout(x, 0.5) * signs(np.random.default_rng().random(len(x)))[:, None]


KNOWN_IN_THE_STEP = (
    seeded_mask, seeded_numpy, seeded_python, new_generator, new_rng, new_state, new_random,
    beside_a_secret_mask,
)  # fmt: skip


def run_with(change, where):
    class Changing(Watched):
        def training_step(self, batch, batch_idx):
            x, y = batch
            return F.cross_entropy(self.net(change(x) if where == "step" else x), y)

    def collate(items):
        x, y = default_collate(items)
        return change(x), y

    settings = {"collate_fn": collate} if where == "collate" else {}
    dp = DifferentialPrivacy(noise_multiplier=1.0, delta=1e-3, max_grad_norm=1.0, ledger=False)
    records = Ones(lambda index: np.random.default_rng(index).random(WIDTH))
    trainer(callbacks=[dp], max_epochs=1).fit(
        Changing(), DataLoader(records, batch_size=ROWS, **settings)
    )
    return dp


@pytest.mark.parametrize("where", ["step", "collate"])
@pytest.mark.parametrize("change", KNOWN_IN_THE_STEP)
def test_known_numbers_in_the_step_are_refused(change, where):
    with pytest.raises(PrivacyError, match="got a step that draws known ones"):
        run_with(change, where)


@pytest.mark.parametrize("where", ["step", "collate"])
def test_secret_numbers_of_all_kinds_pass(where):
    """And items that draw from their own index, which are functions of their record alone."""
    assert run_with(secret_everywhere, where).steps == 1
