"""Every call of a trainable layer: what went in, and the gradient of what came out.

Hooks watch the user's own module from outside; no forward, output or parameter is changed. For each
call the inputs are kept the way autograd keeps its own, and a hook on the output waits for its
gradient. So each gradient meets the inputs of its own call, however often a layer is used and in
whatever order. Gradient checkpointing works in both kinds, and still saves memory: what went into a
layer under a checkpoint is not held, but computed again in backward.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten
from torch.utils.hooks import RemovableHandle

from defend.errors import IndistinctRowsError
from defend.privacy.gradients.layers import takes_packed, trainable_layers


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a layer, as its gradient arrives.

    Attributes:
        module: the layer.
        args: its positional inputs, detached.
        kwargs: its inputs by name, detached.
        place: which of the tensors in its output has a gradient.
        gradient: of the loss, in that tensor.
        rows: rows of the batch.
        order: for a packed sequence, the record that each row belongs to; None: as they come.
        autocast: the settings that the call ran under.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    place: int
    gradient: Tensor
    rows: int
    order: Tensor | None
    autocast: torch.autocast


class _Keep(torch.autograd.Function):
    """Keeps tensors like autograd does, so that hooks for checkpoints and offloading apply."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return anchor.clone()


@dataclasses.dataclass
class _Waiting:
    """A call whose gradient has not come yet; `kept` is None once it has."""

    call: Call
    number: int
    leaves: list[Any]
    structure: TreeSpec
    kept: Any

    def inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        tensors = iter(self.kept.saved_tensors)
        leaves = [next(tensors) if leaf is _TENSOR else leaf for leaf in self.leaves]
        args, kwargs = tree_unflatten(leaves, self.structure)
        return args, kwargs


_TENSOR = object()


class LayerCalls:
    """Hooks on every trainable layer of `module`, from construction to `remove()`.

    Attacks find its hooks by `hooks_enabled` and switch them off (`defend.attacks.context`).

    Args:
        module: the module to watch.
        receive: gets each `Call` in backward, when the gradient of its output is there.
        repeated: gets a layer that had a gradient before, in an earlier backward over the batch.

    Raises:
        IndistinctRowsError: for layers whose per-record gradients cannot be had.
    """

    def __init__(
        self,
        module: nn.Module,
        receive: Callable[[Call], None],
        repeated: Callable[[nn.Module], None],
    ) -> None:
        self.hooks_enabled = True
        self._receive, self._repeated = receive, repeated
        self._removed = False
        self._anchor = torch.zeros((), requires_grad=True)
        self._handles: list[RemovableHandle] = []
        self.reset()
        layers = trainable_layers(module)
        for m in module.modules():
            if takes_packed(m):
                self._handles.append(m.register_forward_pre_hook(self._note_packing))
                done = m.register_forward_hook(self._forget_packing, always_call=True)
                self._handles.append(done)
        for m in layers:
            if type(m) is nn.Embedding:
                self._handles.append(m.register_forward_pre_hook(self._expand))
            # First in line: what other hooks make of the output is not the layer's doing.
            watch = m.register_forward_hook(self._watch, with_kwargs=True, prepend=True)
            self._handles.append(watch)

    def reset(self) -> None:
        """Start a new batch, of unknown size."""
        self.rows: int | None = None
        self._packing: PackedSequence | None = None
        self._passes = 0
        self._first: int | None = None

    def disable_hooks(self) -> None:
        """Watch nothing until `enable_hooks()`."""
        self.hooks_enabled = False

    def enable_hooks(self) -> None:
        """Watch again."""
        self.hooks_enabled = True

    def remove(self) -> None:
        """Take all hooks away; gradients that are still on their way are dropped."""
        self._removed = True
        self.reset()
        while self._handles:
            self._handles.pop().remove()

    def _note_packing(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Packed sequences are sorted by length: remember which record each row belongs to."""
        self._packing = args[0] if args and isinstance(args[0], PackedSequence) else None

    def _forget_packing(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._packing = None
        for m in module.modules():
            vars(m).pop("max_batch_len", None)  # Opacus leaves it there for hooks of its own

    def _expand(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Position ids `[1, T]`, broadcast over the batch: look them up once for each row."""
        if not self.hooks_enabled or not torch.is_grad_enabled() or self.rows is None:
            return None
        if len(args) != 1 or args[0].ndim < 2 or args[0].shape[0] != 1:
            return None
        return (args[0].expand(self.rows, *args[0].shape[1:]),)

    def _watch(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        if not self.hooks_enabled or not torch.is_grad_enabled():
            return
        if not any(p.requires_grad for p in module.parameters()):
            return
        outputs = tree_leaves(output)
        places = [i for i, t in enumerate(outputs) if isinstance(t, Tensor) and t.requires_grad]
        if not places:
            return
        leaves, structure = tree_flatten((args, kwargs))
        tensors = [t.detach() for t in leaves if isinstance(t, Tensor)]
        kept = _Keep.apply(self._anchor, *tensors).grad_fn
        number = self._count_pass()
        # Of several outputs each has its own part in the gradient, and the parts add up.
        for place in places:
            waiting = _Waiting(
                call=self._call(module, place, outputs[place]),
                number=number,
                leaves=[_TENSOR if isinstance(t, Tensor) else t for t in leaves],
                structure=structure,
                kept=kept,
            )
            outputs[place].register_hook(functools.partial(self._arrive, waiting))

    def _call(self, module: nn.Module, place: int, output: Tensor) -> Call:
        """The call as far as it is known before its gradient."""
        rows, order = self.rows, None
        if self._packing is not None:
            order = self._packing.sorted_indices
            if order is None:
                order = torch.arange(int(self._packing.batch_sizes[0]), device=output.device)
            rows = len(order)
        if rows is None:
            rows = output.shape[0] if output.ndim else 1
        return Call(module, (), {}, place, output.new_empty(0), rows, order, _autocast(output))

    def _count_pass(self) -> int:
        """A forward after a backward is another pass; one inside a backward is a checkpoint's."""
        inside = torch._C._current_graph_task_id() != -1
        if self._first is not None and not inside and self._passes == self._first:
            self._passes += 1
        return self._passes

    def _arrive(self, waiting: _Waiting, gradient: Tensor) -> None:
        """Hook on an output: its gradient is there."""
        if self._removed or not self.hooks_enabled:
            return
        self._first = waiting.number if self._first is None else self._first
        if waiting.kept is None or waiting.number != self._first:
            self._repeated(waiting.call.module)
            return
        try:
            args, kwargs = waiting.inputs()
        except RuntimeError as error:
            if "inplace" not in str(error):
                raise
            raise IndistinctRowsError(
                f"Expected the inputs of {type(waiting.call.module).__name__} unchanged until "
                f"backward, got some that an operation in place wrote to. Use the one that is not."
            ) from error
        waiting.kept = None
        self._receive(
            dataclasses.replace(waiting.call, args=args, kwargs=kwargs, gradient=gradient.detach())
        )


def _autocast(output: Tensor) -> torch.autocast:
    kind = output.device.type
    return torch.autocast(
        kind,
        dtype=torch.get_autocast_dtype(kind),
        enabled=torch.is_autocast_enabled(kind),
        cache_enabled=False,
    )
