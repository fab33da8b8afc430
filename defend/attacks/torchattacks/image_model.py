"""A wrapper of the user's model, for attacks that others wrote: images in, logits out."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from defend.attacks.context import logits_of
from defend.errors import InputError
from defend.threat.inputs import InputSpace


class ImageModel(nn.Module):
    """What an attack gets to see of a model: raw images `[n, C, H, W]` in, float32 logits out.

    The model is no submodule, so that an attack's `.eval()` and `.train()` do not reach it.

    Args:
        logits: raw images → logits, from `raw_logits`.
        device: where the attack is to keep its own tensors.
        retain: whether the attack goes backward through the same logits more than once. Keeping
            the activations for it costs a fifth of the time of a small network.

    *Guarantee.* A backward through the logits ends at the images.
    """

    def __init__(
        self,
        logits: Callable[[Tensor], Tensor],
        device: torch.device,
        *,
        retain: bool = False,
    ) -> None:
        super().__init__()
        self._logits = logits
        self._retain = retain
        # torchattacks takes its device from the first parameter.
        self.anchor = nn.Parameter(torch.empty(0, device=device), requires_grad=False)

    def forward(self, images: Tensor) -> Tensor:
        if torch.is_grad_enabled() and images.requires_grad:
            return _InputGradient.apply(images, self._logits, self._retain)
        return self._logits(images).detach()


class _InputGradient(torch.autograd.Function):
    """Logits that are differentiable in the images alone.

    CW, DeepFool and FAB call `backward()`, which would add to the `.grad` of any parameter on its
    way: of a model that is hidden in a closure, say, whose parameters `no_trace` cannot find.
    """

    @staticmethod
    def forward(
        ctx: Any, images: Tensor, logits_of_images: Callable[[Tensor], Tensor], retain: bool
    ) -> Tensor:
        with torch.enable_grad():
            leaf = images.detach().requires_grad_()
            logits = logits_of_images(leaf)
        # Saved by autograd, which lets go of both, and so of the activations, after a backward.
        ctx.save_for_backward(leaf, logits)
        ctx.retain = retain
        return logits.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        leaf, logits = ctx.saved_tensors
        (grad_images,) = torch.autograd.grad(logits, leaf, grad, retain_graph=ctx.retain)
        return grad_images.contiguous(), None, None  # in the layout of the images


def raw_logits(
    model: Callable[..., Any], like: Tensor, inputs: InputSpace
) -> Callable[[Tensor], Tensor]:
    """Raw images → logits, the model fed as in training: units, dtype, layout, rank, autocast.

    Args:
        model: model(x) gives logits `[n, classes]`, or an object with `logits`.
        like: a batch as the model knows them, `[N, ...]`.
        inputs: from raw units to the model's.

    Returns:
        A function from images `[n, C, H, W]`, on any device and of any n, to new float32 logits on
        that device. The autocast in force now is that of the model later.

    Raises:
        InputError: on call, if the model returns anything but one row of logits a record.
    """
    kind = like.device.type
    dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
    compute = torch.promote_types(like.dtype, torch.float32)
    layout = _layout(like)

    def logits(images: Tensor) -> Tensor:
        x = images.to(like.device)
        x = x if like.ndim == 4 else x.reshape(-1, *like.shape[1:])
        # A copy: a first layer that works in place must not write into the attack's images.
        x = inputs.to_model(x.to(compute)).to(like.dtype).clone(memory_format=layout)
        with torch.autocast(kind, dtype=dtype, enabled=enabled):
            out = logits_of(model(x))
        if out.ndim != 2 or len(out) != len(x):
            raise InputError(
                f"Expected logits of shape [{len(x)}, classes], got {tuple(out.shape)}. Only "
                "classifiers can be attacked with torchattacks."
            )
        # A copy, because Square overwrites them.
        return out.to(images.device, torch.float32, copy=True)

    return logits


def image_shape(x: Tensor) -> tuple[int, int, int]:
    """(C, H, W) under which an attack on images sees a record of x, `[N, ...]`."""
    if x.ndim == 2:
        return 1, 1, x.shape[1]  # columns are pixels, not channels: patches then hold a few
    if x.ndim == 3:
        return x.shape[1], 1, x.shape[2]
    return x.shape[1], x.shape[2], math.prod(x.shape[3:])


def _layout(x: Tensor) -> torch.memory_format:
    by_rank = {4: torch.channels_last, 5: torch.channels_last_3d}
    layout = by_rank.get(x.ndim)
    if layout is None or x.is_contiguous() or not x.is_contiguous(memory_format=layout):
        return torch.contiguous_format
    return layout
