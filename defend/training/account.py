"""The account of a private training, kept on disk: a budget that no crash can refund."""

import uuid
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from defend.privacy.accounting.history import History
from defend.privacy.accounting.ledger import Anchor, Ledger
from defend.training.processes import Processes
from defend.training.settings import PrivacySettings


class Account:
    """A `Budget` and the ledger that each of its charges is written to first.

    Args:
        settings: what the user asked for.
        default_folder: folder of the ledger where `settings.ledger` is None; may be set later.

    Attributes:
        budget: what may be spent and what was.
    """

    def __init__(self, settings: PrivacySettings, default_folder: Path | None = None) -> None:
        self.settings = settings
        self.default_folder = default_folder
        self.budget = settings.budget()
        self._name: str | None = None
        self._anchor: Anchor | None = None
        self._ledger: Ledger | None = None

    @property
    def path(self) -> Path | None:
        """Where the ledger is or will be; None where there is none, or it is not known yet."""
        asked = self.settings.ledger
        if asked is False:
            return None
        if asked is not None:
            return Path(str(asked))
        if self.default_folder is None or self._name is None:
            return None
        return self.default_folder / self._name

    def open(self, processes: Processes, *, sample_rate: float, planned: float, done: int) -> None:
        """Take up all that the ledger knows, on every process, and fix σ for a fit.

        Raises:
            PrivacyError: if the ledger is missing, locked or changed; see `Ledger.open`.
            InputError: if no σ meets the target; see `Budget.open`.
        """
        if self.settings.ledger is None and self._name is None:
            self._name = processes.broadcast(f"{uuid.uuid4().hex}.jsonl")
        path = self.path
        if path is not None:

            def read() -> tuple[dict[str, History], bool]:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._ledger = Ledger.open(path, anchor=self._anchor)
                return self._ledger.fits, self._ledger.insecure

            fits, insecure = processes.from_first(read)
            self.budget.unite(fits, insecure=insecure)
        self.budget.open(sample_rate=sample_rate, planned=planned, done=done)

    def begin(self, processes: Processes, **facts: Any) -> None:
        """Head this fit's steps in the ledger with what holds for all of them."""

        def write() -> None:
            if self._ledger is not None:
                self._ledger.begin(
                    self.budget.fit,
                    insecure=self.settings.insecure_seed is not None,
                    noise_multiplier=self.budget.next_noise,
                    sample_rate=self.budget.sample_rate,
                    delta=self.settings.delta,
                    accountant=self.settings.accountant,
                    **facts,
                )
                self._anchor = self._ledger.anchor

        processes.from_first(write)

    def charge(self, noise_multiplier: float, max_grad_norm: float) -> int:
        """On disk first, then in memory; only then may the step be noised and taken.

        Raises:
            BudgetError: if the step would exceed the target; nothing is written then.
        """
        self.budget.check()
        if self._ledger is not None:
            assert self.budget.sample_rate is not None
            self._ledger.charge(
                self.budget.fit,
                noise_multiplier=noise_multiplier,
                sample_rate=self.budget.sample_rate,
                max_grad_norm=max_grad_norm,
            )
            self._anchor = self._ledger.anchor
        return self.budget.charge(noise_multiplier)

    def close(self) -> None:
        """Close the ledger's file; safe to call twice."""
        if self._ledger is not None:
            self._ledger.close()
            self._ledger = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy, and a pickle, do not hold the open file."""
        return {**vars(self), "_ledger": None}

    def state_dict(self) -> dict[str, Any]:
        """What was spent and where the ledger stood, as plain data; holds no secret."""
        anchor = None if self._anchor is None else asdict(self._anchor)
        return {**self.budget.state_dict(), "ledger": self._name, "anchor": anchor}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Unite with what a checkpoint spent; what is known here is not forgotten."""
        self.budget.merge(dict(state))
        if state["ledger"] is not None:
            self._name = state["ledger"]
        if state["anchor"] is not None:
            self._anchor = Anchor(**state["anchor"])
