"""How far a Trainer is, in epochs: what a warm-up counts by."""

import math

import lightning.pytorch as pl

from defend.errors import InputError


def epochs_trained(trainer: pl.Trainer) -> float:
    """Epochs trained so far, the step that begins included.

    Whole ones, the one that goes on included, where no end of it is in sight.
    """
    batches = trainer.num_training_batches
    done = trainer.fit_loop.epoch_loop.batch_idx + 1
    whole = trainer.current_epoch
    return whole + (done / batches if math.isfinite(batches) and batches else 1.0)


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
