"""One model on one data set has one account: which one goes on when a fit begins.

A model is known by its weights (`accounting.known_weights`), in the ledgers that can be found:
those in the folder where a new one would be, the one that is asked for, and those that this process
has used. Where it was trained on the same data before, the account of that training goes on.
"""

import atexit
import gc
import sys
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from defend.errors import PrivacyError
from defend.privacy.accounting.fingerprint import DataIdentity
from defend.privacy.accounting.known_weights import Known, Origins, known_to, weight_digests

_NO_DATA = DataIdentity("size:", "size:")  # of a fit that no line tells of


class _Notes(Protocol):
    def note_weights(self) -> None:
        """Make what is trained now known."""


@dataclass
class ThisProcess:
    """What this process did: its ledgers, its models, and fits without a ledger.

    Attributes:
        ledgers: files that it wrote to or resumed from.
        unwritten: what is known of fits without a ledger.
        moved: parameter → how it started, the last fit of its model, and the data it saw. It tells
            of a model that was changed after its fit: averaged, merged, so that no ledger has it.
        open: fits that are not over.
    """

    ledgers: set[Path] = field(default_factory=set)
    unwritten: Known = field(default_factory=Known)
    moved: WeakIdKeyDictionary = field(default_factory=WeakIdKeyDictionary)
    open: "weakref.WeakSet[_Notes]" = field(default_factory=weakref.WeakSet)

    def note_open(self) -> None:
        """Whatever fits are not over: make known what they trained so far."""
        for fit in list(self.open):
            fit.note_weights()

    def note_moved(self, parameter: Tensor, start: str, fit: str, origins: Origins) -> None:
        """A fit may have moved a parameter of a model that lives in this process.

        One that was frozen is as it started, until someone merges what was trained into it.
        """
        begun, _, seen = self.moved.get(parameter, (start, fit, {}))
        self.moved[parameter] = (begun, fit, {**seen, **origins})


THIS_PROCESS = ThisProcess()
atexit.register(THIS_PROCESS.note_open)  # of loops that nobody closed

_collecting = False


def _note_collection(phase: str, _: object) -> None:
    global _collecting
    _collecting = phase == "start"


gc.callbacks.append(_note_collection)


def is_collecting() -> bool:
    """Whether Python gathers what nobody holds, loops that nobody closed among it.

    A generator's `finally` runs then, too. PyTorch aborts the process where it touches tensors
    that are about to go (2.13, `use_count() == 1` in THPVariable_clear).
    """
    return _collecting or sys.is_finalizing()


@dataclass(frozen=True)
class Beginning:
    """How a fit begins.

    Attributes:
        start: parameter → digest.
        continues: the ledger whose account goes on, instead of a new one; None: as was asked for.
        before: fits in other accounts, and their data, that gave weights.
    """

    start: Mapping[str, str]
    continues: Path | None
    before: Origins


@dataclass(frozen=True)
class Asked:
    """The account that a fit would have if its model was not known.

    Attributes:
        data: what it trains on.
        ledger: as in the settings.
        path: of its ledger; None where there is none, or a new one.
        fits: names of the fits that it holds, beside those in its ledger.
        folders: where ledgers are looked for.
    """

    data: DataIdentity
    ledger: object
    path: Path | None
    fits: frozenset[str]
    folders: tuple[Path, ...]


def begin(module: nn.Module, asked: Asked) -> Beginning:
    """Find out whether the weights of a module are known, and which account goes on.

    Raises:
        PrivacyError: if one is to go on that cannot, or if it cannot be told whether.
    """
    THIS_PROCESS.note_open()
    start = weight_digests(module.named_parameters())
    ledgers = _ledgers(asked)
    newest_last = sorted(ledgers.values(), key=lambda known: known.written)
    sources = [THIS_PROCESS.unwritten, *newest_last]
    origins = _origins(start.values(), sources, _own_fits(asked, ledgers))
    told = {digest for known in sources for digest in known.weights}
    for name, parameter in module.named_parameters():
        begun, _, seen = THIS_PROCESS.moved.get(parameter, (None, None, {}))
        if seen and start.get(name) not in (begun, *told):
            origins = {**seen, **origins}
    continues = _continued(origins, asked, ledgers)
    before = {fit: data for fit, data in origins.items() if asked.data.same_as(data) is not True}
    return Beginning(start, continues, before)


def _origins(digests: Iterable[str], sources: Sequence[Known], own: set[str]) -> Origins:
    """The fits that weights come from, and those before them.

    Runs without noise, or with one seed, give equal weights: for each tensor, and all fits on the
    same data that gave it, one account is enough.

    Args:
        digests: of the weights.
        sources: what is known, the best ledger last.
        own: fits of the account that is asked for; where one explains a tensor, others need not.
    """
    facts = {fit: seen for known in sources for fit, seen in known.fits.items()}
    givers = [{f for known in sources for f in known.weights.get(d, ())} for d in set(digests)]
    accounts, found = set(own), set[str]()
    for fits in sorted(givers, key=len):  # those that leave a choice come last
        by_data: dict[str, set[str]] = {}
        for fit in fits:
            by_data.setdefault(facts.get(fit, {}).get(fit, _NO_DATA).digest, set()).add(fit)
        for alike in by_data.values():
            if not alike & accounts:
                accounts |= _newest(alike, sources)
            found |= alike & accounts
    origins: Origins = {}
    for fit in found:
        origins |= facts.get(fit, {fit: _NO_DATA})
    return origins


def _newest(fits: set[str], sources: Sequence[Known]) -> set[str]:
    """All fits of the best ledger that holds one of these; of those without a ledger, the last."""
    for known in reversed(sources):
        held = [fit for fit in known.fits if fit in fits]
        if held:
            return set(held[-1:] if known is sources[0] else known.fits)
    return fits


def _own_fits(asked: Asked, ledgers: Mapping[Path, Known]) -> set[str]:
    here = None if asked.path is None else ledgers.get(asked.path.absolute())
    return set(asked.fits) | set(() if here is None else here.fits)


def _ledgers(asked: Asked) -> dict[Path, Known]:
    """All ledgers that can be found, and what they know."""
    paths = {*THIS_PROCESS.ledgers}
    if asked.path is not None:
        paths.add(asked.path.absolute())
    for folder in asked.folders:
        paths |= set(folder.absolute().glob("*.jsonl"))
    found = {path: known_to(path) for path in sorted(paths)}
    return {path: known for path, known in found.items() if known is not None}


def _continued(origins: Origins, asked: Asked, ledgers: Mapping[Path, Known]) -> Path | None:
    """The ledger that goes on instead of what was asked for; None where that is as it should be."""
    own = _own_fits(asked, ledgers)
    same = {fit for fit, data in origins.items() if asked.data.same_as(data)}
    for fit, data in origins.items():
        if fit not in own and asked.data.same_as(data) is None:
            raise _untold(asked.data, data)
    missing = same - own
    if not missing:
        return None
    holders = [path for path, known in ledgers.items() if same <= set(known.fits)]
    if asked.ledger is None and not own and holders:
        # A copy of a ledger, perhaps of an earlier day, is the same account.
        return max(holders, key=lambda path: (len(ledgers[path].fits), ledgers[path].size))
    raise _not_continued(missing, own & same, asked, holders, ledgers)


def _untold(here: DataIdentity, known: DataIdentity) -> PrivacyError:
    return PrivacyError(
        "Expected to know whether these are the data that this model was trained on before, got "
        f"{here.digest} after {known.digest}: other content, of which not all is known, or another "
        f'subset. If they are the same, or overlap, pass data_id="{known.digest}". If no record is '
        "in both, pass a new name for them as `data_id`."
    )


def _not_continued(
    missing: set[str],
    held: set[str],
    asked: Asked,
    holders: list[Path],
    ledgers: Mapping[Path, Known],
) -> PrivacyError:
    """The error for an account that has to go on and cannot, with the way forward."""
    places = sorted({str(p) for p, known in ledgers.items() if missing & set(known.fits)})
    where = f" in {' and '.join(places)}" if places else ""
    if holders:
        got = "`ledger=False`" if asked.ledger is False else "another one"
        cure = f"Pass ledger={str(holders[-1])!r}, to a new callback or loop without a state."
    elif held or len(places) > 1:
        got = "weights of several accounts, which cannot go on as one"
        cure = "Start the weights of all but one of them from public values."
    elif missing & set(THIS_PROCESS.unwritten.fits):
        got = "a new one that starts at 0, and no ledger of it"
        cure = "Go on with the same callback, or pass that run's state."
    else:
        got = "none of its ledgers"
        cure = "Put it back, or pass its path as `ledger`."
    return PrivacyError(
        f"Expected the account of this model to go on, which was trained on the same data before"
        f"{where}, got {got}. {cure}"
    )
