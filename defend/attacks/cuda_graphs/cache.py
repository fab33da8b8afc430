"""The CUDA graphs of each model: when a step is captured, replayed, or run by Python.

A step of a small model is dozens of kernels of a few microseconds, and launching them from Python
takes longer than running them. A graph is launched at once. It reads weights where they are, so
weights updated in place by an optimizer stay valid.

What the model's forward decides in Python is decided once, at capture. So a graph serves only while
the model's signature is the same: its modules, hooks, numbers, flags and the places of its tensors.
A list or a closure is not part of it; so every 64 calls a replayed step is compared with one that
Python runs.

Graphs live as long as their model, a few for each; they hold neither the model nor the loss.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from defend.attacks.ascent import Ascent
from defend.attacks.cuda_graphs.capture import keep_random_numbers
from defend.attacks.cuda_graphs.captured_step import CapturedStep, copy_of, tensors_of
from defend.attacks.cuda_graphs.signature import Signature, check_model, signature_of, weakly

_log = logging.getLogger(__name__)

_MAX_GRAPHS_PER_MODEL = 16  # shapes of full and last batches, of training and several evaluations
_MAX_NEW_KINDS_IN_A_ROW = 64  # kinds of steps of which none came up twice


def may_capture(model: Any, x: Tensor) -> bool:
    """Whether steps of an attack on x may be captured at all."""
    if not x.is_cuda or not isinstance(model, nn.Module):
        return False
    cache = _CACHES.get(model)
    return (cache is None or not cache.refused) and not torch.cuda.is_current_stream_capturing()


def replay_steps(ascent: Ascent, steps: int) -> bool:
    """Take `steps` steps of `ascent` by replaying a graph.

    A kind of step is captured when it comes up for the second time. Then it is known to fit, and
    likely to come again.

    Returns:
        False if that cannot be done; nothing has moved then.

    Raises:
        torch.OutOfMemoryError: if a step does not fit.
    """
    if not _BUSY.acquire(blocking=False):
        return False  # another thread is at work; a graph has one memory
    try:
        assert isinstance(ascent.model, nn.Module)
        if ascent.model not in _CACHES:
            _CACHES[ascent.model] = _GraphCache(ascent)
        return _CACHES[ascent.model].replay_steps(ascent, steps)
    finally:
        _BUSY.release()


class _GraphCache:
    """The graphs of one model, by the kind of step that they replay."""

    def __init__(self, ascent: Ascent) -> None:
        self._graphs: OrderedDict[Hashable, CapturedStep | str | None] = OrderedDict()
        self._logged: set[str] = set()
        self._new_kinds_in_a_row, self._last_signature = 0, Signature()
        self._changing_names: set[str] | None = None
        # What the forward or the loss raises here is raised without graphs, too.
        changing = _changing_names(ascent)
        try:
            assert isinstance(ascent.model, nn.Module)
            check_model(ascent.model, ascent.delta.device)
            self._changing_names = changing
        except RuntimeError as error:
            self._log_failure(error)

    @property
    def refused(self) -> bool:
        """Whether the model is not to be captured at all."""
        return self._changing_names is None

    def replay_steps(self, ascent: Ascent, steps: int) -> bool:
        if self._changing_names is None:
            return False
        assert isinstance(ascent.model, nn.Module)
        signature = signature_of(ascent.model, without=self._changing_names)
        key = _key(ascent), signature
        if key not in self._graphs:
            self._graphs[key] = "seen once"
            self._log_if_never_repeated(signature)
            while len(self._graphs) > _MAX_GRAPHS_PER_MODEL:
                self._graphs.popitem(last=False)
            return False
        self._graphs.move_to_end(key)
        self._new_kinds_in_a_row = 0
        if self._graphs[key] == "seen once":
            self._graphs[key] = self._capture(ascent)
        graph = self._graphs[key]
        if not isinstance(graph, CapturedStep):
            return False
        if graph.take_steps(ascent, steps):
            return True
        self._graphs[key] = None
        self._log_once(
            "CUDA graph dropped: a replayed step no longer agrees with the model's forward, which "
            "seems to depend on something in Python. Steps run one by one."
        )
        return False

    def _capture(self, ascent: Ascent) -> "CapturedStep | None":
        """A graph of the ascent's step, or None, with the reason in the log."""
        stream = _stream(ascent)
        shared = (g for g in self._graphs.values() if isinstance(g, CapturedStep))
        pool = next((g.pool for g in shared if g.stream == stream), None)
        try:
            return CapturedStep(ascent, stream, pool)
        except Exception as error:
            # A synchronization, a copy from the host, an op that cannot be captured, no memory for
            # a graph beside the step, which fitted. What is wrong anyway is so without a graph too.
            self._log_failure(error)
            return None

    def _log_failure(self, error: Exception) -> None:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        self._log_once(f"CUDA graph not captured, steps run one by one: {reason}")

    def _log_if_never_repeated(self, signature: Signature) -> None:
        """Log once if no kind of step ever comes up twice."""
        changed = sorted({name for name, _ in signature ^ self._last_signature})
        self._new_kinds_in_a_row, self._last_signature = self._new_kinds_in_a_row + 1, signature
        if self._new_kinds_in_a_row == _MAX_NEW_KINDS_IN_A_ROW:
            what = f"the model's {', '.join(changed[:3])}" if changed else "the batch's shape"
            self._log_once(
                f"CUDA graph not captured, steps run one by one: {what} changes at every batch."
            )

    def _log_once(self, message: str) -> None:
        if message not in self._logged:
            self._logged.add(message)
            _log.warning(message)


_CACHES: WeakKeyDictionary[nn.Module, _GraphCache] = WeakKeyDictionary()
_BUSY = threading.Lock()


def _changing_names(ascent: Ascent) -> set[str]:
    """Attributes that every forward changes, such as a counter: no part of the signature."""
    model = ascent.model
    assert isinstance(model, nn.Module)
    with keep_random_numbers(ascent.delta.device):
        copy_of(ascent)()  # the first call may create attributes that then stay the same
        before = signature_of(model)
        copy_of(ascent)()
        return {name for name, _ in before ^ signature_of(model)}


def _key(ascent: Ascent) -> Hashable:
    """The kind of a step, apart from its model: settings, shapes, layouts, autocast, stream."""
    device = ascent.delta.device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    kernels = (
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.allow_tf32,
        torch.get_float32_matmul_precision(),
    )
    shapes = tuple((t.shape, t.stride(), t.dtype, t.device) for t in tensors_of(ascent))
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
