"""The ledger: a file that holds every private step before it is taken, and loses none in a crash.

One line of JSON for each step, each with the SHA-256 of its own text and of the line before it:

    digest_n = SHA-256(digest_{n-1} ‖ line n without its digest),  digest_0 = ""

One file is one lineage: all fits and resumes of one training on one data set. A checkpoint keeps an
`Anchor`, the number and the digest of the line that was the last one when it was saved.

*Guarantee.* When `charge` returns, the step is on disk as far as the system's fdatasync reaches. A
process killed at any moment leaves a ledger that counts every step that was taken and at most one
that was not.

What the chain shows: a line changed, dropped, put in or moved anywhere, and, with the anchor of a
checkpoint, a file that ends before it or another run's file. What it cannot show: lines cut off
exactly at a line's end beyond the newest anchor; a file put back together with an older
checkpoint; and, as there is no key, whoever computes the whole file and the anchors anew. It is a
guard against accidents and careless edits. For more, keep the newest anchor where the trainer
cannot write.

The lines hold settings and counts, no seeds and no noise.
"""

import errno
import hashlib
import json
import math
import os
import uuid
import weakref
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from defend.errors import InputError, PrivacyError
from defend.privacy.accounting import History, Segment

try:
    import fcntl
except ImportError:
    # Windows has no flock. Two runs on one ledger are then told apart only by the length of the
    # file, which is compared before each line is written.
    fcntl = None  # type: ignore[assignment]

_HEAD = b'{"kind": "ledger", "version": 1, "id": "'  # how every ledger starts
_SEAL = b', "digest": "%s"}'  # how every line ends
_SEAL_LENGTH = len(_SEAL % (b"0" * 64))
_SETTINGS = ("noise_multiplier", "sample_rate", "max_grad_norm")

_encode = json.JSONEncoder(allow_nan=False).encode  # made once: `json.dumps` makes one a call
_sync = getattr(os, "fdatasync", os.fsync)  # the length of the file is flushed by either


@dataclass(frozen=True)
class Anchor:
    """Where a ledger stood. `dataclasses.asdict` makes it plain data for a checkpoint.

    Attributes:
        lines: lines that the ledger had, ≥ 1.
        digest: the digest of the last of them, 64 hexadecimal digits.

    Raises:
        InputError: if `lines` is less than 1.
    """

    lines: int
    digest: str

    def __post_init__(self) -> None:
        if not self.lines >= 1:
            raise InputError(
                f"Expected an anchor with `lines` ≥ 1, got {self.lines}. Take it from a ledger."
            )


def spent(entries: Iterable[dict[str, Any]]) -> dict[str, History]:
    """The steps of each fit among the lines of a ledger, in order of first appearance."""
    fits: dict[str, list[Segment]] = {}
    for entry in entries:
        _count(fits, entry)
    return {name: tuple(segments) for name, segments in fits.items()}


def _count(fits: dict[str, list[Segment]], entry: dict[str, Any]) -> None:
    # As `accounting.extend` would, in place: a ledger may have 1e5 lines, each with its own σ.
    if entry["kind"] == "fit":
        fits.setdefault(entry["fit"], [])
    elif entry["kind"] == "step":
        segments = fits.setdefault(entry["fit"], [])
        sigma, rate = entry["noise_multiplier"], entry["sample_rate"]
        same = segments and segments[-1][:2] == (sigma, rate)
        before = segments.pop().steps if same else 0
        segments.append(Segment(sigma, rate, before + 1))


def read_ledger(path: str | Path, *, anchor: Anchor | None = None) -> list[dict[str, Any]]:
    """All lines of a ledger, verified, for reviewers. It may be written to at the same time.

    Args:
        path: the file.
        anchor: where it stood at some time, from a checkpoint; None checks the chain alone.

    Returns:
        One dict a line, its digest included: first one with kind "ledger", then "fit" and "step".
        A last line that is not whole (yet) is left out; `Ledger.open` counts it as a step.

    Raises:
        PrivacyError: if the file is missing, empty, no ledger, edited, cut short, or another one.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise _missing(path) from None
    entries, _ = _verify(raw, path, anchor)
    if not entries:
        raise _empty(path)
    return entries


def _seal(entry: dict[str, Any], before: str) -> tuple[bytes, str]:
    """The line of an entry that follows the digest `before`, and its own digest."""
    body = _encode(entry).removesuffix("}").encode()  # floats by repr: exact
    digest = _digest(before.encode(), body)
    return body + _SEAL % digest + b"\n", digest.decode()


def _digest(before: bytes, body: bytes) -> bytes:
    return hashlib.sha256(before + body).hexdigest().encode()


def _verify(raw: bytes, path: Path, anchor: Anchor | None) -> tuple[list[dict[str, Any]], int]:
    """The lines of a ledger and the bytes they fill; what is left over is a torn last line."""
    if not raw.startswith(_HEAD) and not _HEAD.startswith(raw):  # torn in its first line
        raise PrivacyError(
            f"Expected a privacy ledger of version 1, got {path}, which does not start like one. "
            "Give the path of the ledger, or one where no file is yet."
        )
    lines = raw.split(b"\n")[:-1]
    if lines and not _is_json(lines[-1]):
        lines.pop()
    digest = b""
    for number, line in enumerate(lines, 1):
        digest = _digest(digest, line[:-_SEAL_LENGTH])
        if line[-_SEAL_LENGTH:] != _SEAL % digest:
            raise PrivacyError(
                f"Expected the lines of {path} as they were written, got another line {number}: "
                "its digest does not match. Put back an unedited copy; without one ε is not known, "
                "so train anew with a new ledger."
            )
    entries = json.loads(b"[%s]" % b",".join(lines))  # at once: half the time of one by one
    if anchor is not None:
        _check_anchor(entries, path, anchor)
    return entries, sum(map(len, lines)) + len(lines)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _check_anchor(entries: list[dict[str, Any]], path: Path, anchor: Anchor) -> None:
    if len(entries) < anchor.lines:
        raise PrivacyError(
            f"Expected at least {anchor.lines} lines in {path}, as when the checkpoint was saved, "
            f"got {len(entries)} whole ones. The file was cut short; put back the full one."
        )
    if entries[anchor.lines - 1]["digest"] != anchor.digest:
        raise PrivacyError(
            f"Expected the ledger that the checkpoint was saved with, got {path}, whose line "
            f"{anchor.lines} is another. It belongs to another run, or was rewritten. Give the "
            "ledger of the run that saved the checkpoint."
        )


def _missing(path: Path) -> PrivacyError:
    return PrivacyError(
        f"Expected the ledger of an earlier run at {path}, got no file. Without it the steps taken "
        "since the checkpoint are not known; put it back, or correct the path."
    )


def _empty(path: Path) -> PrivacyError:
    return PrivacyError(
        f"Expected a ledger with lines at {path}, got a file without one. Its content was lost; "
        "put back a copy."
    )


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
        self.facts: dict[str, dict[str, Any]] = {}
        self._descriptor: int | None = descriptor
        self._fits: dict[str, list[Segment]] = {}
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
        """Whether any fit used a fixed seed."""
        return any(facts["insecure"] for facts in self.facts.values())

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
        if taken := {"kind", "digest"} & set(facts):
            raise InputError(f"Expected facts under other names, got {sorted(taken)}. Rename them.")
        try:
            plain = json.loads(_encode({"kind": "fit", "fit": fit, "insecure": insecure, **facts}))
        except (TypeError, ValueError) as error:
            raise InputError(
                f"Expected facts that JSON can hold, got {facts}: {error}. Use str, int, bool, "
                "None, finite floats, and lists or dicts of them."
            ) from None
        self._append(plain)

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
        settings = (float(noise_multiplier), float(sample_rate), float(max_grad_norm))
        _check_settings(*settings)
        self._append({"kind": "step", "fit": fit, **dict(zip(_SETTINGS, settings, strict=True))})

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
        entries, self._end = _verify(raw, self.path, anchor)
        for entry in entries:
            self._take(entry)
        if not entries and must_exist:
            raise _empty(self.path)
        if self._end < len(raw):
            # A crash between cutting and writing loses the mark of a crash, never a step.
            os.ftruncate(self._descriptor, self._end)
        if not entries:
            self._append({"kind": "ledger", "version": 1, "id": uuid.uuid4().hex})
            _sync_folder(self.path.parent)
        elif self._end < len(raw):
            self._append(_instead_of_torn(entries))

    def _append(self, entry: dict[str, Any]) -> None:
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
        line, digest = _seal(entry, self._digest)
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

    def _take(self, entry: dict[str, Any]) -> None:
        self._lines += 1
        self._digest = entry["digest"]
        _count(self._fits, entry)
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


def _instead_of_torn(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """A step at the settings that were last seen, in a step or in the facts of a fit."""
    for entry in reversed(entries):
        if all(isinstance(entry.get(name), int | float) for name in _SETTINGS):
            return {"kind": "step", **{n: entry[n] for n in ("fit", *_SETTINGS)}, "torn": True}
    # No step was taken before, and no σ is known for this one, if it was a step. Nothing can be
    # charged, and nothing was spent: `charge` had not returned. The mark is for reviewers.
    return {"kind": "note", "torn": True}


def _check_settings(noise_multiplier: float, sample_rate: float, max_grad_norm: float) -> None:
    for right, what, got in (
        (0 <= noise_multiplier < math.inf, "`noise_multiplier` to be ≥ 0", noise_multiplier),
        (0 < sample_rate <= 1, "`sample_rate` to be in (0, 1]", sample_rate),
        (0 < max_grad_norm < math.inf, "`max_grad_norm` to be > 0", max_grad_norm),
    ):
        if not right:
            raise InputError(f"Expected {what}, got {got}. Charge what the step will use.")


def _open_locked(path: Path, *, create: bool) -> int:
    flags = os.O_RDWR | os.O_APPEND | getattr(os, "O_BINARY", 0)
    if create:
        path.parent.mkdir(parents=True, exist_ok=True)
        flags |= os.O_CREAT
    try:
        descriptor = os.open(path, flags, 0o644)
    except FileNotFoundError:
        raise _missing(path) from None
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
