"""Random generators that user code keeps: found wherever they are kept, and started anew."""

import functools
import random
import types
from collections import deque

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import ConcatDataset, Dataset, Subset

from defend.errors import PrivacyError
from defend.privacy.mechanism.generators import (
    GLOBAL,
    WORDS,
    generators_in,
    put_back,
    secret_words,
    start,
    state_of,
)

KINDS = {
    "torch": lambda: torch.Generator().manual_seed(0),
    "default_rng": lambda: np.random.default_rng(0),
    "RandomState": lambda: np.random.RandomState(0),
    "Random": lambda: random.Random(0),
    **{
        name: functools.partial(getattr(np.random, name), 0)
        for name in ("PCG64", "PCG64DXSM", "Philox", "SFC64", "MT19937")
    },
    "RandomState of PCG64": lambda: np.random.RandomState(np.random.PCG64(0)),
}


def draws(generator):
    """Numbers of several kinds: some generators keep a normal one for the next call."""
    if isinstance(generator, torch.Generator):
        return torch.randn(17, generator=generator).tolist()
    if isinstance(generator, random.Random):
        return [generator.gauss(0, 1) for _ in range(17)]
    if isinstance(generator, np.random.BitGenerator):
        return generator.random_raw(17).tolist()
    return [*generator.normal(size=17), *generator.normal(size=2)]


@pytest.mark.parametrize("kind", KINDS)
def test_starts_from_words_and_is_put_back(kind):
    generator, words = KINDS[kind](), secret_words()
    draws(generator)
    before = state_of(generator)
    expected = draws(generator)
    found = []
    for given in (words, words, None, None):
        draws(generator)  # wherever it stands
        start(generator, given)
        found.append(draws(generator))
    assert found[0] == found[1]
    assert len({tuple(f) for f in (expected, *found)}) == 4  # OS entropy: each time another
    put_back(generator, before)
    assert draws(generator) == expected


def kept(state):
    """All that a state of a global generator consists of, to compare."""
    if isinstance(state, torch.Tensor):
        return tuple(state.tolist())
    return state[1] if isinstance(state, tuple) else tuple(state["state"]["key"].tolist())


@pytest.mark.parametrize("generator", GLOBAL, ids=["torch", "numpy", "python"])
def test_the_words_are_all_used(generator):
    """A seed of 32 bits would make some of these the same."""
    before, found = state_of(generator), set()
    try:
        for place in (0, 1, 2, WORDS - 1):
            words = np.ones(WORDS, np.uint32)
            words[place] = 2
            start(generator, words)
            found.add(kept(state_of(generator)))
    finally:
        put_back(generator, before)
    assert len(found) == 4


class Stuck(np.random.PCG64):
    state = property(lambda self: {}, lambda self, value: self.fail())

    def fail(self):
        raise TypeError("read only")


class OwnSeed(np.random.RandomState):
    def seed(self, seed=None):
        raise AssertionError("the user's method")


def test_starts_by_the_generators_own_seed_whatever_a_subclass_makes_of_it():
    generator = OwnSeed()
    start(generator, secret_words())


class OwnCore(random.Random):
    """Python's documentation tells how to do so; a seed of its base does nothing then."""

    def random(self):
        return 0.5


def test_refuses_a_generator_that_draws_from_elsewhere():
    with pytest.raises(
        PrivacyError, match=r"that can be started anew, got .*a `random` of its own"
    ):
        start(OwnCore())


def test_refuses_what_cannot_be_started():
    with pytest.raises(PrivacyError, match=r"that can be started anew, got .*read only"):
        start(Stuck(0))


# --- where they are found -------------------------------------------------------------------------


class Holder(Dataset):
    def __init__(self, part):
        self.part = part

    def __getitem__(self, index):
        return self.part


class Slotted:
    __slots__ = ("part",)

    def __init__(self, part):
        self.part = part


class Expensive(Holder):
    @property
    def never(self):
        raise AssertionError("code of the user's ran")


def of_a_class(generator):
    return type("Kind", (), {"rng": generator})()


def closure(generator):
    return lambda: generator


def default(generator):
    def function(rng=generator):
        return rng

    return function


def method(generator):
    return functools.partial(Holder(generator).__getitem__, 0)


def of_a_file(generator):
    scope = {"rng": generator}
    exec("def outer():\n    def inner():\n        return rng\n    return inner", scope)
    return scope["outer"]


def of_another_file(generator):
    helpers = types.ModuleType("helpers")
    helpers.rng = generator
    scope = {"helpers": helpers}
    exec("def draw():\n    return helpers.rng.random()", scope)
    return scope["draw"]


def of_a_function_elsewhere(generator):
    """`package.helpers.draw()`, and the generator is a global of that file."""
    helpers, package = types.ModuleType("package.helpers"), types.ModuleType("package")
    helpers.RNG, package.helpers = generator, helpers
    exec("def draw():\n    return RNG.random()", vars(helpers))
    scope = {"package": package}
    exec("def item():\n    return package.helpers.draw()", scope)
    return scope["item"]


def of_a_holder(generator):
    scope = {"Config": type("Config", (), {"rng": generator})}
    exec("def item():\n    return Config.rng.random()", scope)
    return scope["item"]


PLACES = {
    "global of a function elsewhere": of_a_function_elsewhere,
    "class as a holder": of_a_holder,
    "attribute": Holder,
    "slot": Slotted,
    "list in a dict": lambda g: {"a": [1, {"b": (g,)}]},
    "deque": lambda g: deque([g]),
    "class": of_a_class,
    "closure": closure,
    "default": default,
    "method in a partial": method,
    "global of a function": of_a_file,
    "global of another file": of_another_file,
    "Subset and ConcatDataset": lambda g: ConcatDataset([Subset(Sized(g), [0]), Sized(None)]),
    "module": lambda g: nn.Sequential(nn.Linear(1, 1), Inner(g)),
    "behind a property": Expensive,
    "circle": lambda g: circle(g),
}


class Sized(Holder):
    def __len__(self):
        return 1


class Inner(nn.Module):
    def __init__(self, part):
        super().__init__()
        self.part = part


def circle(generator):
    one = Holder(None)
    one.part = [one, generator]
    return one


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", ["torch", "default_rng", "RandomState", "Random", "Philox"])
def test_is_found(place, kind):
    generator = KINDS[kind]()
    assert [g for g in generators_in([PLACES[place](generator)]) if g is generator] == [generator]


def test_global_ones_secret_ones_and_skipped_objects_are_not():
    trainer = Holder(KINDS["torch"]())
    code = [Holder([*GLOBAL, random.SystemRandom(), torch.zeros(3), np.zeros(3), "text", trainer])]
    assert generators_in(code, skip=[trainer]) == []
    assert len(generators_in(code)) == 1


def test_large_data_takes_little_time():
    large = Holder([{"x": i, "y": [i, i]} for i in range(200_000)])
    large.rng = KINDS["torch"]()
    assert generators_in([large]) == [large.rng]
