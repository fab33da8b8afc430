"""The account of a private training, kept on disk: a budget that no crash can refund."""

import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from defend.errors import PrivacyError
from defend.privacy.accounting.budget import FitBudget
from defend.privacy.accounting.fingerprint import DataIdentity
from defend.privacy.accounting.history import History
from defend.privacy.accounting.known_weights import data_facts, moved_copies, moved_weights
from defend.privacy.accounting.ledger import Anchor, Ledger
from defend.training.config import Privacy
from defend.training.one_account import THIS_PROCESS, Asked, Beginning, begin, is_collecting
from defend.training.processes import Processes

_PARAMETERS_A_STEP = 16  # of one step's share of a line of weights, at the ends of passes


class Account:
    """A `Budget` and the ledger that each of its charges is written to first. It outlives fits.

    Args:
        settings: what the user asked for.
        default_folder: folder of the ledger where `settings.ledger` is None; may be set later.

    Attributes:
        budget: what may be spent and what was.
        anchor: where the ledger stood last; None before the first fit, or without a ledger.
        folders: where ledgers of the model are looked for, beside the default folder.
    """

    def __init__(self, settings: Privacy, default_folder: Path | None = None) -> None:
        self.settings = settings
        self.default_folder = default_folder
        self.budget = settings.budget()
        self.anchor: Anchor | None = None
        self.folders: tuple[Path, ...] = ()
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
        self,
        processes: Processes,
        module: nn.Module,
        data: DataIdentity,
        *,
        sample_rate: float,
        planned: float,
        done: int,
    ) -> Iterator["FitAccount"]:
        """Take up all that the ledger knows, on every process, and fix σ for a fit.

        If the module's weights are known from a training on the same data, the account of that
        training goes on (`defend.training.one_account`).

        Args:
            processes: this one among all.
            module: the model, as it is before the fit.
            data: what it trains on.
            sample_rate: q of this fit.
            planned: steps of the whole training, those done included; inf for no end.
            done: steps of that plan taken before, by a run that is resumed.

        Raises:
            PrivacyError: if the ledger is missing, locked or changed; see `Ledger.open`. If another
                account would have to go on, and cannot.
            InputError: if no σ meets the target; see `Budget.open`.
        """
        beginning = self._begin(processes, module, data)
        ledgers: list[Ledger] = []  # one on the first process, where there is to be one
        account: FitAccount | None = None
        try:
            self._take_up(processes, ledgers)
            if beginning.continues is not None and processes.rank == 0:
                self._tell(beginning.continues)
            fit = self.budget.open(sample_rate=sample_rate, planned=planned, done=done)
            account = FitAccount(self, fit, ledgers, module, data, beginning)
            if processes.rank == 0:
                THIS_PROCESS.open.add(account)
            yield account
        finally:
            if account is not None:
                account.close()
            for ledger in ledgers:
                ledger.close()

    def _begin(self, processes: Processes, module: nn.Module, data: DataIdentity) -> Beginning:
        """Settle which ledger it is, on every process."""
        own = frozenset(self.budget.fits)
        default = () if self.default_folder is None else (self.default_folder,)
        asked = Asked(data, self.settings.ledger, self.path, own, (*default, *self.folders))
        beginning: Beginning = processes.from_first(lambda: begin(module, asked))
        path = beginning.continues
        if path is not None:
            near = self.default_folder is not None and path.parent == self.default_folder.absolute()
            self._name, self.anchor = path.name if near else str(path), None
        elif self.settings.ledger is None and self._name is None:
            self._name = processes.broadcast(f"{uuid.uuid4().hex}.jsonl")
        return beginning

    def _take_up(self, processes: Processes, ledgers: list[Ledger]) -> None:
        """Open the ledger, if there is to be one, and unite with its fits."""
        path = self.path
        if path is None:
            return

        def read() -> tuple[dict[str, History], bool]:
            path.parent.mkdir(parents=True, exist_ok=True)
            ledgers.append(Ledger.open(path, anchor=self.anchor))
            THIS_PROCESS.ledgers.add(path.absolute())
            return ledgers[0].fits, ledgers[0].insecure

        fits, insecure = processes.from_first(read)
        self.budget.unite(fits, insecure=insecure)

    def _tell(self, path: Path) -> None:
        warnings.warn(
            f"This model was trained before on what counts as the same data. The account in {path} "
            f"goes on: ε = {self.budget.epsilon:.4g} was spent by {self.budget.steps} steps. "
            "docs/one_account.md says how to tell other data.",
            stacklevel=5,
        )

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

    def __init__(
        self,
        account: Account,
        budget: FitBudget,
        ledgers: list[Ledger],
        module: nn.Module,
        data: DataIdentity,
        beginning: Beginning,
    ) -> None:
        self._account, self.budget, self.ledgers = account, budget, ledgers
        self._module: nn.Module | None = module
        self._start = beginning.start
        self._facts = data_facts(data, beginning.before)
        self._origins = {budget.name: data, **beginning.before}
        self._noted: set[str] = set()
        self._noted_at = budget.next_step

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
                    **self._facts,
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

    def note_weights(self, more: Mapping[str, Tensor] | None = None) -> None:
        """Make the parameters that this fit moved known to later fits, as they are now.

        To be called wherever weights may be taken away: a checkpoint, the end of a fit.

        Args:
            more: names and values of tensors that are taken away, too. Those with the name of a
                parameter count as it, others where they look like one that moved: averages, say.

        Raises:
            PrivacyError: if they cannot be written down.
        """
        module, fit = self._module, self.budget.name
        if module is None or fit not in self.budget.budget.fits:  # it is over, or took no step
            return
        if is_collecting():  # nobody has the weights any more, or had them when a pass ended
            return
        if self._account.path is not None and all(ledger.closed for ledger in self.ledgers):
            return  # another process writes it, or a write has failed
        named = dict(module.named_parameters())
        moved = moved_weights(named.items(), self._start)
        for name in self._start.keys() & named.keys():  # frozen ones, too: they may be merged into
            THIS_PROCESS.note_moved(named[name], self._start[name], fit, self._origins)
        self._write(moved)
        if more:
            self._write(moved_weights(more.items(), self._start))
            like = [named[name] for name in moved]
            self._write(moved_copies(more.items(), like, self._start))

    def note_pass(self, *, last: bool) -> None:
        """The same at the end of a pass over the data: not at each, if passes are short.

        A line of weights is as long as some steps; so it waits for that many.
        """
        taken = self.budget.next_step - self._noted_at
        if last or taken >= len(self._start) / _PARAMETERS_A_STEP:
            self.note_weights()
            self._noted_at = self.budget.next_step

    def _write(self, weights: Mapping[str, str]) -> None:
        new = {name: digest for name, digest in weights.items() if digest not in self._noted}
        if not new:
            return
        if self._account.path is None:
            THIS_PROCESS.unwritten.fits[self.budget.name] = self._origins
            THIS_PROCESS.unwritten.note(self.budget.name, new.values())
        for ledger in self.ledgers:
            ledger.note_weights(self.budget.name, new)
            self._account.anchor = ledger.anchor
        self._noted |= set(new.values())

    def close(self) -> None:
        """The fit is over: its weights are noted for the last time. Safe to call twice."""
        try:
            self.note_weights()
        except PrivacyError as error:  # what ended the fit shall be told
            warnings.warn(f"The trained weights will not be known again: {error}", stacklevel=2)
        self._module = None

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
