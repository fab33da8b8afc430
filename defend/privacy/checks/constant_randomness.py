"""Random numbers held constant, so that a record's gradient can be compared across batches."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.cuda import manual_seed_all as seed_cuda
from torch.utils._python_dispatch import TorchDispatchMode

from defend.privacy.checks.ignored_seeds import repeatable_generators
from defend.privacy.mechanism.generators import (
    GLOBAL,
    WORDS,
    Generator,
    put_back,
    start,
    state_of,
)


class ConstantRandomness(TorchDispatchMode):
    """Inside, each random tensor is filled with one constant.

    A dropout mask is drawn by position, so a record alone and the same record in a batch get
    different ones, though nothing is wrong. With constants both get the same, whatever the shape
    and the layout: dropout keeps everything, uniforms stand at `part` of their range, normals that
    many deviations off. `randperm` and `multinomial` stay as they are: what they shuffle is what is
    looked for.

    Args:
        part: in (0, 1). Try several: code may do one thing below a threshold and another above.

    Attributes:
        drew: whether torch was to draw a number.
    """

    def __init__(self, part: float = 0.37) -> None:
        super().__init__()
        self.part, self.drew = part, False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing compiled gets here, and the detour costs more than most operations

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        name, names, draws = _signature(func)
        self.drew |= draws
        if name == "native_dropout":
            self.drew, x = True, args[0]
            return x.clone(), torch.ones_like(x, dtype=torch.bool)
        if not _DROPOUT.isdisjoint(names):  # inside a fused kernel
            args = list(args)
            for i, argument in enumerate(names):
                if argument in _DROPOUT and i < len(args):
                    self.drew |= bool(args[i])
                    args[i] = 0.0
                elif argument in _DROPOUT and argument in kwargs:
                    self.drew |= bool(kwargs[argument])
                    kwargs[argument] = 0.0
        result = func(*args, **kwargs)
        constant = _CONSTANTS.get(name)
        if constant is not None:
            self.drew = True
            settings = dict(zip(names, args, strict=False))
            result.fill_(constant({**settings, **kwargs}, self.part))
        return result


_DROPOUT = frozenset({"dropout_p", "dropout"})


@functools.lru_cache(4096)
def _signature(operation: Any) -> tuple[str, tuple[str, ...], bool]:
    """An operation's name, its arguments, and whether it takes a generator."""
    schema = operation._schema
    names = tuple(a.name for a in schema.arguments)
    return schema.name.removeprefix("aten::"), names, "generator" in names


def _uniform(settings: Mapping[str, Any], part: float) -> float:
    low, high = settings.get("from", 0.0), settings.get("to", 1.0)
    return low + part * (high - low)


def _normal(settings: Mapping[str, Any], part: float) -> float | Tensor:
    mean, std = settings.get("mean", 0.0), settings.get("std", 1.0)
    if isinstance(mean, Tensor) or isinstance(std, Tensor):
        return part
    return mean + part * std


def _integer(settings: Mapping[str, Any], part: float) -> int:
    low = settings.get("low", settings.get("from", 0)) or 0
    high = settings.get("high", settings.get("to", 2)) or 2
    return int(low + part * (high - low))


def _one(settings: Mapping[str, Any], part: float) -> float:  # noqa: ARG001
    return 1.0


def _part(settings: Mapping[str, Any], part: float) -> float:  # noqa: ARG001
    return part


_CONSTANTS: dict[str, Callable[[Mapping[str, Any], float], Any]] = {
    "rand": _uniform,
    "rand_like": _uniform,
    "uniform_": _uniform,
    "randn": _normal,
    "randn_like": _normal,
    "normal_": _normal,
    "normal": _normal,
    "randint": _integer,
    "randint_like": _integer,
    "random_": _integer,
    "bernoulli": _one,
    "bernoulli_": _one,
    "exponential_": _one,
    "geometric_": _one,
    "log_normal_": _one,
    "cauchy_": _one,
    "_standard_gamma": _one,
    "_sample_dirichlet": _part,
    "poisson": _one,
    "binomial": _one,
}


@contextmanager
def seeded(
    seed: int, devices: Sequence[torch.device], generators: Sequence[Generator] = ()
) -> Iterator[None]:
    """The global RNGs of torch, numpy and Python start from `seed`, and are put back afterwards.

    Args:
        seed: ≥ 0.
        devices: whose RNGs are meant, beside the CPU's.
        generators: that user code keeps; they start from the seed, too.
    """
    cuda = [d for d in devices if d.type == "cuda"]
    before = [(g, state_of(g)) for g in (*GLOBAL[1:], *generators)]
    with torch.random.fork_rng(cuda, device_type="cuda"), repeatable_generators():
        # By their own methods: `torch.manual_seed` and the like may be without effect just now.
        torch.default_generator.manual_seed(seed)
        for users in GLOBAL[1:]:
            users.seed(seed)  # type: ignore[union-attr, call-arg]
        if cuda:
            seed_cuda(seed)
        for number, generator in enumerate(generators):
            start(generator, np.random.SeedSequence([seed, number]).generate_state(WORDS))
        try:
            yield
        finally:
            for generator, state in before:
                put_back(generator, state)
