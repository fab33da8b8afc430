"""The gradient of each record in one call of one layer: a rule for each kind of layer.

With xᵢ the input row of record i, f the layer and bᵢ the gradient of the loss in its output row,

    gᵢ = ∂⟨f(θ, xᵢ), bᵢ⟩ / ∂θ

with ⟨y, b⟩ = Re Σ y b̄ where the output is complex, as autograd has it. Weights are real.

A kind of layer has its rule here, registered by `@rule(kind)`, or Opacus' formula
(`opacus.grad_sample`). A rule serves a layer only where it is right for the layer's settings. All
others are computed by `torch.func`, record by record in one batch: that is right for any layer that
treats rows alone, children included, and slower.

To add the rule of a layer, write a function beside `_embedding_bag` below, and put the layer into
`tests/privacy/gradients/layer_table.py`, which compares it with each record alone.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from defend.errors import IndistinctRowsError, PrivacyError

Gradients = dict[Tensor, Tensor]  # by parameter
Rule = Callable[[Any, tuple[Any, ...], Mapping[str, Any], Tensor], Gradients | None]
"""(layer, args, kwargs, b) → gᵢ, or None for a call that the rule does not cover."""

_RULES: dict[type[nn.Module], tuple[Rule, Callable[[Any], bool] | None]] = {}


def rule(
    *kinds: type[nn.Module], where: Callable[[Any], bool] | None = None
) -> Callable[[Rule], Rule]:
    """Register a function as the rule for layers of exactly these types.

    Args:
        kinds: types of layers; a subclass is another type.
        where: which layers of these types it is right for; None for all.
    """

    def register(function: Rule) -> Rule:
        _RULES.update(dict.fromkeys(kinds, (function, where)))
        return function

    return register


def rule_of(layer: nn.Module) -> Rule | None:
    """The rule that is right for this very layer; None where `torch.func` has to serve."""
    from opacus.grad_sample import GradSampleHooks

    if "forward" in vars(layer):  # replaced on the instance
        return None
    if type(layer) in _RULES:
        function, where = _RULES[type(layer)]
        return function if where is None or where(layer) else None
    return _opacus if type(layer) in GradSampleHooks.GRAD_SAMPLERS else None


def trainable_layers(module: nn.Module) -> list[nn.Module]:
    """The modules to watch: each that has trainable parameters of its own.

    What lies below a module without a rule is part of it, and not listed again.

    Raises:
        IndistinctRowsError: for layers whose per-record gradients cannot be had.
    """
    for m in module.modules():
        _refuse_positions_first(m)
    if any(p.is_complex() and p.requires_grad for p in module.parameters()):
        raise IndistinctRowsError(
            "Expected trainable weights that are real numbers, got complex ones. Keep the real and "
            "the imaginary part as two parameters, and put them together in forward: "
            "torch.complex(self.real, self.imag)."
        )
    found = list(_walk(module))
    inside = {c for m in found if rule_of(m) is None for c in m.modules() if c is not m}
    return [m for m in dict.fromkeys(found) if m not in inside]


class Buffers:
    """The buffers of a layer that `torch.func` computes again: they have to be the same then.

    Args:
        layer: the module, children included.
    """

    def __init__(self, layer: nn.Module) -> None:
        self._layer = layer
        self._state = self._now()

    def require_same(self) -> None:
        """Refuse buffers that were written to since.

        Raises:
            IndistinctRowsError: names one.
        """
        now = self._now()
        if now != self._state:
            changed = [n for n in {**now, **self._state} if now.get(n) != self._state.get(n)]
            raise IndistinctRowsError(
                f"Expected buffers of {type(self._layer).__name__}, which has parameters of its "
                f"own, to stay as they are in forward and backward, got a changed `{changed[0]}`. "
                "Put the parameters into a small module without it, or freeze them."
            )

    def _now(self) -> dict[str, tuple[int, int]]:
        named = self._layer.named_buffers()
        return {n: (id(b), 0 if b.is_inference() else b._version) for n, b in named}


# Modules that are never called: what they hold is used by the one that has them.
_HOLDERS = (nn.ParameterList, nn.ParameterDict, nn.ModuleList, nn.ModuleDict)


def _own_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters that the module's own forward uses, as far as its structure tells."""
    yield from module.parameters(recurse=False)
    for child in module.children():
        if type(child) in _HOLDERS:
            yield from _own_parameters(child)


def _walk(module: nn.Module) -> Iterator[nn.Module]:
    own = any(p.requires_grad for p in _own_parameters(module))
    own = own and not takes_packed(module)  # its parameters are its cells', by other names
    if own or is_parametrized(module):
        if any(p.requires_grad for p in module.parameters()):
            yield module
        if rule_of(module) is None:
            return
    for child in module.children():
        yield from _walk(child)


def _refuse_positions_first(module: nn.Module) -> None:
    """Attention layers of Opacus that hand positions, not records, first to their inner layers."""
    from opacus.layers import DPMultiheadAttention

    if isinstance(module, DPMultiheadAttention) and not module.batch_first:
        raise IndistinctRowsError(
            "Expected records in the first dimension, got DPMultiheadAttention with "
            "batch_first=False: its inner layers take positions for records. Set batch_first=True."
        )
    if isinstance(module, DPMultiheadAttention) and module.add_bias_kv:
        raise IndistinctRowsError(
            "Expected layers whose per-record gradients can be computed, got "
            "DPMultiheadAttention with add_bias_kv=True. Set add_bias_kv=False."
        )


def takes_packed(module: nn.Module) -> bool:
    """Whether `module` is a recurrent layer, whose cells see the rows of a packed sequence."""
    from opacus.layers.dp_rnn import DPRNNBase

    return isinstance(module, DPRNNBase)


def gradients_of(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    gradient: Tensor,
    *,
    place: int = 0,
    autocast: AbstractContextManager[Any] | None = None,
) -> Gradients:
    """gᵢ for the trainable parameters of `module`, each `[rows, *shape]`.

    Args:
        module: the layer.
        args: positional inputs of the call, rows first.
        kwargs: inputs by name.
        gradient: b, the gradient of the loss in the layer's output, `[rows, ...]`.
        place: which tensor of the output `gradient` belongs to.
        autocast: the settings that the call ran under; None for full precision.

    Raises:
        IndistinctRowsError: if the gradients of the rows cannot be told apart.
    """
    try:
        known = rule_of(module)
        found = None if known is None else known(module, args, kwargs, gradient)
        if found is None:
            return _by_row(module, args, kwargs, gradient, place, autocast or nullcontext())
        return found
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        if isinstance(error, PrivacyError):
            raise
        raise IndistinctRowsError(
            f"Expected {type(module).__name__}, which has parameters of its own, to run on one "
            f"record at a time under torch.func, got {type(error).__name__}. Dropout and branches "
            "on the data cannot be computed again there: keep them out of modules with parameters "
            "of their own, or freeze its parameters."
        ) from error


def _fits(tensor: Any, gradient: Tensor) -> bool:
    """Whether an input has a row for each row of the output."""
    return (
        isinstance(tensor, Tensor)
        and tensor.ndim > 0
        and gradient.ndim > 0
        and tensor.shape[0] == gradient.shape[0]
    )


class _Forward(nn.Module):
    """`module.forward` alone, without the hooks on the module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.forward(*args, **kwargs)


def _by_row(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    gradient: Tensor,
    place: int,
    autocast: AbstractContextManager[Any],
) -> Gradients:
    """The formula at the top, differentiated by torch.func for all rows at once."""
    inputs, structure = tree_flatten((args, dict(kwargs)))
    batched = [_fits(t, gradient) for t in inputs]
    shared = [t for t, own in zip(inputs, batched, strict=True) if not own]
    if not any(batched) or any(
        isinstance(t, Tensor) and t.ndim > 0 and t.shape[0] != 1 for t in shared
    ):
        raise IndistinctRowsError(
            f"Expected one row a record in every input of {type(module).__name__}, got shapes "
            f"{[tuple(t.shape) for t in inputs if isinstance(t, Tensor)]} for an output "
            f"{tuple(gradient.shape)}. Give it records in the first dimension, and what all "
            "records share with a first dimension of 1."
        )
    forward = _Forward(module)

    def product(values: dict[str, Tensor], rows: list[Tensor], b: Tensor) -> Tensor:
        row = iter(rows)
        leaves = [
            next(row).unsqueeze(0) if own else t for t, own in zip(inputs, batched, strict=True)
        ]
        own_args, own_kwargs = tree_unflatten(leaves, structure)
        with autocast:
            output = functional_call(forward, values, own_args, own_kwargs)
        return (tree_leaves(output)[place] * b.unsqueeze(0).conj()).real.sum()

    parameters = {f"module.{n}": p for n, p in module.named_parameters() if p.requires_grad}
    values = {n: p.detach() for n, p in parameters.items()}
    rows = [t for t, own in zip(inputs, batched, strict=True) if own]
    found = vmap(grad(product), in_dims=(None, 0, 0))(values, rows, gradient)
    return {p: found[n] for n, p in parameters.items()}


@rule(nn.LayerNorm, where=lambda layer: layer.bias is not None)
@rule(nn.Conv1d, nn.Conv2d, nn.Conv3d, where=lambda layer: layer.padding_mode == "zeros")
def _opacus(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], gradient: Tensor
) -> Gradients | None:
    """Opacus' formula, for a call on one tensor with a row for each row of the output."""
    from opacus.grad_sample import GradSampleHooks

    if len(args) != 1 or kwargs or not _fits(args[0], gradient):
        return None
    with torch.no_grad(), torch.autocast(gradient.device.type, enabled=False):
        formula = GradSampleHooks.GRAD_SAMPLERS[type(module)]
        # Opacus' formulas for convolutions assume contiguous tensors.
        inputs = [args[0].contiguous()]
        found: Gradients = formula(module, inputs, gradient.contiguous())
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        found[module.weight][:, module.padding_idx] = 0  # as autograd does
    return found


@rule(nn.EmbeddingBag)
def _embedding_bag(
    module: nn.EmbeddingBag, args: tuple[Any, ...], kwargs: Mapping[str, Any], gradient: Tensor
) -> Gradients:
    """`_of_bags`, with inputs by place or by name, as the layer itself takes them."""
    return _of_bags(module, *args, gradient=gradient, **kwargs)


def _of_bags(
    module: nn.EmbeddingBag,
    input: Tensor,
    offsets: Tensor | None = None,
    per_sample_weights: Tensor | None = None,
    *,
    gradient: Tensor,
) -> Gradients:
    """gᵢ adds bᵢ, divided by the size of the bag if it is a mean, at each id in bag i."""
    if module.mode == "max" or (input.ndim == 1 and offsets is None):
        raise IndistinctRowsError(
            f"Expected EmbeddingBag with mode 'sum' or 'mean' and offsets, got {module.mode!r}. "
            "Use another mode, or nn.Embedding."
        )
    rows, ids = gradient.shape[0], input.flatten()
    if offsets is None:
        bag = torch.arange(rows, device=ids.device).repeat_interleave(input.shape[1])
    else:
        places = torch.arange(len(ids), device=ids.device)
        bag = torch.bucketize(places, offsets[:rows], right=True) - 1
    weight = torch.ones_like(ids, dtype=gradient.dtype)
    if module.padding_idx is not None:
        weight = weight * (ids != module.padding_idx)
    if per_sample_weights is not None:
        weight = weight * per_sample_weights.flatten()
    if module.mode == "mean":
        size = weight.new_zeros(rows).index_add_(0, bag, weight)
        weight = weight / size.clamp_min(1)[bag]
    found = gradient.new_zeros((rows, *module.weight.shape))
    found.index_put_((bag, ids), gradient[bag] * weight.unsqueeze(1), accumulate=True)
    return {module.weight: found}
