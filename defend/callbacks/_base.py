"""What all of defend's callbacks share: clean up however a run ends, and leave evidence."""

import dataclasses
import json
import os
import tempfile
import uuid
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from defend.callbacks._seams import Seams

# An `Attack`, under a name by which LightningCLI builds one from a class path: jsonargparse takes
# a protocol of a function that returns tensors for one of classes that are tensors.
BuildableAttack = Callable[..., Any]


class DefendCallback(Callback):
    """Base of defend's callbacks.

    A subclass says what it did (`settings`, `results`) and how to clean up (`clean_up`). The last
    of them in a trainer's list writes the evidence for all, so that one run has one card whatever
    callbacks it has.

    Strategies that fork or spawn (ddp_spawn, ddp_notebook) run the fit on copies of the callbacks
    and bring back none of them. What a copy learned (`carried`) would be lost, spent ε included; so
    rank 0 keeps it in a file whose name the original knows, and `receive` takes it up.
    """

    def __init__(self) -> None:
        super().__init__()
        self._home = os.getpid()
        self._mailbox = str(Path(tempfile.gettempdir(), f"defend-{uuid.uuid4().hex}.json"))
        self._is_rank_zero = False
        weakref.finalize(self, _discard, self._mailbox, self._home)

    def __getstate__(self) -> dict[str, Any]:
        """A copy, and a pickle, hold no trainer, nor anything of its fit."""
        of_a_fit = {"_trainer", "_seams", "_stopwatch"} & set(vars(self))
        return {**vars(self), **dict.fromkeys(of_a_fit)}

    def settings(self) -> dict[str, Any]:
        """Facts known before the first step; logged as parameters `defend/<name>`."""
        return {}

    def results(self) -> dict[str, Any]:
        """Facts known after the last step; they go to the card."""
        return {}

    def carried(self) -> dict[str, Any]:
        """What must outlive a fit that ran in another process, as plain data."""
        return {}

    def receive(self, carried: dict[str, Any]) -> None:
        """Take up what `carried` gave in that process."""

    def collect(self, *, in_copy: bool = False) -> None:
        """Take up what a fit in another process left, if one did.

        Args:
            in_copy: also where this object is itself such a copy (at the start of its fit).
        """
        mailbox = Path(self._mailbox)
        if (in_copy or os.getpid() == self._home) and mailbox.exists():
            self.receive(json.loads(mailbox.read_text()))
            if os.getpid() == self._home:
                mailbox.unlink()

    def post(self) -> None:
        """In a copy on rank 0: leave what it learned so far. Elsewhere: nothing."""
        if os.getpid() == self._home or not self._is_rank_zero:
            return
        carried = self.carried()
        if not carried:
            return
        # Written whole or not at all: a reader never sees half a file, and a crash loses nothing.
        draft = Path(f"{self._mailbox}.{os.getpid()}")
        draft.write_text(json.dumps(carried))
        draft.replace(self._mailbox)

    def clean_up(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave trainer and module as they were. Called at the end of a fit, also a failed one."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._writes_evidence(trainer):
            from defend.callbacks import _evidence

            _evidence.log_settings(trainer, _gather(trainer, "settings"))

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._writes_evidence(trainer):
            from defend.callbacks import _evidence

            _evidence.log_card(trainer, _gather(trainer, "settings"), _gather(trainer, "results"))

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._is_rank_zero = trainer.is_global_zero

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._end(trainer, pl_module)
        self.post()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        # Lightning calls this instead of `teardown` when a run fails; for spawned processes, in the
        # original only.
        self.collect()
        self._end(trainer, pl_module)

    def _end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        Seams.unwrap(trainer)
        self.clean_up(trainer, pl_module)

    def _writes_evidence(self, trainer: pl.Trainer) -> bool:
        return trainer.is_global_zero and _ours(trainer)[-1] is self


def _discard(mailbox: str, home: int) -> None:
    if os.getpid() == home:
        Path(mailbox).unlink(missing_ok=True)


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
        "replays": getattr(attack, "replays", None),
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
