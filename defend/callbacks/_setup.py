"""What a Trainer says about a run before its first step, and what is told of errors later."""

from __future__ import annotations

import inspect
import math
import traceback
from typing import TYPE_CHECKING

from defend.callbacks._lightning import overrides
from defend.errors import InputError, PrivacyError
from defend.privacy.checks.preconditions import Setup
from defend.privacy.checks.setup import kind_of_strategy
from defend.privacy.mechanism.generators import is_users_module

if TYPE_CHECKING:
    import lightning.pytorch as pl


def refuse_warmup_without_an_end(trainer: pl.Trainer, warmup_epochs: float) -> None:
    """A loader without a length lets eps grow by whole epochs only.

    Raises:
        InputError: if it would be at its full size from the first step on.
    """
    endless = math.isinf(trainer.num_training_batches)
    if endless and 0 < warmup_epochs <= 1 and trainer.current_epoch == 0:
        raise InputError(
            f"Expected a training loader with a length for warmup_epochs={warmup_epochs}, got one "
            "without: eps would be at its full size from the first step on. Pass "
            "limit_train_batches=... to the Trainer, or warm up over more epochs than one."
        )


def trainer_facts(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Setup:
    """The facts that are known before the data and the optimizer are."""
    return Setup(
        accumulate_grad_batches=trainer.accumulate_grad_batches,
        gradient_clip_val=trainer.gradient_clip_val,
        precision=trainer.precision,
        strategy=kind_of_strategy(type(trainer.strategy)),
        automatic_optimization=pl_module.automatic_optimization,
        overrides_backward=overrides(pl_module, "backward"),
        compiled=getattr(pl_module, "_compiler_ctx", None) is not None,
        takes_dataloader_iter="dataloader_iter"
        in inspect.signature(pl_module.training_step).parameters,
        reloads_data=trainer.reload_dataloaders_every_n_epochs > 0,  # type: ignore[attr-defined]
        overfits_batches=trainer.overfit_batches > 0,  # type: ignore[attr-defined]
        callbacks=tuple(type(c) for c in trainer.callbacks),  # type: ignore[attr-defined]
    )


def is_last_of_epoch(trainer: pl.Trainer) -> bool:
    """Whether the batch at hand is the last of its epoch, which may end before its loader does."""
    loop = trainer.fit_loop.epoch_loop
    return loop.batch_progress.is_last_batch or loop.batch_idx + 1 >= trainer.num_training_batches


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


def explain_missing_gradients(error: BaseException) -> None:
    """A hook that reads `p.grad` too early fails with Python's words; add what to do."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    hooks = {f.f_code.co_name for f in frames if is_users_module(f.f_globals.get("__name__", ""))}
    if isinstance(error, AttributeError | TypeError) and "on_after_backward" in hooks:
        error.add_note(
            "defend: in on_after_backward the gradients of the records are forgotten already, and "
            "every p.grad is None. Read the released gradient in on_before_optimizer_step."
        )
