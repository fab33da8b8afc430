"""The ledger: a file that holds every private step before it is taken, and loses none in a crash.

One file is one lineage: all fits and resumes of one training on one data set. Its lines and their
chain are in `ledger_lines`; here is the open file. A checkpoint keeps an `Anchor`, the number and
the digest of the line that was the last one when it was saved.

*Guarantee.* When `charge` returns, the step is on disk as far as the system's fdatasync reaches. A
process killed at any moment leaves a ledger that counts every step that was taken and at most one
that was not.
"""

import errno
import os
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from defend.errors import InputError, PrivacyError
from defend.privacy.accounting import ledger_lines as lines
from defend.privacy.accounting.history import History, Segment
from defend.privacy.accounting.ledger_lines import Anchor, Entry, read_ledger, spent

__all__ = ["Anchor", "Ledger", "read_ledger", "spent"]

try:
    import fcntl
except ImportError:
    # Windows has no flock. Two runs on one ledger are then told apart only by the length of the
    # file, which is compared before each line is written.
    fcntl = None  # type: ignore[assignment]

_sync = getattr(os, "fdatasync", os.fsync)  # the length of the file is flushed by either


class Ledger:
    """The open ledger of a training run, locked for this process. Use `Ledger.open`.

        with Ledger.open(path, anchor=anchor) as ledger:
            ledger.begin(name, insecure=False, delta=1e-5)
            for batch in batches:
                ledger.charge(name, noise_multiplier=σ, sample_rate=q, max_grad_norm=C)
                ...                         # only now the step
            state["ledger"] = asdict(ledger.anchor)

    Once a line could not be written, or something else changed the file, the ledger is of no more
    use; open it again. It stays with the process that opened it: a forked child finds it closed,
    and it cannot be pickled or copied.

    Attributes:
        path: the file.
        facts: what `begin` was told of each fit.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self.facts: dict[str, Entry] = {}
        self._descriptor: int | None = descriptor
        self._fits: dict[str, list[Segment]] = {}
        self._doubted = False
        self._lines = 0
        self._digest = ""
        self._end = 0  # bytes
        _open_ledgers.add(self)

    @classmethod
    def open(
        cls, path: str | Path, *, anchor: Anchor | None = None, must_exist: bool = False
    ) -> Self:
        """Lock a ledger, verify it, mend its last line; or start a new one.

        A last line that is not whole was being written in a crash. No step can have followed, as
        `charge` had not returned, but from the file alone that cannot be told: a line that charges
        one step takes its place, at the settings last seen.

        Args:
            path: the file; folders are made where they are missing.
            anchor: where the ledger stood when the checkpoint was saved that is resumed from. Lines
                after it are fine: a rollback refunds nothing.
            must_exist: whether a missing or empty file is an error; with an anchor it always is.

        Returns:
            The ledger, locked until `close`.

        Raises:
            PrivacyError: if the file is missing although expected, cut short, edited, another
                run's, no ledger, or in use by another process.
        """
        path = Path(path)
        must_exist = must_exist or anchor is not None
        ledger = cls(path, _open_locked(path, create=not must_exist))
        try:
            ledger._load(anchor, must_exist)
        except BaseException:
            ledger.close()
            raise
        return ledger

    @property
    def anchor(self) -> Anchor:
        """The last line; to be kept in every checkpoint."""
        return Anchor(self._lines, self._digest)

    @property
    def fits(self) -> dict[str, History]:
        """The steps of each fit, in order of first appearance."""
        return {name: tuple(segments) for name, segments in self._fits.items()}

    @property
    def insecure(self) -> bool:
        """Whether any fit used a fixed seed, or was found to be unsound."""
        return self._doubted or any(facts["insecure"] for facts in self.facts.values())

    def begin(self, fit: str, *, insecure: bool, **facts: Any) -> None:
        """Write down a fit before its first step.

        Args:
            fit: its name, new in this ledger.
            insecure: whether its noise or sampling use a fixed seed.
            facts: what a reviewer wants to know (delta, accountant, records, data_digest,
                sampling, adjacency, …): anything that JSON holds, and no secret. With
                `noise_multiplier`, `sample_rate` and `max_grad_norm` among them a first step that
                was torn by a crash is charged too.

        Raises:
            InputError: if the name is taken, or a fact is not plain data.
            PrivacyError: if the line cannot be written.
        """
        if fit in self._fits:
            raise InputError(f"Expected a new name for a fit, got {fit!r} again. Use another.")
        self._append(lines.fit_line(fit, insecure=insecure, facts=facts))

    def charge(
        self, fit: str, *, noise_multiplier: float, sample_rate: float, max_grad_norm: float
    ) -> None:
        """Charge one step. It may be taken once this returns, and not if it raises.

        Args:
            fit: a fit that was begun.
            noise_multiplier: σ ≥ 0, in units of C.
            sample_rate: q in (0, 1].
            max_grad_norm: C > 0.

        Raises:
            InputError: if the fit is unknown or a setting is out of range.
            PrivacyError: if the line cannot be written; nothing of it stays in the file.
        """
        if fit not in self._fits:
            raise InputError(f"Expected the name of a fit, got {fit!r}. Call `begin` first.")
        self._append(lines.step_line(fit, (noise_multiplier, sample_rate, max_grad_norm)))

    def doubt(self, fit: str, *, since: int) -> None:
        """Write down that what a fit spent is not known, from one of its steps on.

        Args:
            fit: a fit that was begun.
            since: how many of its steps still hold.

        Raises:
            PrivacyError: if the line cannot be written.
        """
        self._append({"kind": "note", "fit": fit, "doubted_since": since})

    def note_weights(self, fit: str, weights: dict[str, str]) -> None:
        """Write down what a fit made of weights, to know them again (`known_weights`).

        Args:
            fit: a fit that was begun.
            weights: name → short digest.

        Raises:
            PrivacyError: if the line cannot be written.
        """
        self._append({"kind": "note", "fit": fit, "weights": weights})

    @property
    def closed(self) -> bool:
        """Whether no line can be written any more."""
        return self._descriptor is None

    def close(self) -> None:
        """Give the lock back. Closing twice is fine."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            try:
                if fcntl is not None:
                    fcntl.flock(descriptor, fcntl.LOCK_UN)
            finally:
                os.close(descriptor)

    def _load(self, anchor: Anchor | None, must_exist: bool) -> None:
        assert self._descriptor is not None
        with open(self._descriptor, "rb", closefd=False) as file:
            raw = file.read()
        entries, self._end = lines.verify(raw, self.path, anchor, must_exist=must_exist)
        for entry in entries:
            self._take(entry)
        if self._end < len(raw):
            # A crash between cutting and writing loses the mark of a crash, never a step.
            os.ftruncate(self._descriptor, self._end)
        if not entries:
            self._append(lines.first_line())
            _sync_folder(self.path.parent)
        elif self._end < len(raw):
            self._append(lines.instead_of_torn(entries))

    def _append(self, entry: Entry) -> None:
        """Write one line and flush it to disk, or leave the file as it was and close."""
        descriptor = self._descriptor
        if descriptor is None:
            raise PrivacyError(
                f"Expected an open ledger, got {self.path} closed, by `close`, a failed write or a "
                "fork. Open it with Ledger.open in the process that trains."
            )
        if (size := os.fstat(descriptor).st_size) != self._end:
            raise PrivacyError(
                f"Expected {self.path} to have {self._end} bytes, as this run left it, got {size}. "
                "Something else writes to it, or a write was interrupted. Close and open it again."
            )
        line, digest = lines.seal(entry, self._digest)
        try:
            written = os.write(descriptor, line)
            if written < len(line):
                raise OSError(errno.ENOSPC, f"{written} of {len(line)} bytes were written")
            _sync(descriptor)
        except BaseException as error:  # an interrupt too: the caller takes no step
            with suppress(OSError):
                os.ftruncate(descriptor, self._end)
                _sync(descriptor)
            self.close()  # after a failed flush nobody knows what the disk holds
            if isinstance(error, OSError):
                raise PrivacyError(
                    f"Expected to write the step to {self.path} before it is taken, got: {error}. "
                    "It was not taken. Make room on the disk, then resume."
                ) from error
            raise
        self._take({**entry, "digest": digest})
        self._end += len(line)  # last: whatever interrupts before, the next line is refused

    def _take(self, entry: Entry) -> None:
        self._lines += 1
        self._digest = entry["digest"]
        lines.count(self._fits, entry)
        self._doubted |= "doubted_since" in entry
        if entry["kind"] == "fit":
            held = ("kind", "fit", "digest")
            self.facts[entry["fit"]] = {k: v for k, v in entry.items() if k not in held}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def __reduce__(self) -> Any:
        raise PrivacyError(
            f"Expected one writer of {self.path}, got a copy of it. Keep `anchor` and `path`, and "
            "open the ledger in the process that trains."
        )


def _open_locked(path: Path, *, create: bool) -> int:
    flags = os.O_RDWR | os.O_APPEND | getattr(os, "O_BINARY", 0)
    if create:
        path.parent.mkdir(parents=True, exist_ok=True)
        flags |= os.O_CREAT
    try:
        descriptor = os.open(path, flags, 0o644)
    except FileNotFoundError:
        raise lines.missing(path) from None
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise PrivacyError(
                f"Expected a ledger that no other run has open, got {path} locked. Wait for that "
                "run to end, or close its ledger; runs on the same data take turns."
            ) from None
        raise
    return descriptor


def _sync_folder(folder: Path) -> None:
    """Flush the name of a new file; Windows cannot open folders."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


_open_ledgers: "weakref.WeakSet[Ledger]" = weakref.WeakSet()


def _drop_inherited() -> None:
    """In a forked child (a loader's worker): a copy would hold the lock after the parent died."""
    for ledger in list(_open_ledgers):
        descriptor, ledger._descriptor = ledger._descriptor, None
        if descriptor is not None:
            os.close(descriptor)  # without unlocking: the lock is the parent's


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_drop_inherited)
