"""The places where defend reaches into Lightning, and the only file that does.

`trainer.strategy.training_step` sees every training batch, under every strategy, precision and
kind of optimization; `trainer.strategy.backward` takes the loss from there, and
`trainer.strategy.process_dataloader` sees every loader before its iterator is made. All are public
methods of the strategy. They are wrapped once a trainer, on the instance, and callbacks register
what they want done; so their order in the list of callbacks changes nothing:

    batch → attack → training_step → the objective's own term → backward → weights and δ

or, where the run is private, the attack on the whole logical batch, and all that follows chunk by
chunk.

A fourth one is for metrics: what `self.log` hands to the training loop's results.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import lightning.pytorch as pl
import torch


class Adversary(Protocol):
    """Registered by adversarial training: what it does before, around and after a step.

    `transform` attacks; what it gives holds the clean and the adversarial rows, and can be cut into
    chunks of them. `run` runs the step on that and completes its loss; `backward` is around the
    backward, and undoes what `run` did to the weights. All of it also works on a copy of the
    module, on which a step is tried out.
    """

    @property
    def moves_weights(self) -> bool: ...

    def transform(self, batch: Any, module: torch.nn.Module, *, anew: int | None = None) -> Any: ...

    def run(self, made: Any, module: torch.nn.Module, step: Callable[[Any], Any]) -> Any: ...

    def backward(self) -> AbstractContextManager[None]: ...

    def replace_loader(self, loader: Any) -> Any: ...


class StepRunner(Protocol):
    """Registered by differential privacy: replaces the loader, and runs the step in chunks.

    Forward and backward happen in `run`; the backward that Lightning asks for afterwards is left
    out. An attack before a private step works in chunks of the same size and starts from the
    numbers of `attack_generator`.
    """

    @property
    def step_chunk_size(self) -> int | None: ...

    @property
    def views(self) -> int: ...

    @property
    def released(self) -> Mapping[str, torch.Tensor]: ...

    def attack_generator(
        self, device: torch.device, *, anew: int | None = None
    ) -> torch.Generator: ...

    def replace_loader(self, loader: Any) -> Any: ...

    def run(self, batch: Any, step: Callable[[Any], Any], backward: Callable[..., Any]) -> Any: ...

    def keeps_metric(self, name: str) -> bool: ...


class Seams:
    """What is wrapped on one trainer's strategy.

    Attributes:
        adversary: replaces batches and completes their losses, or None.
        private: runs steps in chunks and replaces the training loader, or None.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self.trainer = trainer
        self.adversary: Adversary | None = None
        self.private: StepRunner | None = None
        self._log: Callable[..., None]
        self._training_step = trainer.strategy.training_step
        self._backward = trainer.strategy.backward
        self._process_dataloader = trainer.strategy.process_dataloader

    @classmethod
    def of(cls, trainer: pl.Trainer) -> "Seams":
        """The trainer's seams; wrapped now if they are not yet."""
        wrapped = vars(trainer.strategy).get("training_step")
        seams = getattr(wrapped, "__self__", None)
        if isinstance(seams, cls):
            return seams
        seams = cls(trainer)
        trainer.strategy.training_step = seams.training_step  # type: ignore[method-assign]
        trainer.strategy.backward = seams.backward  # type: ignore[method-assign, assignment]
        trainer.strategy.process_dataloader = (  # type: ignore[method-assign]
            seams.process_dataloader
        )
        results = trainer.fit_loop.epoch_loop._results
        seams._log = results.log
        results.log = seams.log
        return seams

    @staticmethod
    def unwrap(trainer: pl.Trainer) -> None:
        """Leave the strategy as it was. Safe to call twice."""
        places = [
            (trainer.strategy, "training_step"),
            (trainer.strategy, "backward"),
            (trainer.strategy, "process_dataloader"),
            (trainer.fit_loop.epoch_loop._results, "log"),
        ]
        for owner, name in places:
            if isinstance(getattr(vars(owner).get(name), "__self__", None), Seams):
                delattr(owner, name)

    def training_step(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Stands in for `strategy.training_step`."""
        adversary, module = self.adversary, self.trainer.lightning_module

        def step(part: Any) -> Any:
            if self.private is not None:
                self._weigh_logs_by(part)
            return self._training_step(part, *args, **kwargs)

        def completed(made: Any) -> Any:
            return step(made) if adversary is None else adversary.run(made, module, step)

        if adversary is not None:
            batch = adversary.transform(batch, module)
        if self.private is not None:
            return self.private.run(batch, completed, self._undone_after(self._backward))
        return completed(batch)

    def backward(self, loss: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Stands in for `strategy.backward`."""
        if self.private is not None:
            return loss  # done already, chunk by chunk, in `training_step`
        return self._undone_after(self._backward)(loss, *args, **kwargs)

    def _undone_after(self, backward: Callable[..., Any]) -> Callable[..., Any]:
        """A backward, and after it what the adversary does then."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with nullcontext() if self.adversary is None else self.adversary.backward():
                return backward(*args, **kwargs)

        return run

    def log(self, fx: str, name: str, *args: Any, **kwargs: Any) -> None:
        """Stands in for the training results' `log`."""
        if self.private is None or self.private.keeps_metric(name):
            self._log(fx, name, *args, **kwargs)

    def process_dataloader(self, dataloader: object) -> object:
        """Stands in for `strategy.process_dataloader`."""
        loader = self._process_dataloader(dataloader)
        if not self.trainer.training:
            return loader
        if self.private is not None:
            return self.private.replace_loader(loader)
        return loader if self.adversary is None else self.adversary.replace_loader(loader)

    def _weigh_logs_by(self, chunk: Any) -> None:
        """Epoch means of `self.log` weigh each value by the rows it was computed from."""
        results = self.trainer._results
        if results is not None:
            results.batch, results.batch_size = chunk, None


def with_penalty(output: Any, penalty: torch.Tensor) -> Any:
    """What a training step returned, the penalty added to its loss."""
    if not isinstance(output, Mapping):
        return output + penalty
    if output.get("loss") is None:
        return output  # Lightning says what is missing
    return {**output, "loss": output["loss"] + penalty}
