"""The places where defend reaches into Lightning, and the only file that does.

`trainer.strategy.training_step` sees every training batch, under every strategy, precision and
kind of optimization; `trainer.strategy.backward` takes the loss from there, and
`trainer.strategy.process_dataloader` sees every loader before its iterator is made. All are public
methods of the strategy. They are wrapped once a trainer, on the instance, and callbacks register
what they want done; so their order in the list of callbacks changes nothing. What is done with a
batch then is in `defend.training.step`.

Two more tell when a validation is over, and what a checkpoint holds. One is for metrics: what
`self.log` hands to the training loop's results. Where each record has a batch of its own, two
private methods of the module, which transfer a batch, let the list of them pass, and the loader is
asked anew.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import TYPE_CHECKING, Any, Protocol

import torch

from defend.batching.records import RecordBatches
from defend.callbacks._record_logs import RecordLogs
from defend.callbacks._runtime import TrainerRuntime
from defend.training.adversarial import AdversarialSteps
from defend.training.private import PrivateFit
from defend.training.private_data import PrivateData
from defend.training.step import TrainingStep

if TYPE_CHECKING:
    import lightning.pytorch as pl


class AdversaryHooks(Protocol):
    """Registered by adversarial training."""

    @property
    def steps(self) -> AdversarialSteps:
        """Attacks batches and completes their losses."""

    def timed(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """Counts the seconds that attacks take."""

    def generator(self, device: torch.device) -> torch.Generator:
        """Random numbers for this batch, where the run is not private."""

    def replace_loader(self, loader: Any) -> Any:
        """The training loader as the attack needs it."""


class PrivacyHooks(Protocol):
    """Registered by differential privacy, which does forward and backward chunk by chunk."""

    @property
    def data(self) -> PrivateData:
        """The data of the fit, Poisson-sampled."""

    @property
    def fit(self) -> PrivateFit:
        """The fit that is open."""

    def note_batch(self, batch: Any) -> None:
        """Told of each batch that is trained on, as the step gets it."""

    def around_backward(self, loss: torch.Tensor) -> contextlib.AbstractContextManager[None]:
        """Entered around the backward of each chunk, and the hooks before and after it."""

    def note_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Told of each checkpoint, as all hooks left it, before it is saved."""

    def note_validation_end(self) -> None:
        """Told when all hooks of a validation ran."""

    def replace_loader(self, loader: Any) -> Any:
        """The user's training loader, with Poisson-sampled batches."""

    def keeps_metric(self, name: str) -> bool:
        """Whether a metric that is logged in training goes on to loggers and callbacks."""


class PatchedStrategy:
    """What is wrapped on one trainer's strategy.

    Attributes:
        adversary: attacks batches and completes their losses, or None.
        privacy: runs steps in chunks and replaces the training loader, or None.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self.trainer = trainer
        self.adversary: AdversaryHooks | None = None
        self.privacy: PrivacyHooks | None = None
        self._log: Callable[..., None]
        self._records: RecordLogs | None = None  # where each record has a batch of its own
        self._training_step = trainer.strategy.training_step
        self._backward = trainer.strategy.backward
        self._process_dataloader = trainer.strategy.process_dataloader
        self._on_validation_end = trainer.strategy.on_validation_end
        self._save_checkpoint = trainer.strategy.save_checkpoint

    @classmethod
    def of(cls, trainer: pl.Trainer) -> PatchedStrategy:
        """The trainer's; wrapped now if it is not yet."""
        wrapped = vars(trainer.strategy).get("training_step")
        patched = getattr(wrapped, "__self__", None)
        if isinstance(patched, cls):
            return patched
        patched = cls(trainer)
        trainer.strategy.training_step = patched.training_step  # type: ignore[method-assign]
        trainer.strategy.backward = patched.backward  # type: ignore[method-assign, assignment]
        trainer.strategy.process_dataloader = (  # type: ignore[method-assign]
            patched.process_dataloader
        )
        trainer.strategy.on_validation_end = (  # type: ignore[method-assign]
            patched.on_validation_end
        )
        trainer.strategy.save_checkpoint = patched.save_checkpoint  # type: ignore[method-assign]
        results = trainer.fit_loop.epoch_loop._results
        patched._log = results.log
        results.log = patched.log
        return patched

    def isolate_records(self) -> None:
        """Each record has a batch of its own: the step transfers them, one by one."""
        module: Any = self.trainer.lightning_module
        for name, stands_in in _TRANSFERS.items():
            setattr(module, name, MethodType(stands_in, module))
        self._records = RecordLogs(self._log)
        fetcher = self.trainer.fit_loop._data_fetcher
        if fetcher is not None:  # it has batches of the other kind, perhaps
            iter(fetcher)

    @staticmethod
    def unwrap(trainer: pl.Trainer) -> None:
        """Leave the strategy as it was. Safe to call twice."""
        places = [
            (trainer.strategy, "training_step"),
            (trainer.strategy, "backward"),
            (trainer.strategy, "process_dataloader"),
            (trainer.strategy, "on_validation_end"),
            (trainer.strategy, "save_checkpoint"),
            (trainer.fit_loop.epoch_loop._results, "log"),
        ]
        for owner, name in places:
            if isinstance(getattr(vars(owner).get(name), "__self__", None), PatchedStrategy):
                delattr(owner, name)
        module: Any = trainer.lightning_module  # None where a fit failed before it had one
        held = {} if module is None else vars(module)
        for name, stands_in in _TRANSFERS.items():
            if getattr(held.get(name), "__func__", None) is stands_in:
                delattr(module, name)

    def _private_backward(self, privacy: PrivacyHooks, loss: torch.Tensor, optimizer: Any) -> None:
        with privacy.around_backward(loss):
            self._backward(loss, optimizer)

    def step(self, *args: Any, **kwargs: Any) -> TrainingStep:
        """A step of this training; `args` are those of `training_step` behind the batch."""
        adversary, privacy = self.adversary, self.privacy
        runtime = TrainerRuntime(
            self.trainer,
            partial(self._users_step, args, kwargs),
            self._backward if privacy is None else partial(self._private_backward, privacy),
            contextlib.nullcontext if adversary is None else adversary.timed,
            None if adversary is None else adversary.generator,
        )
        return TrainingStep(
            runtime,
            None if adversary is None else adversary.steps,
            None if privacy is None else privacy.data,
        )

    def training_step(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Stands in for `strategy.training_step`."""
        step = self.step(*args, **kwargs)
        if self.privacy is None:
            return step.loss(batch)
        self.privacy.note_batch(batch)
        output = step.gradient(batch, self.privacy.fit)
        if self._records is not None:
            self._records.flush()
        return output

    def backward(self, loss: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Stands in for `strategy.backward`."""
        if self.privacy is not None:
            return loss  # done already, chunk by chunk, in `training_step`
        with self.step().around_backward():
            return self._backward(loss, *args, **kwargs)

    def on_validation_end(self) -> None:
        """Stands in for `strategy.on_validation_end`, which comes after all other hooks of it."""
        self._on_validation_end()
        if self.privacy is not None:
            self.privacy.note_validation_end()

    def save_checkpoint(self, checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Stands in for `strategy.save_checkpoint`, which gets what all hooks made of it."""
        if self.privacy is not None:
            self.privacy.note_checkpoint(checkpoint)
        self._save_checkpoint(checkpoint, *args, **kwargs)

    def log(self, fx: str, name: str, *args: Any, **kwargs: Any) -> None:
        """Stands in for the training results' `log`."""
        if self.privacy is None or self.privacy.keeps_metric(name):
            log = self._log if self._records is None else self._records.log
            log(fx, name, *args, **kwargs)

    def process_dataloader(self, dataloader: object) -> object:
        """Stands in for `strategy.process_dataloader`."""
        loader = self._process_dataloader(dataloader)
        if not self.trainer.training:
            return loader
        if self.privacy is not None:
            return self.privacy.replace_loader(loader)
        return loader if self.adversary is None else self.adversary.replace_loader(loader)

    def _users_step(self, args: tuple[Any, ...], kwargs: dict[str, Any], batch: Any) -> Any:
        results = self.trainer._results
        if self.privacy is not None and results is not None:
            # Epoch means of `self.log` weigh each value by the rows it was computed from.
            results.batch, results.batch_size = batch, None if self._records is None else 1
        return self._training_step(batch, *args, **kwargs)


def _before_transfer(self: pl.LightningModule, batch: Any, *args: Any, **kwargs: Any) -> Any:
    if isinstance(batch, RecordBatches):
        return batch
    return type(self)._on_before_batch_transfer(self, batch, *args, **kwargs)


def _transfer(self: pl.LightningModule, batch: Any, *args: Any, **kwargs: Any) -> Any:
    if isinstance(batch, RecordBatches):
        return batch
    return type(self)._apply_batch_transfer_handler(self, batch, *args, **kwargs)


# Methods of a module that stand in, on the instance, for those of its class; a copy has its own.
_TRANSFERS = {
    "_on_before_batch_transfer": _before_transfer,
    "_apply_batch_transfer_handler": _transfer,
}
