"""The lines of the ledger: how one is written, sealed to the one before, and verified.

One line of JSON for each step, each with the SHA-256 of its own text and of the line before it:

    digest_n = SHA-256(digest_{n-1} ‖ line n without its digest),  digest_0 = ""

What the chain shows: a line changed, dropped, put in or moved anywhere, and, with the anchor of a
checkpoint, a file that ends before it or another run's file. What it cannot show: lines cut off
exactly at a line's end beyond the newest anchor; a file put back together with an older
checkpoint; and, as there is no key, whoever computes the whole file and the anchors anew. It is a
guard against accidents and careless edits. For more, keep the newest anchor where the trainer
cannot write.

The lines hold settings and counts, digests of the data and of released weights (lines of kind
"note", which older versions pass over), no seeds and no noise.
"""

import hashlib
import json
import math
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from defend.errors import InputError, PrivacyError
from defend.privacy.accounting.history import History, Segment

Entry = dict[str, Any]  # a line: its kind ("ledger", "fit", "step" or "note"), and what that has

HEAD = b'{"kind": "ledger", "version": 1, "id": "'  # how every ledger starts
_SEAL = b', "digest": "%s"}'  # how every line ends
_SEAL_LENGTH = len(_SEAL % (b"0" * 64))
_SETTINGS = ("noise_multiplier", "sample_rate", "max_grad_norm")

_encode = json.JSONEncoder(allow_nan=False).encode  # made once: `json.dumps` makes one a call


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


# --- what is written ----------------------------------------------------------------------------


def first_line() -> Entry:
    """The line that starts a ledger; its random id tells one ledger from all others."""
    return {"kind": "ledger", "version": 1, "id": uuid.uuid4().hex}


def fit_line(fit: str, *, insecure: bool, facts: Entry) -> Entry:
    """The line of a fit, as it will be read back.

    Raises:
        InputError: if a fact has a name that the line needs itself, or is not plain data.
    """
    if taken := {"kind", "fit", "insecure", "digest"} & set(facts):
        raise InputError(f"Expected facts under other names, got {sorted(taken)}. Rename them.")
    try:
        text = _encode({"kind": "fit", "fit": fit, "insecure": insecure, **facts})
    except (TypeError, ValueError) as error:
        raise InputError(
            f"Expected facts that JSON can hold, got {facts}: {error}. Use str, int, bool, "
            "None, finite floats, and lists or dicts of them."
        ) from None
    return json.loads(text)


def step_line(fit: str, settings: tuple[float, float, float]) -> Entry:
    """The line of one step with σ, q and C.

    Raises:
        InputError: unless σ ≥ 0, q in (0, 1] and C > 0, all finite.
    """
    sigma, rate, norm = map(float, settings)
    for right, what, got in (
        (0 <= sigma < math.inf, "`noise_multiplier` to be ≥ 0", sigma),
        (0 < rate <= 1, "`sample_rate` to be in (0, 1]", rate),
        (0 < norm < math.inf, "`max_grad_norm` to be > 0", norm),
    ):
        if not right:
            raise InputError(f"Expected {what}, got {got}. Charge what the step will use.")
    return {"kind": "step", "fit": fit, **dict(zip(_SETTINGS, (sigma, rate, norm), strict=True))}


def instead_of_torn(entries: list[Entry]) -> Entry:
    """The line for a torn one: a step at the settings last seen, in a step or in a fit's facts."""
    for entry in reversed(entries):
        if all(isinstance(entry.get(name), int | float) for name in _SETTINGS):
            return {"kind": "step", **{n: entry[n] for n in ("fit", *_SETTINGS)}, "torn": True}
    # No step was taken before, and no σ is known for this one, if it was a step. Nothing can be
    # charged, and nothing was spent: `charge` had not returned. The mark is for reviewers.
    return {"kind": "note", "torn": True}


def seal(entry: Entry, before: str) -> tuple[bytes, str]:
    """The line of an entry that follows the digest `before`, and its own digest."""
    body = _encode(entry).removesuffix("}").encode()  # floats by repr: exact
    digest = _digest(before.encode(), body)
    return body + _SEAL % digest + b"\n", digest.decode()


def _digest(before: bytes, body: bytes) -> bytes:
    return hashlib.sha256(before + body).hexdigest().encode()


# --- what is read -------------------------------------------------------------------------------


def read_ledger(path: str | Path, *, anchor: Anchor | None = None) -> list[Entry]:
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
        raise missing(path) from None
    return verify(raw, path, anchor, must_exist=True)[0]


def verify(
    raw: bytes, path: Path, anchor: Anchor | None, *, must_exist: bool
) -> tuple[list[Entry], int]:
    """The lines in the bytes of a ledger, and how many bytes they fill.

    What is left over is a torn last line.

    Args:
        raw: what the file holds.
        path: of the file, for the errors.
        anchor: where it stood at some time; None checks the chain alone.
        must_exist: whether no line at all is an error.

    Raises:
        PrivacyError: if it is no ledger, edited, cut short, another one, or empty.
    """
    if not raw.startswith(HEAD) and not HEAD.startswith(raw):  # torn in its first line
        raise PrivacyError(
            f"Expected a privacy ledger of version 1, got {path}, which does not start like one. "
            "Give the path of the ledger, or one where no file is yet."
        )
    lines = raw.split(b"\n")[:-1]
    if lines and not _is_json(lines[-1]):
        lines.pop()
    _check_chain(lines, path)
    entries = json.loads(b"[%s]" % b",".join(lines))  # at once: half the time of one by one
    if anchor is not None:
        _check_anchor(entries, path, anchor)
    if not entries and must_exist:
        raise PrivacyError(
            f"Expected a ledger with lines at {path}, got a file without one. Its content was "
            "lost; put back a copy."
        )
    return entries, sum(map(len, lines)) + len(lines)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _check_chain(lines: list[bytes], path: Path) -> None:
    digest = b""
    for number, line in enumerate(lines, 1):
        digest = _digest(digest, line[:-_SEAL_LENGTH])
        if line[-_SEAL_LENGTH:] != _SEAL % digest:
            raise PrivacyError(
                f"Expected the lines of {path} as they were written, got another line {number}: "
                "its digest does not match. Put back an unedited copy; without one ε is not known, "
                "so train anew with a new ledger."
            )


def _check_anchor(entries: list[Entry], path: Path, anchor: Anchor) -> None:
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


def missing(path: Path) -> PrivacyError:
    """The error for a ledger that is not there."""
    return PrivacyError(
        f"Expected the ledger of an earlier run at {path}, got no file. Without it the steps taken "
        "since the checkpoint are not known; put it back, or correct the path."
    )


def spent(entries: Iterable[Entry]) -> dict[str, History]:
    """The steps of each fit among the lines of a ledger, in order of first appearance."""
    fits: dict[str, list[Segment]] = {}
    for entry in entries:
        count(fits, entry)
    return {name: tuple(segments) for name, segments in fits.items()}


def count(fits: dict[str, list[Segment]], entry: Entry) -> None:
    """Add a line to the steps of each fit, in place."""
    # As `accounting.extend` would, in place: a ledger may have 1e5 lines, each with its own σ.
    if entry["kind"] == "fit":
        fits.setdefault(entry["fit"], [])
    elif entry["kind"] == "step":
        segments = fits.setdefault(entry["fit"], [])
        sigma, rate = entry["noise_multiplier"], entry["sample_rate"]
        same = segments and segments[-1][:2] == (sigma, rate)
        before = segments.pop().steps if same else 0
        segments.append(Segment(sigma, rate, before + 1))
