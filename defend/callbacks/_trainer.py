"""What a Trainer says about a private run, and its training step on a copy of the module."""

import inspect
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import nn

from defend.callbacks._seams import Adversary
from defend.errors import PrivacyError
from defend.privacy.checks.preconditions import Setup
from defend.training.tryout import Trial


def trainer_facts(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Setup:
    """The facts that are known before the data and the optimizer are."""
    return Setup(
        accumulate_grad_batches=trainer.accumulate_grad_batches,
        gradient_clip_val=trainer.gradient_clip_val,
        precision=trainer.precision,
        strategy=type(trainer.strategy).__name__,
        automatic_optimization=pl_module.automatic_optimization,
        overrides_backward=type(pl_module).backward is not pl.LightningModule.backward,
        compiled=getattr(pl_module, "_compiler_ctx", None) is not None,
        takes_dataloader_iter="dataloader_iter"
        in inspect.signature(pl_module.training_step).parameters,
        reloads_data=trainer.reload_dataloaders_every_n_epochs > 0,  # type: ignore[attr-defined]
        overfits_batches=trainer.overfit_batches > 0,  # type: ignore[attr-defined]
        callbacks=tuple(type(c) for c in trainer.callbacks),  # type: ignore[attr-defined]
    )


def loss_of(output: Any) -> torch.Tensor:
    """The loss in what `training_step` returned.

    Raises:
        PrivacyError: if there is none.
    """
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, torch.Tensor):
        raise PrivacyError(
            f"Expected `training_step` to return a loss for every batch, got {loss!r}. Skipping "
            "a batch because of one record would reveal that record."
        )
    return loss


def refuse_steering(trainer: pl.Trainer, metric: str) -> None:
    """Nothing that shapes the weights may look at a metric of the training data without noise.

    Raises:
        PrivacyError: if a scheduler, an early stopping or a checkpoint monitors `metric`.
    """
    watchers = {type(c).__name__: getattr(c, "monitor", None) for c in trainer.callbacks}  # type: ignore[attr-defined]
    for config in trainer.lr_scheduler_configs:
        watchers[type(config.scheduler).__name__] = (
            config.monitor if config.reduce_on_plateau else None
        )
    names = {metric, f"{metric}_step", f"{metric}_epoch"}
    found = [watcher for watcher, monitored in watchers.items() if monitored in names]
    if found:
        raise PrivacyError(
            f"Expected nothing to be steered by the training data without noise, got {found[0]} "
            f"that monitors `{metric}`. Monitor a metric of held-out data, or the step."
        )


def without_graph(output: Any) -> Any:
    """What `training_step` returned, its loss detached: backward is done."""
    if isinstance(output, Mapping):
        return {**output, "loss": output["loss"].detach()}
    return output.detach()


class TrainerStep:
    """The step of a Trainer's loop, for trying it out on a copy of the module.

    Args:
        trainer: the Trainer, at the start of its fit.
        pl_module: its module.
        adversary: what adversarial training makes of it, if there is any.
    """

    def __init__(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, adversary: Adversary | None
    ) -> None:
        self.trainer, self.pl_module, self.adversary = trainer, pl_module, adversary
        self._takes_index = is_param_in_hook_signature(
            pl_module.training_step, "batch_idx", min_args=2
        )
        self.half = trainer.precision == "bf16-mixed"
        self._index = 0

    def trial(self) -> Trial:
        """The parts in which it is tried out."""
        attacked = self.adversary is not None
        return Trial(
            loss=self.loss,
            transfer=self.transfer,
            attack=self.attack if attacked else None,
            attack_anew=self.attack_anew if attacked else None,
            backward=self.backward,
            half=self.half,
            share=self.share(),
            on_look=self.look,
        )

    def transfer(self, batch: Any) -> Any:
        """A batch on the device, through all batch hooks of module and data module."""
        batch = self.trainer.precision_plugin.convert_input(batch)
        batch = self.pl_module._on_before_batch_transfer(batch)
        return self.trainer.strategy.batch_to_device(batch)

    def loss(self, module: nn.Module, batch: Any) -> torch.Tensor:
        """The whole loss on a copy of the module; nothing is logged."""
        assert isinstance(module, pl.LightningModule)
        module.trainer = self.trainer
        module.log = _log_nothing  # type: ignore[method-assign]

        def step(rows: Any) -> Any:
            arguments = (rows, self._index) if self._takes_index else (rows,)
            with self.trainer.precision_plugin.train_step_context():
                return module.training_step(*arguments)

        loggers = self.trainer.loggers
        self.trainer.loggers = [DummyLogger() for _ in loggers]
        try:
            adversary = self.adversary
            return loss_of(step(batch) if adversary is None else adversary.run(batch, module, step))
        finally:
            self.trainer.loggers = loggers

    def look(self, turn: int) -> None:
        """Before each look: let `batch_idx` be even and odd in turn."""
        self._index = turn

    def share(self) -> list[Any]:
        """What a module may refer to, and a copy of it must not copy."""
        trainer = self.trainer
        parts = [trainer, getattr(trainer, "datamodule", None), *trainer.loggers]
        parts += trainer.callbacks  # type: ignore[attr-defined]
        return [part for part in parts if part is not None]

    def attack(self, module: nn.Module, batch: Any) -> Any:
        """The batch, clean and attacked."""
        assert self.adversary is not None
        return self.adversary.transform(batch, module)

    def attack_anew(self, module: nn.Module, batch: Any, number: int) -> Any:
        """The same from other secret numbers."""
        assert self.adversary is not None
        return self.adversary.transform(batch, module, anew=number)

    def backward(self, loss: torch.Tensor) -> None:
        """A backward on the copy, whose weights are then where they were."""
        with nullcontext() if self.adversary is None else self.adversary.backward():
            loss.backward()


def _log_nothing(*args: Any, **kwargs: Any) -> None:
    """Stands in for `self.log` while the step is only tried out."""
