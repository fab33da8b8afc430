"""What a training step returned: a loss, or a mapping that holds one."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from defend.errors import PrivacyError


def loss_of(output: Any) -> Tensor:
    """The loss in what a private training step returned.

    Raises:
        PrivacyError: if there is none.
    """
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor):
        raise PrivacyError(
            f"Expected `training_step` to return a loss for every batch, got {loss!r}. Skipping "
            "a batch because of one record would reveal that record."
        )
    return loss


def mean_of(outputs: Iterable[Any]) -> Any:
    """What the step returned for one record after another: the last output, with the mean loss.

    Args:
        outputs: detached; those of records that it skipped are None.
    """
    last, total, count = None, torch.zeros(()), 0
    for output in outputs:  # none but the last is kept
        count += 1
        if output is not None:
            last, total = output, total + loss_of(output).sum().to(total.device).float()
    loss = total / max(count, 1)
    return {**last, "loss": loss} if isinstance(last, Mapping) else loss


def with_penalty(output: Any, penalty: Tensor) -> Any:
    """What a training step returned, the penalty added to its loss."""
    if not isinstance(output, Mapping):
        return output + penalty
    if output.get("loss") is None:
        return output  # Lightning says what is missing
    return {**output, "loss": output["loss"] + penalty}


def without_graph(output: Any) -> Any:
    """What a training step returned, its loss detached: backward is done."""
    if isinstance(output, Mapping):
        return {**output, "loss": output["loss"].detach()}
    return output.detach()
