"""A trainer for trials on a copy of its module: what is written to it stays there."""

from __future__ import annotations

import copy
import tempfile
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from torch import nn

from defend.callbacks._lightning import before, silent_logger

if TYPE_CHECKING:
    import lightning.pytorch as pl


class TrialTrainer:
    """Before the class of a trainer that was copied: it has a clock of its own, and saves nothing.

    Attributes:
        clock: of the trial.
    """

    clock: TrialClock

    @property
    def global_step(self) -> int:
        return self.clock.global_step

    @property
    def current_epoch(self) -> int:
        return self.clock.epoch

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is saved of a trial."""


class TrialClock:
    """Which step, batch and epoch it is in a trial, and whether somebody asks.

    Args:
        step: number of the first step.
        batch: its number in the epoch.
        epoch: number of that.
        batches: of an epoch; infinity where it has no end.

    Attributes:
        asked: whether the user's code asked.
    """

    def __init__(self, step: int, batch: int, epoch: int, batches: float) -> None:
        self._step, self._batch, self._epoch, self._batches = step, batch, epoch, batches
        self.asked = False

    def end_step(self) -> None:
        """The optimizer stepped."""
        self._step += 1

    def end_batch(self) -> None:
        """The next batch begins, in the next epoch if it was the last one."""
        self._batch += 1
        if self._batch >= self._batches:
            self._batch, self._epoch = 0, self._epoch + 1

    @property
    def global_step(self) -> int:
        self.asked = True
        return self._step

    @property
    def epoch(self) -> int:
        self.asked = True
        return self._epoch

    @property
    def batch_idx(self) -> int:
        """The number of the batch in its epoch."""
        return self._batch


class TrialLogger:
    """Before the class of a logger that swallows everything: it has a place and a name."""

    name = version = "trial"

    @property
    def log_dir(self) -> str:
        return tempfile.gettempdir()

    save_dir = root_dir = log_dir


def trial_trainer(
    trainer: pl.Trainer, module: nn.Module, clock: TrialClock, *, whole: bool
) -> pl.Trainer:
    """A copy of a trainer, with another module.

    Args:
        trainer: in its fit.
        module: a copy of its module.
        clock: what time it is there.
        whole: whether optimizers and schedulers are to be copies, too, since hooks run.
    """
    found: Any = copy.copy(trainer)
    found.__class__ = before(TrialTrainer, found.__class__)
    found.clock = clock
    found.loggers = [silent_logger(trainer, TrialLogger) for _ in trainer.loggers]
    found._accelerator_connector = copy.copy(trainer._accelerator_connector)
    found._accelerator_connector.strategy = strategy = _strategy_on(trainer.strategy, module)
    found._data_connector = copy.copy(trainer._data_connector)
    batch_hooks = copy.copy(trainer._data_connector._datahook_selector)
    found._data_connector._datahook_selector = batch_hooks
    if batch_hooks is not None:
        batch_hooks.model = module  # type: ignore[assignment]
    if whole:
        weights = dict(module.named_parameters())
        named = trainer.lightning_module.named_parameters()
        memo: dict[int, Any] = {id(p): weights[name] for name, p in named if name in weights}
        strategy.optimizers = [_optimizer_on(o, memo) for o in trainer.optimizers]
        strategy.lr_scheduler_configs = copy.deepcopy(trainer.lr_scheduler_configs, memo)
    return found


def _strategy_on(strategy: Any, module: nn.Module) -> Any:
    """A copy of a strategy, with another module; it is alone, and touches no file."""
    found = copy.copy(strategy)
    found._lightning_module = found._model = module
    for name in ("save_checkpoint", "remove_checkpoint", "barrier"):
        setattr(found, name, _nothing)
    for name in ("all_gather", "reduce", "reduce_boolean_decision", "broadcast"):
        setattr(found, name, _itself)
    return found


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Stands in for what a trial must not do."""


def _itself(value: Any, *_: Any, **__: Any) -> Any:
    """Stands in for what processes do together."""
    return value


def _optimizer_on(optimizer: Any, memo: dict[int, Any]) -> Any:
    """The optimizer, on the weights that `memo` has for its own; it is put there, too."""
    found = copy.copy(optimizer)
    found.param_groups = [
        {**group, "params": [memo.get(id(p), p) for p in group["params"]]}
        for group in optimizer.param_groups
    ]
    found.state = defaultdict(dict)
    memo[id(optimizer)] = found
    return found
