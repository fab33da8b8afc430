"""What all of defend's callbacks share: clean up however a run ends, and leave evidence."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
import uuid
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from defend.callbacks._lightning import callback_bases, check_version
from defend.callbacks._strategy import PatchedStrategy

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import Callback
else:
    Callback = type("Callback", callback_bases(), {})

# An `Attack`, under a name by which LightningCLI builds one from a class path: jsonargparse takes
# a protocol of a function that returns tensors for one of classes that are tensors.
BuildableAttack = Callable[..., Any]

# What a callback holds of a fit that is under way.
_OF_A_FIT = {"_trainer", "_stopwatch", "_data", "_fit", "_hooks"}


class DefendCallback(Callback):
    """Base of defend's callbacks.

    A subclass says what it did (`settings`, `results`) and how to clean up (`clean_up`). The last
    of them in a trainer's list writes the evidence for all, so that one run has one card whatever
    callbacks it has.

    Strategies that fork or spawn (ddp_spawn, ddp_notebook) run the fit on copies of the callbacks
    and bring back none of them. What a copy learned (`state_to_send`) would be lost, spent ε
    included; so rank 0 writes it to a file whose name the original knows, and the original reads it
    (`receive_state`).
    """

    def __init__(self) -> None:
        super().__init__()
        self._home = os.getpid()
        self._state_file = str(Path(tempfile.gettempdir(), f"defend-{uuid.uuid4().hex}.json"))
        self._is_rank_zero = self._told = False
        weakref.finalize(self, _discard, self._state_file, self._home)

    def __getstate__(self) -> dict[str, Any]:
        """A copy, and a pickle, hold no trainer, nor anything of its fit."""
        return {**vars(self), **dict.fromkeys(set(vars(self)) & _OF_A_FIT)}

    def settings(self) -> dict[str, Any]:
        """Facts known before the first step; logged as parameters `defend/<name>`."""
        return {}

    def results(self) -> dict[str, Any]:
        """Facts known after the last step; they go to the card."""
        return {}

    def state_to_send(self) -> dict[str, Any]:
        """What must outlive a fit that ran in another process, as plain data."""
        return {}

    def receive_state(self, state: dict[str, Any]) -> None:
        """Take up what `state_to_send` gave in that process."""

    def fetch_state(self, *, in_copy: bool = False) -> None:
        """Take up what a fit in another process left, if one did.

        Args:
            in_copy: also where this object is itself such a copy (at the start of its fit).
        """
        file = Path(self._state_file)
        if (in_copy or os.getpid() == self._home) and file.exists():
            self.receive_state(json.loads(file.read_text()))
            if os.getpid() == self._home:
                file.unlink()

    def send_state(self) -> None:
        """In a copy on rank 0: leave what it learned so far. Elsewhere: nothing."""
        if os.getpid() == self._home or not self._is_rank_zero:
            return
        state = self.state_to_send()
        if not state:
            return
        # Written whole or not at all: a reader never sees half a file, and a crash loses nothing.
        draft = Path(f"{self._state_file}.{os.getpid()}")
        draft.write_text(json.dumps(state))
        draft.replace(self._state_file)

    def clean_up(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave trainer and module as they were. Called at the end of a fit, also a failed one."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._writes_evidence(trainer):
            from defend.callbacks import _evidence

            _evidence.log_settings(trainer, _gather(trainer, "settings"))
            self._told = True

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._writes_evidence(trainer):
            from defend.callbacks import _evidence

            _evidence.log_card(trainer, _gather(trainer, "settings"), _gather(trainer, "results"))

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        check_version(trainer)
        self._is_rank_zero = trainer.is_global_zero

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._end(trainer, pl_module)
        self.send_state()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        # Lightning calls this instead of `teardown` when a run fails; for spawned processes, in the
        # original only.
        self.fetch_state()
        if self._told:  # what was told may not hold any more
            from defend.callbacks import _evidence

            _evidence.tag_private(trainer, _gather(trainer, "settings"))
        self._end(trainer, pl_module)

    def _end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._told = False
        PatchedStrategy.unwrap(trainer)
        self.clean_up(trainer, pl_module)

    def _writes_evidence(self, trainer: pl.Trainer) -> bool:
        return trainer.is_global_zero and _ours(trainer)[-1] is self


def _discard(state_file: str, home: int) -> None:
    if os.getpid() == home:
        Path(state_file).unlink(missing_ok=True)


def _ours(trainer: pl.Trainer) -> list[DefendCallback]:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
    return [c for c in callbacks if isinstance(c, DefendCallback)]


def _gather(trainer: pl.Trainer, what: str) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for callback in _ours(trainer):
        facts.update(getattr(callback, what)())
    return facts


def describe_attack(attack: Any) -> dict[str, Any]:
    """The threat model of an attack, as far as the attack tells."""
    ball = getattr(attack, "ball", None)
    restarts = getattr(attack, "restarts", 1)
    facts = {
        "attack": _name_of(attack),
        "ball": getattr(ball, "name", None),
        "eps": getattr(ball, "eps", getattr(attack, "eps", None)),
        "attack_steps": getattr(attack, "steps", None),
        "attack_step_size": getattr(attack, "effective_step_size", None),
        "attack_loss": _loss_of(attack),
        "attack_restarts": None if restarts == 1 else restarts,
        "replays": attack.replays if getattr(attack, "uses_training_gradient", False) else None,
        "inputs": getattr(attack, "inputs", None),
        "attack_settings": brief(attack) if dataclasses.is_dataclass(attack) else None,
    }
    return {
        name: brief(value) if dataclasses.is_dataclass(value) else value
        for name, value in facts.items()
        if value is not None
    }


def _name_of(attack: Any) -> str:
    """Its class; for one that stands for many, with the name of the one."""
    kind = getattr(attack, "__name__", type(attack).__name__)
    name = getattr(attack, "name", None)
    return f"{kind}({name})" if isinstance(name, str) else kind


def _loss_of(attack: Any) -> Any:
    loss = getattr(attack, "loss", None)
    return loss if loss is None or isinstance(loss, str) else brief(loss)


def brief(value: Any) -> str:
    """`repr` in short: of a dataclass only what is not its default, of a function its name."""
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return getattr(value, "__qualname__", None) or repr(value)
    parts = []
    for field in dataclasses.fields(value):
        given = getattr(value, field.name)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            parts.append(brief(given))
        elif given != _default_of(field):
            parts.append(f"{field.name}={brief(given)}")
    return f"{type(value).__name__}({', '.join(parts)})"


def _default_of(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default
