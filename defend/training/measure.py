"""The memory of a private step, measured on the GPU it will run on."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from defend.batching import memory
from defend.privacy.checks.module_copy import copy_for_probe
from defend.privacy.checks.probed_step import Backward, Loss
from defend.privacy.gradients.per_record import PerRecordGradients
from defend.privacy.mechanism.gaussian import clip_and_sum


def step_on(
    module: nn.Module,
    loss: Loss,
    batch: Any,
    rows: int,
    *,
    views: int = 1,
    backward: Backward = Tensor.backward,
    share: Sequence[Any] = (),
) -> None:
    """Forward, backward and clip on a batch, on a copy of the module; nothing is kept."""
    copy = copy_for_probe(module, share)
    per_record = PerRecordGradients(copy, views=views, loss_reduction="sum")
    try:
        per_record.expect(rows)
        with torch.enable_grad():
            backward(loss(copy, batch) * rows)
        clip_and_sum(per_record.read(rows), 1.0)
    finally:
        per_record.remove()


def peak_bytes(module: nn.Module, loss: Loss, batch: Any, rows: int, **settings: Any) -> int:
    """Most bytes that a private step on a batch allocates above what is there now."""
    device = next(module.parameters()).device
    with torch.random.fork_rng([device], device_type="cuda"):
        return memory.peak_bytes(lambda: step_on(module, loss, batch, rows, **settings), device)
