"""Who drives a loop of your own: plain PyTorch, torchrun or Fabric."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from defend.errors import InputError
from defend.training.processes import Processes

Loss = Callable[[nn.Module, Any], Tensor]


class Host:
    """The model as it was wrapped, and what is done differently in each kind of loop.

    Args:
        model: the user's, as `fabric.setup`, DistributedDataParallel or nobody wrapped it.
        fabric: the Fabric that wrapped it, or None.

    Attributes:
        model: as it was given; what a training forward goes through.
        bare: the model itself.
        ddp: the DistributedDataParallel around it, if there is one.
        device: where its parameters are.
        processes: this process among all.

    Raises:
        InputError: if Fabric's model comes without `fabric` or the other way round, or if there
            are several processes and nothing that keeps their weights equal.
    """

    def __init__(self, model: nn.Module, fabric: Any = None) -> None:
        self.model, self.fabric = model, fabric
        self.bare, self.ddp = _unwrap(model, fabric)
        if fabric is None:
            self.processes = Processes.current()
        else:
            self.processes = Processes(fabric.global_rank, fabric.world_size, fabric.broadcast)
        if self.processes.world_size > 1 and self.ddp is None:
            raise InputError(
                "Expected a model in DistributedDataParallel under several processes, got one "
                "whose weights may differ between them. Wrap it, or let Fabric's 'ddp' do it."
            )
        self.device = next(self.bare.parameters()).device

    @property
    def precision(self) -> Any:
        """Fabric's name for its precision, such as "bf16-mixed"."""
        if self.fabric is None:
            return "32-true"
        return getattr(self.fabric.strategy.precision, "precision", "32-true")

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """What forwards run under; a `torch.autocast` of the user's own stays in force."""
        return contextlib.nullcontext() if self.fabric is None else self.fabric.autocast()

    def mean_loss(self, loss: Loss, model: nn.Module, batch: Any) -> Tensor:
        """The user's loss of a batch.

        Raises:
            InputError: if it is not one number.
        """
        with self.autocast():
            found = loss(model, batch)
        if not isinstance(found, Tensor) or found.ndim != 0:
            raise InputError(
                f"Expected `loss` to return the mean over the rows as one number, got {found!r}. "
                "Take the mean, and return the tensor."
            )
        return found

    def backward(self, loss: Tensor) -> None:
        """Gradients of a loss."""
        if self.fabric is not None:
            self.fabric.backward(loss)
            return
        # PyTorch wants no autocast around a backward, and the user's may be in force.
        with torch.autocast(self.device.type, enabled=False):
            loss.backward()

    def to_device(self, batch: Any) -> Any:
        """A batch where the model is."""
        if self.fabric is not None:
            return self.fabric.to_device(batch)
        return _moved(batch, self.device)

    def as_model_takes(self, x: Tensor) -> Tensor:
        """Inputs in the dtype that Fabric's wrapper hands to the model; itself if they are."""
        return x if self.fabric is None else self.fabric.strategy.precision.convert_input(x)


def _unwrap(model: nn.Module, fabric: Any) -> tuple[nn.Module, DistributedDataParallel | None]:
    inner = getattr(model, "_forward_module", None)  # of Fabric's wrapper
    if (inner is None) != (fabric is None):
        raise InputError(
            "Expected a model that `fabric.setup` gave and that `fabric`, or neither, got only "
            f"{'the model' if fabric is None else '`fabric`'}. Pass both."
        )
    inner = model if inner is None else inner
    if isinstance(inner, DistributedDataParallel):
        return inner.module, inner
    return inner, None


def _moved(batch: Any, device: torch.device) -> Any:
    if hasattr(batch, "to"):  # tensors, and batches that know how
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _moved(value, device) for key, value in batch.items()}
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        fields = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch) if f.init}
        moved = {name: _moved(value, device) for name, value in fields.items()}
        return dataclasses.replace(batch, **moved)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_moved(value, device) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(_moved(value, device) for value in batch)
    return batch
