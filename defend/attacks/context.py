"""What an attack must leave untouched, whatever happens inside it."""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def _per_record_recorders(modules: list[nn.Module]) -> list[Any]:
    """Owners of forward hooks that can be switched off: Opacus' per-record gradient hooks.

    Found by shape (`hooks_enabled`, `disable_hooks`), not by type, so that attacks need not know
    about privacy and hooks that a user installed with Opacus are respected too.
    """
    owners = {}
    for module in modules:
        for hook in module._forward_hooks.values():
            owner = getattr(hook, "__self__", None)
            if hasattr(owner, "hooks_enabled") and hasattr(owner, "disable_hooks"):
                owners[id(owner)] = owner
    return list(owners.values())


def module_of(model: Callable[..., Any]) -> nn.Module | None:
    """The module behind a callable: itself, or the one that a method or partial belongs to."""
    while isinstance(model, functools.partial):
        model = model.func
    model = getattr(model, "__self__", model)
    return model if isinstance(model, nn.Module) else None


@contextmanager
def no_trace(
    model: Callable[..., Any], device: torch.device, *, freeze: bool = True
) -> Iterator[None]:
    """Run an attack on `model`: eval mode, parameters frozen, autograd on, nothing left behind.

    Inside: every submodule is in eval mode, so BatchNorm statistics stand still and one record
    cannot reach another; no parameter requires a gradient, so none is computed and nothing kept
    for it; per-record hooks are off, so DP-SGD does not count the record twice; autograd works
    even under `no_grad` and `inference_mode`. On leaving, also by an exception, all of it is as it
    was: `.training` of each submodule on its own, `requires_grad`, every `.grad`, the per-record
    hooks and the global RNG of the CPU and of `device`. Not for two threads on one model: the
    second would find it in eval mode, and the first would take that away.

    Args:
        model: what is attacked: a module, a method of one or a `functools.partial` of these. What
            another callable leaves behind is its own affair.
        device: where it runs.
        freeze: whether parameters require no gradient inside. Autocast keeps the casts of only
            those that do, and casts the others anew in every forward. An attack that asks
            `torch.autograd.grad` for the gradient of its input alone computes no others anyway,
            but for a compiled model, which is frozen in any case.
    """
    module = module_of(model)
    modules = [] if module is None else list(module.modules())
    parameters = [] if module is None else list(module.parameters())
    modes = [(m, m.training) for m in modules]
    frozen = freeze or any(_is_compiled(m) for m in modules)
    trainable = [(p, p.requires_grad) for p in parameters]
    recorders = [r for r in _per_record_recorders(modules) if r.hooks_enabled]
    with ExitStack() as stack:
        if device.type == "cuda" and any(isinstance(m, nn.RNNBase) for m in modules):
            # cuDNN has no backward for recurrent layers in eval mode.
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(
            torch.random.fork_rng([device] if device.type == "cuda" else [], device_type="cuda")
        )
        try:
            for module in modules:
                # Not `.eval()`: it recurses, and users override `.train()`.
                module.training = False
            for parameter, required in trainable:
                if required and frozen:
                    parameter.requires_grad_(False)
            for recorder in recorders:
                recorder.disable_hooks()
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            for parameter, required in trainable:
                if parameter.requires_grad != required:
                    parameter.requires_grad_(required)
            for recorder in recorders:
                recorder.enable_hooks()


@contextmanager
def untouched(model: Callable[..., Any], device: torch.device) -> Iterator[None]:
    """`no_trace`, for code that may change buffers and gradients itself."""
    module = module_of(model)
    parameters = [] if module is None else list(module.parameters())
    buffers = [] if module is None else list(module.buffers())
    grads = [(p, p.grad) for p in parameters]
    values = [(b, b.clone()) for b in buffers if not b.is_inference()]
    try:
        for p in parameters:
            p.grad = None  # out of reach: `zero_grad` may write to it
        with no_trace(model, device):
            yield
    finally:
        for p, grad in grads:
            p.grad = grad
        with torch.no_grad():
            for b, value in values:
                # By value: the statistics of a batch norm move without a new `_version`.
                if not torch.equal(b, value):
                    b.copy_(value)


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or module._compiled_call_impl is not None


def logits_of(output: Any) -> Tensor:
    """The logits in a model's output: the tensor itself, or its `logits` (Hugging Face, dicts)."""
    if isinstance(output, Tensor):
        return output
    logits = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    raise TypeError(
        "Expected the model's forward to return a tensor of logits, or an object with `logits`, "
        f"got {type(output).__name__}. Wrap the model so that forward(x) returns the logits."
    )
