"""What the loop of a Trainer does in its own way."""

from __future__ import annotations

import dis
import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from defend.batching.records import RecordBatches
from defend.callbacks._hooks import UsersHooks, users_callbacks
from defend.callbacks._lightning import is_module, silent_logger, takes_batch_idx
from defend.training.outputs import without_graph
from defend.training.runtime import Context

if TYPE_CHECKING:
    import lightning.pytorch as pl


class TrainerRuntime:
    """The loop of a Trainer (`defend.training.runtime.Runtime`).

    Args:
        trainer: the Trainer, in its fit.
        users_step: batch → what the module's `training_step` returns, through the strategy.
        backward: the strategy's own: (loss, optimizer) → None.
        timed: device → what counts the seconds of attacks.
        generator: device → random numbers for this batch; None without an adversary.
    """

    on_copy = False

    def __init__(
        self,
        trainer: pl.Trainer,
        users_step: Callable[[Any], Any],
        backward: Callable[..., Any],
        timed: Callable[..., Context],
        generator: Callable[[torch.device], torch.Generator] | None,
    ) -> None:
        self._trainer, self._users_step, self._backward = trainer, users_step, backward
        self._timed, self._generator = timed, generator
        self.hooks = UsersHooks(trainer)
        self._output: Any = None  # of the last step on a copy

    @property
    def module(self) -> nn.Module:
        return self._trainer.lightning_module

    @property
    def half(self) -> bool:
        """Whether the step computes in half precision."""
        return self._trainer.precision == "bf16-mixed"

    def user_code(self) -> list[Any]:
        trainer = self._trainer
        return [getattr(trainer, "datamodule", None), *users_callbacks(trainer)]

    def autocast(self) -> Context:
        return self._trainer.precision_plugin.forward_context()

    def attack_context(self, device: torch.device) -> Context:
        stack = ExitStack()
        stack.enter_context(self._timed(device))
        stack.enter_context(self.autocast())
        return stack

    def convert(self, x: Tensor) -> Tensor:
        return x  # the Trainer has done so

    def forward(self, batch: Any) -> Any:
        return self._users_step(batch)

    def forward_on(self, module: nn.Module, batch: Any) -> Any:
        """The `training_step` of a copy of the module."""
        with self._at_work(module) as copy, self._trainer.precision_plugin.train_step_context():
            takes_index = takes_batch_idx(self._trainer, copy.training_step)
            clock = self.hooks.trial(module).clock
            clock.asked |= takes_index and _uses(copy.training_step, "batch_idx")
            output = copy.training_step(batch, *([clock.batch_idx] if takes_index else []))
        tensor = isinstance(output, Tensor) or (isinstance(output, dict) and "loss" in output)
        self._output = without_graph(output) if tensor else None
        return output

    def restart_on(self, module: nn.Module) -> None:
        """A trial on a copy of the module begins."""
        self.hooks.restart(module)
        self._output = None

    def to_device(self, batch: Any) -> Any:
        return _transferred(self._trainer, batch)

    def prepare_on(self, module: nn.Module, batch: Any) -> Any:
        """A batch on the device, through all batch hooks, on a copy of the module."""
        with self._at_work(module) as copy:
            batch = copy.trainer.strategy.precision_plugin.convert_input(batch)
            if not isinstance(batch, RecordBatches):
                batch = _transferred(copy.trainer, batch)
            self.hooks.run_before(module, batch)
        return batch

    def transfer_on(self, module: nn.Module, batch: Any) -> Any:
        with self._at_work(module) as copy:
            return _transferred(copy.trainer, batch)

    def finish_on(self, module: nn.Module, batch: Any) -> None:
        """The hooks after the step that was taken on a copy of the module last."""
        with self._at_work(module):
            self.hooks.run_after(module, batch, self._output)
        self._output = None

    @contextmanager
    def _at_work(self, module: nn.Module) -> Iterator[pl.LightningModule]:
        """Inside, a copy of the module is in a trainer, and without a voice."""
        assert is_module(module)
        trainer, log = module._trainer, vars(module).get("log")
        module.trainer = self.hooks.trial(module).trainer
        module.log = _log_nothing  # type: ignore[method-assign]
        try:
            yield module
        finally:
            module.trainer = trainer
            del module.log
            if log is not None:
                module.log = log  # type: ignore[method-assign]

    @contextmanager
    def silenced(self) -> Iterator[None]:
        loggers = self._trainer.loggers
        self._trainer.loggers = [silent_logger(self._trainer) for _ in loggers]
        try:
            yield
        finally:
            self._trainer.loggers = loggers

    def drop_gradients(self, module: nn.Module) -> None:
        for p in module.parameters():  # as `zero_grad` between step and backward does
            p.grad = None

    def backward(self, loss: Tensor) -> None:
        self._backward(loss, self._trainer.optimizers[0])

    def epochs(self) -> float:
        return epochs_trained(self._trainer)

    def generator(self, device: torch.device) -> torch.Generator:
        assert self._generator is not None
        return self._generator(device)

    def note_look(self) -> None:
        """Before each look at a copy."""
        self.hooks.forget()

    def reads_clock(self) -> bool:
        """Whether the step asked for its number or its epoch in this look, or a hook may."""
        return self.hooks.asked or self.hooks.before or bool(self.hooks.after)

    def shared(self) -> list[Any]:
        """What a module may refer to, and a copy of it must not copy."""
        trainer = self._trainer
        parts = [trainer, getattr(trainer, "datamodule", None), *trainer.loggers]
        parts += trainer.callbacks  # type: ignore[attr-defined]
        return [part for part in parts if part is not None]


def _transferred(trainer: pl.Trainer, batch: Any) -> Any:
    """A batch on the device, after the hooks before and after the transfer."""
    batch = trainer.lightning_module._on_before_batch_transfer(batch)
    return trainer.strategy.batch_to_device(batch)


def epochs_trained(trainer: pl.Trainer) -> float:
    """Epochs trained so far, the step that begins included.

    Whole ones, the one that goes on included, where no end of it is in sight.
    """
    batches = trainer.num_training_batches
    done = trainer.fit_loop.epoch_loop.batch_idx + 1
    whole = trainer.current_epoch
    return whole + (done / batches if math.isfinite(batches) and batches else 1.0)


def _uses(function: Callable[..., Any], name: str) -> bool:
    """Whether a function's own code reads an argument."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    if code is None:
        return True
    return any(s.argval == name and "LOAD" in s.opname for s in dis.get_instructions(code))


def _log_nothing(*args: Any, **kwargs: Any) -> None:
    """Stands in for `self.log` while the step is only tried out."""
