"""One step of an attack as a CUDA graph, on memory of its own."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from defend.attacks.ascent import Ascent
from defend.attacks.cuda_graphs.capture import keep_random_numbers, record

_CALLS_BETWEEN_CHECKS = 64
# Of the squared length of a step; it is 2 for steps that have nothing to do with each other.
_MAX_SQUARED_DEVIATION = 0.5
_LOSS_RTOL, _LOSS_ATOL = 1e-2, 1e-3  # the losses of half precision agree to that

Replay = Callable[[], None]


class CapturedStep:
    """A captured step: an ascent on memory of its own, and what replays it."""

    def __init__(self, ascent: Ascent, stream: Any, pool: Any) -> None:
        own = copy_of(ascent)
        self.stream = stream
        with keep_random_numbers(own.delta.device):
            self._replay, self.pool = _record(own, pool)
        # Without the model and the loss, which may hold it: a graph must not keep its model alive.
        self._own = dataclasses.replace(own, model=_released, loss=_released)
        self._calls = 0

    def take_steps(self, ascent: Ascent, steps: int) -> bool:
        """Steps of `ascent`; False, with nothing moved, if the graph is out of date."""
        own = self._own
        if self._calls % _CALLS_BETWEEN_CHECKS == 0 and not self._agrees(ascent):
            return False
        self._calls += 1
        _load(own, ascent)
        for _ in range(steps):
            self._replay()
        ascent.delta.copy_(own.delta)
        if ascent.best is not None and own.best is not None:
            for name in ("delta", "loss", "fooled"):
                getattr(ascent.best, name).copy_(getattr(own.best, name))
        ascent.counts.copy_(own.counts)
        return True

    def _agrees(self, ascent: Ascent) -> bool:
        """Whether a replayed step moves δ as a step run by Python does."""
        own, device = self._own, ascent.delta.device
        try:
            plain = copy_of(ascent)
            with keep_random_numbers(device):
                plain()
        except torch.OutOfMemoryError:
            return True  # not enough memory to check beside the graph
        _load(own, ascent)
        with keep_random_numbers(device):
            self._replay()
        moved, expected = own.delta - ascent.delta, plain.delta - ascent.delta
        # A few signs of tiny gradients may differ.
        longest = torch.maximum(_squared(moved), _squared(expected))
        agrees = _squared(moved - expected) <= _MAX_SQUARED_DEVIATION * longest
        if own.best is not None and plain.best is not None:
            means = own.best.loss.mean(), plain.best.loss.mean()
            agrees &= torch.isclose(*means, rtol=_LOSS_RTOL, atol=_LOSS_ATOL, equal_nan=True)
        return bool(agrees)


def _record(own: Ascent, pool: Any) -> tuple[Replay, Any]:
    return record(own, own.delta.device, pool)


def _released(*_: Any) -> Any:
    raise AssertionError("a graph holds no model")


def tensors_of(ascent: Ascent) -> list[Tensor]:
    """What a step reads and writes, without the model's weights."""
    problem, best = ascent.problem, ascent.best
    region = problem.region
    tensors = [problem.x, problem.y, problem.target, region.lower, region.upper, region.eps]
    tensors += [problem.step_size, ascent.delta, ascent.counts]
    tensors += [t for t in (region.free, problem.std, *problem.box) if t is not None]
    return tensors if best is None else [*tensors, best.delta, best.loss, best.fooled]


def copy_of(ascent: Ascent) -> Ascent:
    """The same ascent on memory of its own."""

    def copy(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.clone()
        if isinstance(value, tuple):
            return tuple(map(copy, value))
        return value

    def fields(of: Any) -> dict[str, Any]:
        return {f.name: copy(getattr(of, f.name)) for f in dataclasses.fields(of)}

    region = dataclasses.replace(ascent.problem.region, **fields(ascent.problem.region))
    problem = type(ascent.problem)(**{**fields(ascent.problem), "region": region})
    best = None if ascent.best is None else type(ascent.best)(**fields(ascent.best))
    return dataclasses.replace(
        ascent,
        problem=problem,
        best=best,
        delta=ascent.delta.clone(),
        counts=ascent.counts.clone(),
    )


def _load(own: Ascent, ascent: Ascent) -> None:
    for target, source in zip(tensors_of(own), tensors_of(ascent), strict=True):
        target.copy_(source)


def _squared(t: Tensor) -> Tensor:
    return t.square().sum()
