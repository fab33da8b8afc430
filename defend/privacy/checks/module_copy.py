"""A copy of the user's module to try things on, and what may have changed on it."""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset

from defend.errors import PrivacyError
from defend.privacy.gradients.engine import GradientEngine


def copy_of_module(module: nn.Module, share: Sequence[Any] = ()) -> nn.Module:
    """A deep copy of `module` in the same modes.

    Data sets and loaders on it, which may be large, are shared with the original, and so are our
    own hooks: paused there, they are paused on the copy.

    Args:
        module: what to copy.
        share: other objects that it may refer to and that are not to be copied with it.

    Raises:
        PrivacyError: if it cannot be copied.
    """
    modules = list(module.modules())
    shared: list[Any] = [*share]
    shared += [v for m in modules for v in vars(m).values() if isinstance(v, Dataset | DataLoader)]
    for m in modules:
        for hook in (*m._forward_pre_hooks.values(), *m._forward_hooks.values()):
            owner = getattr(hook, "__self__", None)
            if hasattr(owner, "hooks_enabled"):
                shared.append(owner)
    memo: dict[int, Any] = {id(value): value for value in shared}
    for m in modules:
        for leaf in tree_leaves(vars(m)):  # an output that was kept: its graph cannot be copied
            if isinstance(leaf, Tensor) and leaf.grad_fn is not None:
                memo[id(leaf)] = leaf.detach().clone()
        for value in vars(m).values():  # data modules and the like lead to the whole trainer
            if not isinstance(value, nn.Module) and hasattr(value, "trainer"):
                memo[id(value)] = value
    try:
        # A TorchScript module is copied by operations, through which gradients would flow back.
        with torch.no_grad():
            found = copy.deepcopy(module, memo)
        for mine, theirs in zip(found.parameters(), module.parameters(), strict=True):
            mine.requires_grad_(theirs.requires_grad)
        return found
    except Exception as error:
        raise PrivacyError(
            "Expected a module that can be copied for the self-test, got "
            f"{type(error).__name__}: {error}. Keep open files, locks and the like out of the "
            "module, or pass selftest=False and answer for the step yourself."
        ) from error


def tensors_by_name(module: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers, by name."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


@torch.no_grad()
def restore(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Put parameters and buffers back, and forget gradients."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if name in state:
            tensor.data.copy_(state[name])
        tensor.grad = None


def same(one: Tensor, other: Tensor) -> bool:
    """Equal in every value; NaN equals NaN."""
    if one.shape != other.shape:
        return False
    return torch.equal(one, other) or torch.equal(one.nan_to_num(), other.nan_to_num())


def trace(
    module: nn.Module, devices: Sequence[torch.device], engine: GradientEngine
) -> dict[str, list[Any]]:
    """All that an attack might leave behind."""
    return {
        "per-record gradient": [engine.holds_any],
        "gradient": [p.grad for p in module.parameters()],
        "requires_grad": [p.requires_grad for p in module.parameters()],
        "training mode": [m.training for m in module.modules()],
        "weight or buffer": list(tensors_by_name(module).values()),
        "random state": [torch.get_rng_state()]
        + [torch.cuda.get_rng_state(d) for d in devices if d.type == "cuda"],
    }


def changed(before: dict[str, list[Any]], after: dict[str, list[Any]]) -> str | None:
    """The first thing that two traces differ in; None if they are the same."""

    def alike(a: Any, b: Any) -> bool:
        both = isinstance(a, Tensor) and isinstance(b, Tensor)
        return same(a, b) if both else a is b or (type(a) is type(b) is bool and a == b)

    for name, values in before.items():
        if len(values) != len(after[name]) or not all(map(alike, values, after[name])):
            return name
    return None


def rows_differ(one: Any, other: Any, rows: int, first: int = 1) -> bool:
    """Whether any tensor of two batches differs in its rows after the `first` ones."""

    def differ(a: Tensor, b: Tensor) -> bool:
        return not torch.allclose(a[first:], b[first:], atol=1e-5)

    return any(
        a.shape == b.shape and len(a) == rows and differ(a, b)
        for a, b in zip(tensors_of(one), tensors_of(other), strict=False)
        if a.ndim and b.ndim
    )


def tensors_of(batch: Any) -> Iterator[Tensor]:
    """Every tensor in a batch, in whatever containers."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, dict):
        for value in batch.values():
            yield from tensors_of(value)
    elif isinstance(batch, list | tuple):
        for value in batch:
            yield from tensors_of(value)
    elif hasattr(batch, "__dict__"):
        yield from tensors_of(vars(batch))
