"""On a GPU: capture one step of an attack as a CUDA graph, and replay it.

A step of a small model is dozens of kernels of a few microseconds, and launching them from Python
takes longer than running them. A graph is launched at once. It reads weights where they are, so
weights updated in place by an optimizer stay valid.

What the model's forward decides in Python is decided once, at capture. So a graph serves only while
the model looks the same from Python: its modules, hooks, numbers, flags and the places of its
tensors. For what that does not show, a replayed step is compared with one of Python's now and then.

Graphs live as long as their model, a few for each; they hold neither the model nor the loss.
"""

import dataclasses
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from defend.attacks.ascent import Ascent
from defend.attacks.cuda_graphs.capture import keep_random_numbers, record
from defend.attacks.cuda_graphs.signature import Look, check_model, look_of, weakly

_log = logging.getLogger(__name__)

_MOST = 16  # for a model: shapes of full and last batches, of training and several evaluations
_PATIENCE = 64  # kinds of steps in a row of which none came up twice
_CHECK_EVERY = 64  # calls: compare a replayed step with one that Python runs
_FAR = 0.5  # of the squared step; 2 for steps that have nothing to do with each other
_RTOL, _ATOL = 1e-2, 1e-3  # the losses of half precision agree to that

Replay = Callable[[], None]


def may_capture(model: Any, x: Tensor) -> bool:
    """Whether steps on x are worth a try."""
    if not x.is_cuda or not isinstance(model, nn.Module):
        return False
    shelf = _SHELVES.get(model)
    return (shelf is None or not shelf.refused) and not torch.cuda.is_current_stream_capturing()


def climb(ascent: Ascent, steps: int) -> bool:
    """Take `steps` steps of `ascent` by replaying a graph.

    A kind of step is captured when it comes up for the second time: it fits, and will come again.

    Returns:
        False if that cannot be done; nothing has moved then.

    Raises:
        torch.OutOfMemoryError: if a step does not fit.
    """
    if not _BUSY.acquire(blocking=False):
        return False  # another thread is at work; a graph has one memory
    try:
        assert isinstance(ascent.model, nn.Module)
        if ascent.model not in _SHELVES:
            _SHELVES[ascent.model] = _Shelf(ascent)
        return _SHELVES[ascent.model].climb(ascent, steps)
    finally:
        _BUSY.release()


class _Shelf:
    """The graphs of one model, by the kind of step that they are good for."""

    def __init__(self, ascent: Ascent) -> None:
        self._graphs: OrderedDict[Hashable, _Captured | str | None] = OrderedDict()
        self._told: set[str] = set()
        self._in_a_row, self._last = 0, Look()
        self._restless: set[str] | None = None
        # What the forward or the loss raises here is raised without graphs, too.
        restless = _restless(ascent)
        try:
            assert isinstance(ascent.model, nn.Module)
            check_model(ascent.model, ascent.delta.device)
            self._restless = restless
        except RuntimeError as error:
            self._refuse(error)

    @property
    def refused(self) -> bool:
        """Whether the model is not to be captured at all."""
        return self._restless is None

    def climb(self, ascent: Ascent, steps: int) -> bool:
        if self._restless is None:
            return False
        assert isinstance(ascent.model, nn.Module)
        look = look_of(ascent.model, but=self._restless)
        key = _key(ascent), look
        if key not in self._graphs:
            self._graphs[key] = "seen once"
            self._watch(look)
            while len(self._graphs) > _MOST:
                self._graphs.popitem(last=False)
            return False
        self._graphs.move_to_end(key)
        self._in_a_row = 0
        if self._graphs[key] == "seen once":
            self._graphs[key] = self._captured(ascent)
        graph = self._graphs[key]
        if not isinstance(graph, _Captured):
            return False
        if graph.run(ascent, steps):
            return True
        self._graphs[key] = None
        self._tell(
            "CUDA graph dropped: a replayed step no longer agrees with the model's forward, which "
            "seems to depend on something in Python. Steps run one by one."
        )
        return False

    def _captured(self, ascent: Ascent) -> "_Captured | None":
        """A graph of the ascent's step, or None, with the reason in the log."""
        stream = _stream(ascent)
        shared = (g for g in self._graphs.values() if isinstance(g, _Captured))
        pool = next((g.pool for g in shared if g.stream == stream), None)
        try:
            return _Captured(ascent, stream, pool)
        except Exception as error:
            # A synchronization, a copy from the host, an op that cannot be captured, no memory for
            # a graph beside the step, which fitted. What is wrong anyway is so without a graph too.
            self._refuse(error)
            return None

    def _refuse(self, error: Exception) -> None:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        self._tell(f"CUDA graph not captured, steps run one by one: {reason}")

    def _watch(self, look: Look) -> None:
        """Say so if no step is ever like another."""
        changed = sorted({name for name, _ in look ^ self._last})
        self._in_a_row, self._last = self._in_a_row + 1, look
        if self._in_a_row == _PATIENCE:
            what = f"the model's {', '.join(changed[:3])}" if changed else "the batch's shape"
            self._tell(
                f"CUDA graph not captured, steps run one by one: {what} changes at every batch."
            )

    def _tell(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            _log.warning(message)


_SHELVES: WeakKeyDictionary[nn.Module, _Shelf] = WeakKeyDictionary()
_BUSY = threading.Lock()


class _Captured:
    """A captured step: an ascent on memory of its own, and what replays it."""

    def __init__(self, ascent: Ascent, stream: Any, pool: Any) -> None:
        own = _copy(ascent)
        self.stream = stream
        with keep_random_numbers(own.delta.device):
            self._replay, self.pool = _record(own, pool)
        # Neither the model nor what may hold it: else the model would live as long as its graph.
        self._own = dataclasses.replace(own, model=_gone, loss=_gone)
        self._calls = 0

    def run(self, ascent: Ascent, steps: int) -> bool:
        """Steps of `ascent`; False, with nothing moved, if the graph is out of date."""
        own = self._own
        if self._calls % _CHECK_EVERY == 0 and not self._agrees(ascent):
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
        """Whether a replayed step goes where Python's goes."""
        own, device = self._own, ascent.delta.device
        try:
            plain = _copy(ascent)
            with keep_random_numbers(device):
                plain()
        except torch.OutOfMemoryError:
            return True  # no room to look beside the graph
        _load(own, ascent)
        with keep_random_numbers(device):
            self._replay()
        moved, expected = own.delta - ascent.delta, plain.delta - ascent.delta
        # A few signs of tiny gradients may differ.
        longest = torch.maximum(_squared(moved), _squared(expected))
        agrees = _squared(moved - expected) <= _FAR * longest
        if own.best is not None and plain.best is not None:
            means = own.best.loss.mean(), plain.best.loss.mean()
            agrees &= torch.isclose(*means, rtol=_RTOL, atol=_ATOL, equal_nan=True)
        return bool(agrees)


def _record(own: Ascent, pool: Any) -> tuple[Replay, Any]:
    return record(own, own.delta.device, pool)


def _restless(ascent: Ascent) -> set[str]:
    """What the forward itself changes at every call: a counter, features that it keeps."""
    model = ascent.model
    assert isinstance(model, nn.Module)
    with keep_random_numbers(ascent.delta.device):
        _copy(ascent)()  # the first call may build what stays
        before = look_of(model)
        _copy(ascent)()
        return {name for name, _ in before ^ look_of(model)}


def _gone(*_: Any) -> Any:
    raise AssertionError("a graph holds no model")


def _tensors(ascent: Ascent) -> list[Tensor]:
    """What a step reads and writes, without the model's weights."""
    problem, best = ascent.problem, ascent.best
    region = problem.region
    tensors = [problem.x, problem.y, problem.target, region.lower, region.upper, region.eps]
    tensors += [problem.step_size, ascent.delta, ascent.counts]
    tensors += [t for t in (region.free, problem.std, *problem.box) if t is not None]
    return tensors if best is None else [*tensors, best.delta, best.loss, best.fooled]


def _copy(ascent: Ascent) -> Ascent:
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
    for target, source in zip(_tensors(own), _tensors(ascent), strict=True):
        target.copy_(source)


def _key(ascent: Ascent) -> Hashable:
    """What a graph is good for, the model apart: settings, shapes, layouts, autocast, stream."""
    device = ascent.delta.device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    kernels = (
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.allow_tf32,
        torch.get_float32_matmul_precision(),
    )
    shapes = tuple((t.shape, t.stride(), t.dtype, t.device) for t in _tensors(ascent))
    ball = ascent.ball.with_eps(0.0)  # the radius is a tensor of the region
    settings = (
        ball,
        ascent.targeted,
        ascent.nan_fools,
        ascent.problem.dtype,
        ascent.best is None,
    )
    return settings, weakly(ascent.loss), shapes, autocast, kernels, _stream(ascent)


def _stream(ascent: Ascent) -> Hashable:
    device = ascent.delta.device
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None


def _squared(t: Tensor) -> Tensor:
    return t.square().sum()
