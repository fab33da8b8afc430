"""The user's hooks around a step, tried out on copies of the callbacks and of the module."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from types import MethodType
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from defend.batching.digest import digest, same
from defend.callbacks._lightning import is_made_from
from defend.callbacks._trial_trainer import TrialClock, trial_trainer
from defend.privacy.checks.state_watch import StateWatch, change_published
from defend.privacy.mechanism.generators import generators_in
from defend.privacy.mechanism.libraries import LIGHTNING, package

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import Callback

BEFORE = ("on_train_batch_start",)
INSIDE = ("on_before_backward", "on_after_backward")
_LIBRARIES = {*LIGHTNING, "defend", "mlflow", "optuna", "ray", "torch", "wandb"}


def users_callbacks(trainer: pl.Trainer) -> list[Callback]:
    """The callbacks that run code of the user's: all but those of Lightning and defend."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    kinds = [(c, type(c)) for c in callbacks]
    return [
        c
        for c, kind in kinds
        if kind.__name__ == "LambdaCallback" or package(kind) not in _LIBRARIES
    ]


class UsersHooks:
    """What runs before and after a step, apart from it: mixup in place, running means, prototypes.

    Hooks may do anything: write files, move schedulers. So none is tried out before one was seen to
    change a batch, or to write to what is kept; and then on copies, which have a trainer of their
    own, without loggers and checkpoints.

    Args:
        trainer: in its fit.

    Attributes:
        before: whether hooks before the step are tried out, since one changed a batch.
        after: names of what changed after the step; those after it are tried out where there are
            any.
        ended: whether the training is over, so that its end is tried out, too.
        untried: a hook that could not be tried in the last look; None if all could.
        changes: whether a hook before the step changed a batch in the last look.
        kept: those of `after` that are published, and that hooks changed in the last look.
        asked: whether the step asked for its number in the last look.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer
        self.before = self.ended = False
        self.after: set[str] = set()
        # The number and the epoch of the batch that is trained on next, and of the one before it.
        self._batches = [(0, trainer.current_epoch)] * 2
        self._trials: dict[int, _Trial] = {}
        self.forget()

    def forget(self) -> None:
        """A look begins."""
        self.untried: str | None = None
        self.changes = self.asked = False
        self.kept: set[str] = set()

    def note_batch(self, batch_idx: int) -> None:
        """A batch begins."""
        self._batches = [(batch_idx, self._trainer.current_epoch), self._batches[0]]

    @property
    def averages(self) -> bool:
        """Whether Lightning itself puts averages of the weights in their place at the end."""
        callbacks = self._trainer.callbacks  # type: ignore[attr-defined]
        names = ("WeightAveraging", "StochasticWeightAveraging")
        return any(is_made_from(c, *names) for c in callbacks)

    def see_batches(self) -> bool:
        """Whether any hook sees a batch before the step."""
        return self._any(BEFORE)

    def run_inside(self) -> bool:
        """Whether any hook runs around the backward, within the step."""
        return self._any(INSIDE)

    def _any(self, hooks: tuple[str, ...]) -> bool:
        owners = [*users_callbacks(self._trainer), self._trainer.lightning_module]
        return any(_overrides(owner, hook) for owner in owners for hook in hooks)

    def restart(self, module: nn.Module) -> None:
        """What was tried on a copy of the module is over; the next trial begins anew."""
        trial = self._trials.pop(id(module), None)
        self.asked |= trial is not None and trial.clock.asked

    def trial(self, module: nn.Module) -> _Trial:
        """What a copy of the module is tried in."""
        if id(module) not in self._trials:
            self._trials[id(module)] = self._new_trial(module)
        return self._trials[id(module)]

    def _new_trial(self, module: nn.Module) -> _Trial:
        trainer, back = self._trainer, bool(self.after)  # then it begins with the step before
        number, epoch = self._batches[back and not self.ended]
        clock = TrialClock(trainer.global_step - back, number, epoch, trainer.num_training_batches)
        return _Trial(trainer, module, clock, hooks=self.before or back)

    def run_before(self, module: nn.Module, batch: Any) -> None:
        """What runs before the step; it may write to the batch."""
        if (self.before or self.after) and self.see_batches():
            trial, held = self.trial(module), digest(batch)
            with self._noting(module):
                self._run(trial, {"on_train_batch_start": (batch, trial.clock.batch_idx)})
            self.changes |= not same(held, digest(batch))

    def run_after(self, module: nn.Module, batch: Any, output: Any) -> None:
        """What runs after the step, to the end of the epoch and the start of the next.

        Args:
            module: the copy.
            batch: that the step was on.
            output: what it returned.
        """
        trial = self.trial(module)
        if not self.after:
            trial.clock.end_step()
            trial.clock.end_batch()
            return
        outputs, optimizer = _as_outputs(output), trial.trainer.optimizers[0]
        hooks: dict[str, tuple[Any, ...]] = {
            "on_before_zero_grad": (optimizer,),
            "on_before_backward": (outputs["loss"],),
            "on_after_backward": (),
            "on_before_optimizer_step": (optimizer,),
            "configure_gradient_clipping": (optimizer, None, None),
        }
        with self._noting(module):
            self._run(trial, hooks)
            self._update(trial, outputs["loss"])
            end = {"on_train_batch_end": (outputs, batch, trial.clock.batch_idx)}
            self._run(trial, {**end, "on_train_epoch_end": ()})
            if self.ended:
                self._run(trial, {"on_train_end": ()})
            trial.clock.end_batch()
            self._run(trial, {"on_train_epoch_start": ()})

    def _update(self, trial: _Trial, loss: Any) -> None:
        """The module's own `optimizer_step`; its optimizer moves nothing."""
        if _overrides(trial.module, "optimizer_step"):
            clock, optimizer = trial.clock, trial.trainer.strategy._lightning_optimizers[0]
            with mock.patch.object(optimizer, "step", _stand_still):
                given = clock.epoch, clock.batch_idx, optimizer, lambda: loss
                self._run(trial, {"optimizer_step": given})
        trial.clock.end_step()  # after the hook, as Lightning counts

    @contextlib.contextmanager
    def _noting(self, module: nn.Module) -> Iterator[None]:
        """Inside, hooks run; notes which of `after` they write to, with the same value too."""
        names = change_published(module, self.after)
        watch = StateWatch(module)
        watch.note()
        yield
        self.kept |= set(watch.take()) & names

    def _run(self, trial: _Trial, hooks: dict[str, tuple[Any, ...]]) -> None:
        self.untried = self.untried or trial.untried
        if not trial.apart:  # they would move the optimizers of the fit
            return
        for hook, given in hooks.items():
            for owner in (*trial.callbacks, trial.module):
                if not _overrides(owner, hook):
                    continue
                first = () if owner is trial.module else (trial.trainer, trial.module)
                try:
                    with mock.patch.object(torch, "save", _save_nothing):
                        getattr(owner, hook)(*first, *given)
                except Exception as error:
                    name = f"{type(owner).__name__}.{hook}: {type(error).__name__}: {error}"
                    self.untried = self.untried or name


class _Trial:
    """A copy of a module, in a trainer and with callbacks of its own."""

    def __init__(
        self, trainer: pl.Trainer, module: nn.Module, clock: TrialClock, *, hooks: bool
    ) -> None:
        self.module, self.clock = module, clock
        self.untried: str | None = None
        self.callbacks: list[Callback] = []
        self.apart = hooks
        try:
            self.trainer = trial_trainer(trainer, module, clock, whole=hooks)
        except Exception as error:
            self.untried = f"the trainer cannot be copied: {error}"
            self.trainer = trial_trainer(trainer, module, clock, whole=False)
            self.apart = False
        if not self.apart:
            return
        users = users_callbacks(trainer)
        shared = [getattr(trainer, "datamodule", None), *trainer.loggers]
        memo: dict[int, Any] = {id(part): part for part in shared}
        memo |= {id(trainer): self.trainer, **_parts_of(trainer.lightning_module, module)}
        memo |= {id(g): g for g in generators_in(users, shared)}  # seeded with all others
        for callback in users:
            values = vars(callback).values()
            memo |= {id(v): v for v in values if isinstance(v, Dataset | DataLoader)}
            copied = _copied(callback, memo)
            if copied is None:
                self.untried = f"{type(callback).__name__} cannot be copied"
            else:
                self.callbacks.append(copied)
        _rebind(trainer.lightning_module, module, memo)
        others = [c for c in trainer.callbacks if c not in users]  # type: ignore[attr-defined]
        self.trainer.callbacks = [*others, *self.callbacks]  # type: ignore[attr-defined]


def _parts_of(original: nn.Module, copied: nn.Module) -> dict[int, Any]:
    """What stands for a module and its parts where a callback holds them: those of its copy."""
    found: dict[int, Any] = {}
    for parts in ("named_modules", "named_parameters", "named_buffers"):
        mine = dict(getattr(copied, parts)())
        found |= {id(p): mine[n] for n, p in getattr(original, parts)() if n in mine}
    return found


def _rebind(original: nn.Module, copied: nn.Module, memo: dict[int, Any]) -> None:
    """Forward hooks that are methods of a callback become those of its copy."""
    mine = dict(copied.named_modules())
    for name, part in original.named_modules():
        for hooks in ("_forward_pre_hooks", "_forward_hooks"):
            for key, hook in getattr(part, hooks).items():
                owner = memo.get(id(getattr(hook, "__self__", None)))
                if isinstance(hook, MethodType) and owner is not None and name in mine:
                    getattr(mine[name], hooks)[key] = MethodType(hook.__func__, owner)


def _copied(callback: Callback, memo: dict[int, Any]) -> Callback | None:
    """A deep copy; open files, locks and the like are shared. None for what copies in its own way.

    Args:
        callback: of the user's.
        memo: what is not to be copied, or was.
    """
    with contextlib.suppress(Exception):
        return copy.deepcopy(callback, memo)
    if hasattr(type(callback), "__deepcopy__"):
        return None
    found = copy.copy(callback)
    for name, value in vars(callback).items():
        with contextlib.suppress(Exception):
            setattr(found, name, copy.deepcopy(value, memo))
    return found


def _as_outputs(output: Any) -> dict[str, Any]:
    """What Lightning hands to hooks for what a step returned."""
    if isinstance(output, dict):
        return {**output, "loss": output["loss"].detach()}
    return {"loss": output.detach() if isinstance(output, Tensor) else output}


def _overrides(owner: Any, hook: str) -> bool:
    """Whether a hook is the user's: not one of Lightning's, nor one that does nothing."""
    found = getattr(owner, hook, None)
    return package(found) not in ("", *_LIBRARIES)


def _stand_still(closure: Callable[[], Any] | None = None, **_: Any) -> Any:
    """Stands in for the step of an optimizer."""
    return None if closure is None else closure()


def _save_nothing(*args: Any, **kwargs: Any) -> None:
    """Stands in for `torch.save`."""
