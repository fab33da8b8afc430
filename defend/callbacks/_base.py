"""What all of defend's callbacks share: clean up however a run ends, and leave evidence."""

import json
import os
import tempfile
import uuid
import weakref
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from defend.callbacks._seams import Seams


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
        """A copy, and a pickle, do not hold a trainer."""
        return {**vars(self), "_trainer": None} if "_trainer" in vars(self) else vars(self)

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
    facts = {
        "attack": type(attack).__name__,
        "ball": getattr(ball, "name", None),
        "eps": getattr(ball, "eps", None),
        "attack_steps": getattr(attack, "steps", None),
        "attack_step_size": getattr(attack, "effective_step_size", None),
        "inputs": getattr(attack, "inputs", None),
    }
    return {name: value for name, value in facts.items() if value is not None}
