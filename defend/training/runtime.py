"""What each kind of loop does in its own way: plain PyTorch, DistributedDataParallel, Fabric.

A Lightning Trainer has its own, `defend.callbacks._runtime.TrainerRuntime`.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from defend.batching.records import RecordBatches
from defend.errors import InputError
from defend.privacy.checks.setup import kind_of_strategy
from defend.privacy.mechanism.randomness import Randomness
from defend.training.processes import Processes

Loss = Callable[[nn.Module, Any], Tensor]
Context = contextlib.AbstractContextManager[Any]


class Runtime(Protocol):
    """What a step asks of the loop that it runs in."""

    @property
    def module(self) -> nn.Module:
        """The model itself, not wrapped."""

    @property
    def on_copy(self) -> bool:
        """Whether the step is only tried out, on a copy of the module."""

    def user_code(self) -> list[Any]:
        """Objects of the user's, beside module and data set, whose code runs in a step."""

    def autocast(self) -> Context:
        """What forwards of attacks and objectives run under."""

    def attack_context(self, device: torch.device) -> Context:
        """What an attack runs under."""

    def convert(self, x: Tensor) -> Tensor:
        """Inputs in the dtype that the model takes; itself if they are."""

    def to_device(self, batch: Any) -> Any:
        """A batch where the model is, after the hooks of its transfer."""

    def forward(self, batch: Any) -> Any:
        """What the user's own training step returns for a batch: a loss, or what holds it."""

    def forward_on(self, module: nn.Module, batch: Any) -> Any:
        """The same on a copy of the module."""

    def restart_on(self, module: nn.Module) -> None:
        """A trial on a copy of the module begins."""

    def prepare_on(self, module: nn.Module, batch: Any) -> Any:
        """A batch from the loader as the step gets it, after all hooks; on a copy of the module."""

    def transfer_on(self, module: nn.Module, batch: Any) -> Any:
        """The batch of one record as the step gets it, where each has one of its own."""

    def finish_on(self, module: nn.Module, batch: Any) -> None:
        """What the loop runs after the step on a batch; on a copy of the module."""

    def reads_clock(self) -> bool:
        """Whether the step on a copy asked for its number or its epoch."""

    def silenced(self) -> Context:
        """Inside, what a copy of the module logs goes nowhere."""

    def drop_gradients(self, module: nn.Module) -> None:
        """What the loop does, before the backward, with gradients that the forward left."""

    def backward(self, loss: Tensor) -> None:
        """Gradients of a loss."""

    def epochs(self) -> float:
        """Epochs trained so far, the step that begins included."""

    def generator(self, device: torch.device) -> torch.Generator:
        """Random numbers for the attack on this batch, where the run is not private."""


class CopyRuntime:
    """Tries a step out on a copy of the module: at full strength, with a plain backward.

    Args:
        runtime: of the training; does all the rest.
        module: the copy.
    """

    on_copy = True

    def __init__(self, runtime: Runtime, module: nn.Module) -> None:
        self._runtime, self.module = runtime, module

    def __getattr__(self, name: str) -> Any:  # all that it does not do in its own way
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._runtime, name)

    def attack_context(self, device: torch.device) -> Context:
        return self._runtime.autocast()

    def forward(self, batch: Any) -> Any:
        return self._runtime.forward_on(self.module, batch)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def epochs(self) -> float:
        return math.inf


class PlainRuntime:
    """A loop in plain PyTorch, under DistributedDataParallel or not.

    Args:
        model: the user's, as DistributedDataParallel or nobody wrapped it.
        loss: (model, batch) → the mean loss over the rows of the batch.
        processes: this process among all; None for those of `torch.distributed`.

    Attributes:
        model: as it was given; what a training forward goes through.
        module: the model itself.
        ddp: the DistributedDataParallel around it, if there is one.
        device: where its parameters are.
        processes: this process among all.
        batches: batches begun so far.
        steps_per_epoch: batches in an epoch; None where that is not known.
        randomness: source of random starts where the run is not private.

    Raises:
        InputError: if Fabric wrapped the model, or if there are several processes and nothing that
            keeps their weights equal.
    """

    on_copy = False
    half = False
    precision: Any = "32-true"
    strategy: str | None = None

    def __init__(self, model: nn.Module, loss: Loss, processes: Processes | None = None) -> None:
        self.model, self._loss = model, loss
        if hasattr(model, "_forward_module"):
            raise InputError(
                "Expected a model that `fabric.setup` gave and that `fabric`, or neither, got only "
                "the model. Pass both."
            )
        self.ddp = model if isinstance(model, DistributedDataParallel) else None
        self.module: nn.Module = model if self.ddp is None else self.ddp.module
        self.processes = _equal_processes(processes or Processes.current(), self.ddp)
        self.device = next(self.module.parameters()).device
        self.batches = 0
        self.steps_per_epoch: int | None = None
        self.randomness = Randomness()

    def user_code(self) -> list[Any]:
        return [self._loss]

    def autocast(self) -> Context:
        """Nothing: a `torch.autocast` of the user's own stays in force."""
        return contextlib.nullcontext()

    def attack_context(self, device: torch.device) -> Context:
        return self.autocast()

    def convert(self, x: Tensor) -> Tensor:
        return x

    def to_device(self, batch: Any) -> Any:
        """A batch where the model is."""
        return _moved(batch, self.device)

    def forward(self, batch: Any) -> Tensor:
        return self.forward_on(self.model, batch)

    def restart_on(self, module: nn.Module) -> None:
        """No hooks, so nothing to be done."""

    def prepare_on(self, module: nn.Module, batch: Any) -> Any:
        return batch if isinstance(batch, RecordBatches) else self.to_device(batch)

    def transfer_on(self, module: nn.Module, batch: Any) -> Any:
        return self.to_device(batch)

    def finish_on(self, module: nn.Module, batch: Any) -> None:
        """No hooks, so nothing to be done."""

    def forward_on(self, module: nn.Module, batch: Any) -> Tensor:
        with self.autocast():
            return _one_number(self._loss(module, batch))

    def reads_clock(self) -> bool:
        return False  # who counts steps keeps a count, which shows

    def silenced(self) -> Context:
        return contextlib.nullcontext()

    def drop_gradients(self, module: nn.Module) -> None:
        """Nothing: who sets them to zero before the loss adds a backward within it."""

    def backward(self, loss: Tensor) -> None:
        # PyTorch wants no autocast around a backward, and the user's may be in force.
        with torch.autocast(self.device.type, enabled=False):
            loss.backward()

    def epochs(self) -> float:
        return math.inf if self.steps_per_epoch is None else self.batches / self.steps_per_epoch

    def generator(self, device: torch.device) -> torch.Generator:
        rank = self.processes.rank
        return self.randomness.generator("attack", self.batches - 1, device, rank=rank)


class FabricRuntime(PlainRuntime):
    """A loop under Fabric: its autocast, its backward, its devices.

    Args:
        model: what `fabric.setup` gave.
        loss: (model, batch) → the mean loss over the rows of the batch.
        fabric: the Fabric that wrapped it.

    Raises:
        InputError: if the model is not Fabric's, and as in `PlainRuntime`.
    """

    def __init__(self, model: nn.Module, loss: Loss, fabric: Any) -> None:
        inner = getattr(model, "_forward_module", None)  # of Fabric's wrapper
        if inner is None:
            raise InputError(
                "Expected a model that `fabric.setup` gave and that `fabric`, or neither, got only "
                "`fabric`. Pass both."
            )
        super().__init__(
            inner, loss, Processes(fabric.global_rank, fabric.world_size, fabric.broadcast)
        )
        self.model, self._fabric = model, fabric
        self.precision = getattr(fabric.strategy.precision, "precision", "32-true")
        self.half = "mixed" in str(self.precision)
        self.strategy = kind_of_strategy(type(fabric.strategy))

    def autocast(self) -> Context:
        return self._fabric.autocast()

    def convert(self, x: Tensor) -> Tensor:
        return self._fabric.strategy.precision.convert_input(x)

    def to_device(self, batch: Any) -> Any:
        return self._fabric.to_device(batch)

    def backward(self, loss: Tensor) -> None:
        self._fabric.backward(loss)


def runtime_of(model: nn.Module, loss: Loss, fabric: Any) -> PlainRuntime:
    """The runtime of a loop of the user's own.

    Raises:
        InputError: if Fabric's model comes without `fabric` or the other way round, or if there
            are several processes and nothing that keeps their weights equal.
    """
    return PlainRuntime(model, loss) if fabric is None else FabricRuntime(model, loss, fabric)


def _equal_processes(processes: Processes, ddp: DistributedDataParallel | None) -> Processes:
    if processes.world_size > 1 and ddp is None:
        raise InputError(
            "Expected a model in DistributedDataParallel under several processes, got one "
            "whose weights may differ between them. Wrap it, or let Fabric's 'ddp' do it."
        )
    return processes


def _one_number(found: Any) -> Tensor:
    if not isinstance(found, Tensor) or found.ndim != 0:
        raise InputError(
            f"Expected `loss` to return the mean over the rows as one number, got {found!r}. "
            "Take the mean, and return the tensor."
        )
    return found


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
