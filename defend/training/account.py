"""The account of a private training, kept on disk: a budget that no crash can refund."""

import uuid
import weakref
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from defend.errors import PrivacyError
from defend.privacy.accounting.budget import FitBudget
from defend.privacy.accounting.history import History
from defend.privacy.accounting.ledger import Anchor, Ledger
from defend.training.config import Privacy
from defend.training.processes import Processes

# Models that were trained privately in this process: their fits, the digest of their data, and ε.
_TRAINED: MutableMapping[nn.Module, tuple[set[str], str, Callable[[], float]]] = (
    weakref.WeakKeyDictionary()
)


class Account:
    """A `Budget` and the ledger that each of its charges is written to first. It outlives fits.

    Args:
        settings: what the user asked for.
        default_folder: folder of the ledger where `settings.ledger` is None; may be set later.

    Attributes:
        budget: what may be spent and what was.
        anchor: where the ledger stood last; None before the first fit, or without a ledger.
    """

    def __init__(self, settings: Privacy, default_folder: Path | None = None) -> None:
        self.settings = settings
        self.default_folder = default_folder
        self.budget = settings.budget()
        self.anchor: Anchor | None = None
        self._name: str | None = None

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

    @contextmanager
    def open(
        self, processes: Processes, *, sample_rate: float, planned: float, done: int
    ) -> Iterator["FitAccount"]:
        """Take up all that the ledger knows, on every process, and fix σ for a fit.

        Raises:
            PrivacyError: if the ledger is missing, locked or changed; see `Ledger.open`.
            InputError: if no σ meets the target; see `Budget.open`.
        """
        if self.settings.ledger is None and self._name is None:
            self._name = processes.broadcast(f"{uuid.uuid4().hex}.jsonl")
        path = self.path
        ledgers: list[Ledger] = []  # one on the first process, where there is to be one

        def read() -> tuple[dict[str, History], bool]:
            assert path is not None
            path.parent.mkdir(parents=True, exist_ok=True)
            ledgers.append(Ledger.open(path, anchor=self.anchor))
            return ledgers[0].fits, ledgers[0].insecure

        try:
            if path is not None:
                fits, insecure = processes.from_first(read)
                self.budget.unite(fits, insecure=insecure)
            fit = self.budget.open(sample_rate=sample_rate, planned=planned, done=done)
            yield FitAccount(self, fit, ledgers)
        finally:
            for ledger in ledgers:
                ledger.close()

    def state_dict(self) -> dict[str, Any]:
        """What was spent and where the ledger stood, as plain data; holds no secret."""
        anchor = None if self.anchor is None else asdict(self.anchor)
        return {**self.budget.state_dict(), "ledger": self._name, "anchor": anchor}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Unite with what a checkpoint spent; what is known here is not forgotten."""
        self.budget.merge(dict(state))
        if state["ledger"] is not None:
            self._name = state["ledger"]
        if state["anchor"] is not None:
            self.anchor = Anchor(**state["anchor"])


class FitAccount:
    """The account while a fit is open. `Account.open` makes it.

    Attributes:
        budget: what this fit may spend.
        ledgers: the open ledger, on the process that writes it; empty elsewhere and without one.
    """

    def __init__(self, account: Account, budget: FitBudget, ledgers: list[Ledger]) -> None:
        self._account, self.budget, self.ledgers = account, budget, ledgers

    def begin(self, processes: Processes, **facts: Any) -> None:
        """Head this fit's steps in the ledger with what holds for all of them."""
        settings = self._account.settings

        def write() -> None:
            for ledger in self.ledgers:
                ledger.begin(
                    self.budget.name,
                    insecure=settings.insecure_seed is not None,
                    noise_multiplier=self.budget.next_noise,
                    sample_rate=self.budget.sample_rate,
                    delta=settings.delta,
                    accountant=settings.accountant,
                    **facts,
                )
                self._account.anchor = ledger.anchor

        processes.from_first(write)

    def doubt(self, since: int) -> None:
        """Mark the account, and its ledger, as not private: a step was found to be unsound.

        Args:
            since: steps of this fit after which nothing was found for the last time.
        """
        self.budget.budget.doubt()
        for ledger in self.ledgers:
            ledger.doubt(self.budget.name, since=since)
            self._account.anchor = ledger.anchor

    def charge(self, noise_multiplier: float, max_grad_norm: float) -> int:
        """On disk first, then in memory; only then may the step be noised and taken.

        Raises:
            BudgetError: if the step would exceed the target; nothing is written then.
        """
        self.budget.check()
        for ledger in self.ledgers:
            ledger.charge(
                self.budget.name,
                noise_multiplier=noise_multiplier,
                sample_rate=self.budget.sample_rate,
                max_grad_norm=max_grad_norm,
            )
            self._account.anchor = ledger.anchor
        return self.budget.charge(noise_multiplier)


def claim(module: nn.Module, digest: str, fit: FitBudget) -> None:
    """One model, one data set, one account: `module` is trained on such data under this one.

    Raises:
        PrivacyError: if another account, whose fits this one does not hold, trained the same model
            on the same data before. Only an exact digest ("sha256:") can tell.
    """
    earlier = _TRAINED.get(module)
    if earlier is not None and digest.startswith("sha256:"):
        fits, data, epsilon = earlier
        if data == digest and not fits <= fit.names:
            raise PrivacyError(
                f"Expected the account of this model to go on (ε = {epsilon():.4g} on the same "
                "data so far), got a new one that starts at 0. Go on with the same callback, "
                "pass that run's state, or give both the same `ledger`."
            )
    budget = fit.budget
    _TRAINED[module] = (fit.names, digest, lambda: budget.epsilon)
