"""What the loop of a Trainer does in its own way."""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn

from defend.training.runtime import Context

_LIBRARIES = ("lightning", "pytorch_lightning", "defend")  # of callbacks


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
        self.batch_idx = 0  # for copies of the module

    @property
    def module(self) -> nn.Module:
        return self._trainer.lightning_module

    @property
    def half(self) -> bool:
        """Whether the step computes in half precision."""
        return self._trainer.precision == "bf16-mixed"

    def user_code(self) -> list[Any]:
        trainer = self._trainer
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        users = [c for c in callbacks if type(c).__module__.partition(".")[0] not in _LIBRARIES]
        return [getattr(trainer, "datamodule", None), *users]

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
        trainer = self._trainer
        assert isinstance(module, pl.LightningModule)
        module.trainer = trainer
        module.log = _log_nothing  # type: ignore[method-assign]
        takes_index = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
        with trainer.precision_plugin.train_step_context():
            return module.training_step(batch, *([self.batch_idx] if takes_index else []))

    @contextmanager
    def silenced(self) -> Iterator[None]:
        loggers = self._trainer.loggers
        self._trainer.loggers = [DummyLogger() for _ in loggers]
        try:
            yield
        finally:
            self._trainer.loggers = loggers

    def backward(self, loss: Tensor) -> None:
        self._backward(loss, self._trainer.optimizers[0])

    def epochs(self) -> float:
        return epochs_trained(self._trainer)

    def generator(self, device: torch.device) -> torch.Generator:
        assert self._generator is not None
        return self._generator(device)

    def transfer(self, batch: Any) -> Any:
        """A batch on the device, through all batch hooks of module and data module."""
        trainer, module = self._trainer, self._trainer.lightning_module
        batch = trainer.precision_plugin.convert_input(batch)
        batch = module._on_before_batch_transfer(batch)
        return trainer.strategy.batch_to_device(batch)

    def note_look(self, turn: int) -> None:
        """Before each look at a copy: let `batch_idx` be even and odd in turn."""
        self.batch_idx = turn

    def shared(self) -> list[Any]:
        """What a module may refer to, and a copy of it must not copy."""
        trainer = self._trainer
        parts = [trainer, getattr(trainer, "datamodule", None), *trainer.loggers]
        parts += trainer.callbacks  # type: ignore[attr-defined]
        return [part for part in parts if part is not None]


def epochs_trained(trainer: pl.Trainer) -> float:
    """Epochs trained so far, the step that begins included.

    Whole ones, the one that goes on included, where no end of it is in sight.
    """
    batches = trainer.num_training_batches
    done = trainer.fit_loop.epoch_loop.batch_idx + 1
    whole = trainer.current_epoch
    return whole + (done / batches if math.isfinite(batches) and batches else 1.0)


def _log_nothing(*args: Any, **kwargs: Any) -> None:
    """Stands in for `self.log` while the step is only tried out."""
