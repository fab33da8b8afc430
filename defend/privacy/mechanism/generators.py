"""The random generators that user code draws from: finding them, and starting them anew.

Three are global (torch's, numpy's and Python's); others are kept by data sets, transforms, collate
functions and modules.
"""

import contextlib
import functools
import random
import secrets
import sys
import types
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from random import Random
from typing import Any

import numpy as np
import torch
from numpy.random import RandomState
from torch import Tensor, nn

from defend.errors import PrivacyError
from defend.privacy.mechanism.libraries import CLOSED, LIBRARIES, package

Generator = torch.Generator | np.random.Generator | np.random.BitGenerator | RandomState | Random

# Those behind `torch.rand`, `np.random.rand` and `random.random`.
GLOBAL: tuple[Generator, ...] = (
    torch.default_generator,
    np.random.mtrand._rand,
    random.seed.__self__,  # type: ignore[attr-defined]
)

# torch's CPU generator is a Mersenne Twister, and `manual_seed` fills its 624 words from 32 bits:
# so the words themselves are set. They lie in the generator's state after a header of 24 bytes,
# each in a slot of 8.
WORDS = 624
_SEED = 8  # words of a seed for generators that make their state from one
_HEADER = 24


def fill(generator: torch.Generator, words: np.ndarray) -> torch.Generator:
    """Set the 624 words of a CPU generator, none of them drawn from yet."""
    state = _fresh_state().copy()
    state[_HEADER : _HEADER + 8 * WORDS] = words.astype(np.uint64).view(np.uint8)
    generator.set_state(torch.from_numpy(state))
    return generator


@functools.cache
def _fresh_state() -> np.ndarray:
    return torch.Generator().manual_seed(0).get_state().numpy().copy()


def secret_words(count: int = WORDS) -> np.ndarray:
    """Words of 32 bits from the operating system."""
    return np.frombuffer(secrets.token_bytes(4 * count), np.uint32)


def start(generator: Generator, words: np.ndarray | None = None) -> None:
    """Start a generator anew.

    Args:
        generator: of torch, numpy or Python.
        words: what it starts from, uint32, shape `[624]`; None for OS entropy: 256 bits where the
            generator makes its state from a seed of any length, else all of its state.

    Raises:
        PrivacyError: for a generator that cannot be set.
    """
    if words is None:
        words = secret_words(WORDS if isinstance(generator, torch.Generator) else _SEED)
    try:
        if isinstance(generator, torch.Generator):
            _start_torch(generator, words)
        elif isinstance(generator, Random):
            _refuse_other_cores(generator)
            Random.seed(generator, int.from_bytes(words.tobytes(), "little"))
        else:
            _start_numpy(generator, words)
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise PrivacyError(
            f"Expected random generators that can be started anew, got {generator!r} "
            f"({type(error).__name__}: {error}). What it draws may not be known: draw from "
            "torch, numpy.random or random instead."
        ) from error


def _start_torch(generator: torch.Generator, words: np.ndarray) -> None:
    if generator.device.type == "cpu":
        fill(generator, words)
    else:
        generator.manual_seed(int(words[:2].view(np.uint64)[0]))


def _refuse_other_cores(generator: Random) -> None:
    """A subclass may draw from elsewhere; then a seed of Python's own core says nothing."""
    for name in ("random", "getrandbits"):
        if getattr(type(generator), name) is not getattr(Random, name):
            raise TypeError(f"a `{name}` of its own")


def _start_numpy(generator: Any, words: np.ndarray) -> None:
    legacy = isinstance(generator, RandomState)
    bits = generator._bit_generator if legacy else _bits_of(generator)
    if legacy and isinstance(bits, np.random.MT19937):
        RandomState.seed(generator, words)  # a fifth of the time that setting its state takes
        return
    fresh = type(bits)(np.random.SeedSequence(words[:_SEED].tolist(), pool_size=_SEED)).state
    if legacy:  # it keeps a normal number for the next call
        generator.set_state({**fresh, "has_gauss": 0, "gauss": 0.0})
    else:
        bits.state = fresh


def state_of(generator: Generator) -> Any:
    """Where it stands, for `put_back`."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, Random):
        return generator.getstate()
    if isinstance(generator, RandomState):
        return generator.get_state(legacy=False)
    return _bits_of(generator).state


def same_state(one: Any, other: Any) -> bool:
    """Whether two states of a generator are the same."""
    if isinstance(one, dict):
        return all(same_state(value, other[name]) for name, value in one.items())
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    return bool(np.all(one == other))


def put_back(generator: Generator, state: Any) -> None:
    """Set a generator to where it stood."""
    if isinstance(generator, torch.Generator | RandomState):
        generator.set_state(state)
    elif isinstance(generator, Random):
        generator.setstate(state)
    else:
        _bits_of(generator).state = state


def _bits_of(generator: Any) -> Any:
    return getattr(generator, "bit_generator", generator)


# --- those that user code keeps -----------------------------------------------------------------

_MOST_VISITED = 20_000  # objects; nearest first, so what is left out lies deep in large data
_MOST_ITEMS = 1_000  # of one container
_LEAVES = (str, bytes, int, float, complex, Tensor, np.ndarray, type(None), random.SystemRandom)


def generators_in(roots: Iterable[Any], skip: Iterable[Any] = ()) -> list[Generator]:
    """The generators that objects refer to, directly or through others; not the global ones.

    Looked at are attributes of objects and of their classes, items of containers, the parts of a
    `functools.partial`, and of a function what it closes over, its defaults, and the globals that
    its code names. Objects of Lightning's classes and of ours are entered as roots only: they lead
    everywhere.

    Args:
        roots: where to begin: a data set, a collate function, a module.
        skip: objects that are not entered, such as a trainer.
    """
    return [value for value in objects_in(roots, skip) if isinstance(value, Generator)]


def objects_in(
    roots: Iterable[Any], skip: Iterable[Any] = (), *, users_only: bool = False
) -> Iterator[Any]:
    """The objects that others refer to, as `generators_in` looks at them; no plain values.

    Args:
        roots: where to begin.
        skip: objects that are not entered.
        users_only: whether the code of installed packages, their classes and functions, is left
            out. Objects of theirs are not.
    """
    queue = deque(roots)
    first = {id(root) for root in queue}
    # Each is kept until the end, so that no other object takes over its id.
    seen = {id(value): value for value in (*skip, *GLOBAL) if id(value) not in first}
    while queue and len(seen) < _MOST_VISITED:
        value = queue.popleft()
        if isinstance(value, _LEAVES) or id(value) in seen:
            continue
        seen[id(value)] = value
        yield value
        open_to_us = id(value) in first or package(type(value)) not in CLOSED
        if users_only and isinstance(value, type | types.FunctionType) and not is_users(value):
            continue
        if open_to_us and not isinstance(value, Generator):
            queue.extend(_parts(value))


def is_users(kind: Any) -> bool:
    """Whether a class or function is the user's, not Python's or an installed package's."""
    return is_users_module(kind.__module__ or "")


@functools.cache
def is_users_module(name: str) -> bool:
    """Whether a module is the user's, by its name."""
    file = getattr(sys.modules.get(name), "__file__", None) or ""
    installed = "site-packages" in file or "dist-packages" in file
    return not installed and name.partition(".")[0] not in LIBRARIES


def _parts(value: Any) -> Iterator[Any]:
    """What an object refers to; no code of the user's runs."""
    if isinstance(value, dict):
        yield from _some(dict.values(value))
    elif type(value) in (list, tuple, set, frozenset, deque):
        yield from _some(value)
    elif isinstance(value, functools.partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, types.MethodType):
        yield from (value.__self__, value.__func__)
    elif isinstance(value, types.FunctionType):
        yield from _parts_of_function(value)
    elif isinstance(value, property):
        yield value.fget
    if isinstance(value, type):
        if package(value) not in LIBRARIES:
            yield from (_of_class(part, None) for part in vars(value).values())
    elif not isinstance(value, types.ModuleType):
        kept = _some(getattr(value, "__dict__", {}).items())
        if isinstance(value, nn.Module):  # a dozen tables of hooks, mostly without one
            kept = [(n, v) for n, v in kept if n not in _TABLES or v]
        yield from (v for _, v in kept)
        for kind in type(value).__mro__:
            if package(kind) not in LIBRARIES:
                yield from (_of_class(part, value) for part in vars(kind).values())


_TABLES = frozenset(name for name, value in vars(nn.Module()).items() if isinstance(value, dict))


def _some(values: Iterable[Any]) -> list[Any]:
    """The first values of a container; none where another thread changes it just now."""
    with contextlib.suppress(RuntimeError):
        return list(islice(values, _MOST_ITEMS))
    return []


def _of_class(part: Any, owner: Any) -> Any:
    """An attribute of a class; the content where it is a slot, the function behind a method."""
    if isinstance(part, types.MemberDescriptorType):
        with contextlib.suppress(AttributeError, TypeError):  # an empty one, or of no object
            return part.__get__(owner)
    return getattr(part, "__func__", part)


def _parts_of_function(function: types.FunctionType) -> Iterator[Any]:
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # an empty one
            yield cell.cell_contents
    if package(function) in LIBRARIES:
        return
    names = set(names_in(function.__code__))
    for name in names & function.__globals__.keys():
        yield from _named(function.__globals__[name], names)


def _named(value: Any, names: set[str]) -> Iterator[Any]:
    """A global; of a module what the code may mean by `helpers.rng` and `package.helpers.draw`."""
    if not isinstance(value, types.ModuleType):
        yield value
    elif value.__name__.partition(".")[0] not in LIBRARIES:
        for name in names & vars(value).keys():
            part = vars(value)[name]
            if part is not value:
                yield from _named(part, names - {name})


def names_in(code: types.CodeType) -> Iterator[str]:
    """The names that a function's code uses, those of functions within too."""
    yield from code.co_names
    for constant in code.co_consts:  # functions within
        if isinstance(constant, types.CodeType):
            yield from names_in(constant)
