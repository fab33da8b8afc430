"""Random generators that user code makes or seeds while its step is tried out.

In a trial all numbers have to be repeatable, those of `np.random.default_rng()` too; and whether a
step draws known numbers shows when the seeds that it sets have no effect.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from random import Random
from typing import Any

import numpy as np
import torch
from numpy.random import RandomState, default_rng
from torch.utils._python_dispatch import TorchDispatchMode

from defend.privacy.mechanism.generators import Generator

# How many trials are under way, and how many of them ignore seeds. Generators that are made in one
# outlive it, and are ordinary ones from then on. How many were made or seeded so far.
_trials, _ignoring, _made = [0], [0], [0]


def generators_made() -> int:
    """A count that grows with each generator of numpy or Python made or seeded in a trial."""
    return _made[0]


@contextmanager
def repeatable_generators() -> Iterator[None]:
    """Inside, new generators without a seed start from the global ones, not from OS entropy."""
    makers = [
        (np.random, "default_rng", _default_rng),
        (np.random, "RandomState", TriedRandomState),
        (random, "Random", TriedRandom),
    ]
    with _counted(_trials), _replaced(makers):
        yield


@contextmanager
def ignored_seeds(allowed: Sequence[Generator] = ()) -> Iterator[None]:
    """Inside, whoever seeds gets other numbers: those that follow in the global generators.

    Code that neither seeds nor makes generators of its own does the same inside and outside. Names
    that were imported by themselves (`from random import seed`), bit generators of numpy and states
    that are set as a whole are out of reach.

    Args:
        allowed: generators of torch that may be drawn from.
    """
    seeds = [
        (torch, "manual_seed"),
        (torch.random, "manual_seed"),
        (torch.cuda, "manual_seed"),
        (torch.cuda, "manual_seed_all"),
        (np.random, "seed"),
        (random, "seed"),
    ]
    with (
        repeatable_generators(),
        _counted(_ignoring),
        _replaced([(owner, name, _ignore_seed) for owner, name in seeds]),
        _GlobalGenerator(allowed),
    ):
        yield


class _GlobalGenerator(TorchDispatchMode):
    """Inside, torch draws from its global generator, whichever one it is given."""

    def __init__(self, allowed: Sequence[Generator]) -> None:
        super().__init__()
        # Not ids: torch hands out another object for the same generator.
        self._allowed = {getattr(g, "_cdata", None) for g in allowed}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing compiled gets here, and the detour costs more than most operations

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        generator = kwargs.get("generator")
        if generator is not None and generator._cdata not in self._allowed:
            kwargs["generator"] = None
        return func(*args, **kwargs)


@contextmanager
def _counted(count: list[int]) -> Iterator[None]:
    count[0] += 1
    try:
        yield
    finally:
        count[0] -= 1


@contextmanager
def _replaced(names: Sequence[tuple[Any, str, Any]]) -> Iterator[None]:
    """Inside, each owner has something else under a name."""
    with ExitStack() as stack:
        for owner, name, replacement in names:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, replacement)
        yield


def _ignore_seed(*_: Any, **__: Any) -> torch.Generator:
    """Stands in for `seed` and `manual_seed`."""
    return torch.default_generator


def _seed_for(given: Any) -> Any:
    """The seed that a generator starts from, where user code gave one or none."""
    _made[0] += 1
    if _ignoring[0] or (given is None and _trials[0]):
        # From Python's: numpy's is drawn from row by row, so it stands elsewhere for each batch.
        return random.getrandbits(31)
    return given


def _default_rng(seed: Any = None) -> np.random.Generator:
    """Stands in for `np.random.default_rng`."""
    given = isinstance(seed, np.random.Generator | np.random.BitGenerator)
    return default_rng(seed if given else _seed_for(seed))


class _AsBase(type):
    """Every object of the class that one stands in for counts as one of it."""

    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, cls.__base__)  # type: ignore[arg-type]


class TriedRandomState(RandomState, metaclass=_AsBase):
    """Stands in for `np.random.RandomState`."""

    def __init__(self, seed: Any = None) -> None:
        super().__init__(_seed_for(seed))

    def seed(self, seed: Any = None) -> None:
        super().seed(_seed_for(seed))


class TriedRandom(Random, metaclass=_AsBase):
    """Stands in for `random.Random`."""

    def seed(self, a: Any = None, version: int = 2) -> None:
        super().seed(_seed_for(a), version)
