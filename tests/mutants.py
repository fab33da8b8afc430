"""Seeded mutants of `defend/privacy` and `defend/attacks`: does a test notice a small wrong change?

    python -m tests.mutants --count 100 --seed 0 --out results.jsonl [--only clipping.py pgd.py]
        [--root CHECKOUT] [--jobs 1] [--limit 90] [--list]
    python -m tests.mutants --identify results.jsonl --status survived --root OLD --out old.jsonl

The first draws mutants of functions and runs them; the second finds those of an earlier run in
another checkout, where files may lie elsewhere, and runs them against the tests there. So "none
that the old suite kills survives the new one" is: the survivors of the new tree survive in the old.

A mutant is one change in one function:

    compare   < ↔ <=, > ↔ >=, == ↔ !=, is ↔ is not, in ↔ not in
    drop      a + b → a, and so for -, *, /, //; a += b → nothing
    swap      the first two positional arguments of a call
    not       not a → a
    minmax    min ↔ max, minimum ↔ maximum, amin ↔ amax, argmin ↔ argmax
    const     0 ↔ 1, another number + 1

What is raised, logged or written for people, annotations and `__repr__` are left alone. Its id is
the function, the kind, the ordinal within the function, and a digest of the function without
docstrings, annotations and the places that it imports from: it does not depend on the file.

Each is applied to a temporary copy of the checkout. Tests run in a fork of a process that has
imported torch and Lightning already, likely killers first: those named after the module, those that
import it or its public names, those beside it, then the three that try everything together; the
fastest first, as measured once on the unchanged copy (kept in the temporary folder of the system).
A file that fails or takes longer than the limit there is left out, and so is what does not fit
into the limit; but of the first kind and of the three, what is too slow runs last, for the time
that is left. One line of JSON for each mutant, as it comes:

    status    "killed" (by `killer`), "timeout" (at `killer`), "survived", or "not found"
    left_out  likely tests that did not run, or not to their end: `--identify` the survivors once
              more with a larger `--limit` where there are any, and so what timed out on a busy
              machine
"""

import argparse
import ast
import contextlib
import copy
import dataclasses
import hashlib
import importlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

PLACES = ("defend/privacy", "defend/attacks")
TOGETHER = (
    "tests/contracts/test_silent_breaks.py",
    "tests/training/test_private_adversarial.py",
    "tests/callbacks/test_together.py",
)
PRELOADED = (
    "numpy", "scipy.stats", "torch", "lightning.pytorch", "opacus", "opacus.grad_sample",
    "hypothesis", "sklearn.datasets",
)  # fmt: skip
# Of the limit, with tests as slow as on the unchanged copy: machines are not always idle.
FILLED = 0.6
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)

COMPARISONS = {
    ast.Lt: ast.LtE, ast.Gt: ast.GtE, ast.Eq: ast.NotEq, ast.Is: ast.IsNot, ast.In: ast.NotIn,
}  # fmt: skip
COMPARISONS |= {b: a for a, b in COMPARISONS.items()}
TERMS = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv)
EXTREMES = {"min": "max", "minimum": "maximum", "amin": "amax", "argmin": "argmax"}
EXTREMES |= {b: a for a, b in EXTREMES.items()}
NEVER_SWAPPED = {"isinstance", "issubclass", "getattr", "hasattr", "setattr", "field"}
FOR_PEOPLE = {"warn", "warning", "info", "debug", "error", "exception", "log", "print", "cast"}
NOT_CODE = {"annotation", "returns", "decorator_list"}


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One change: bytes `start` to `end` of the file become `new`."""

    function: str
    kind: str
    ordinal: int
    digest: str
    file: str
    line: int
    source: str
    start: int
    end: int
    old: str
    new: str

    @property
    def id(self) -> str:
        return f"{self.function}:{self.kind}:{self.ordinal}:{self.digest}"

    def applied(self, text: bytes) -> bytes:
        return text[: self.start] + self.new.encode() + text[self.end :]


# What may change


def mutants(root: Path) -> list[Mutant]:
    """All mutants of a checkout, in an order that does not depend on where files lie."""
    files = [f for place in PLACES for f in (root / place).rglob("*.py")]
    found = [m for f in files for m in mutants_of(f.read_bytes(), str(f.relative_to(root)))]
    return sorted(found, key=lambda m: (m.id, m.file))


def mutants_of(text: bytes, file: str) -> Iterator[Mutant]:
    lines = text.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    for name, function in functions(ast.parse(text), ""):
        digest, ordinals = digest_of(function), dict[str, int]()
        for node in code_of(function):
            for kind, new in changes(node):
                start = starts[node.lineno - 1] + node.col_offset
                end = starts[node.end_lineno - 1] + node.end_col_offset
                ordinal = ordinals[kind] = ordinals.get(kind, -1) + 1
                yield Mutant(
                    name, kind, ordinal, digest, file, node.lineno,
                    lines[node.lineno - 1].decode().strip(), start, end,
                    text[start:end].decode(), new,
                )  # fmt: skip


def functions(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.AST]]:
    """Functions of a module and methods of its classes, by name; what is nested is part of them."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, FUNCTIONS):
            if child.name not in ("__repr__", "__str__"):
                yield prefix + child.name, child
        elif isinstance(child, ast.ClassDef):
            yield from functions(child, f"{prefix}{child.name}.")
        elif isinstance(child, ast.If):
            yield from functions(child, prefix)


def code_of(node: ast.AST) -> Iterator[Any]:
    """The nodes that compute something, in the order of the source."""
    if isinstance(node, ast.Raise | ast.JoinedStr) or speaks(node):
        return
    if isinstance(node, ast.expr | ast.stmt):
        yield node
    for field, value in ast.iter_fields(node):
        if field not in NOT_CODE:
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from code_of(child)


def speaks(node: ast.AST) -> bool:
    """Whether a call says something to people."""
    name = called(node)
    return name in FOR_PEOPLE or name.endswith(("Error", "Warning"))


def called(node: ast.AST) -> str:
    if not isinstance(node, ast.Call):
        return ""
    return getattr(node.func, "id", None) or getattr(node.func, "attr", "")


def changes(node: Any) -> Iterator[tuple[str, str]]:
    """(kind, what the node becomes)."""
    if isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            if type(op) in COMPARISONS:
                yield "compare", edited(node, lambda n, i=i: flip(n, i))
    elif isinstance(node, ast.BinOp) and isinstance(node.op, TERMS):
        yield "drop", f"({ast.unparse(node.left)})"
    elif isinstance(node, ast.AugAssign) and isinstance(node.op, TERMS):
        yield "drop", "pass"
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield "not", f"({ast.unparse(node.operand)})"
    elif isinstance(node, ast.Call):
        if called(node) in EXTREMES:
            yield "minmax", edited(node, rename)
        if may_swap(node):
            yield "swap", edited(node, swap)
    elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
        yield "const", f"({1 if node.value == 0 else 0 if node.value == 1 else node.value + 1!r})"


def edited(node: ast.AST, edit: Callable[[Any], None]) -> str:
    other = copy.deepcopy(node)
    edit(other)
    return f"({ast.unparse(other)})"


def flip(node: ast.Compare, i: int) -> None:
    node.ops[i] = COMPARISONS[type(node.ops[i])]()


def rename(node: ast.Call) -> None:
    field = "id" if isinstance(node.func, ast.Name) else "attr"
    setattr(node.func, field, EXTREMES[called(node)])


def swap(node: ast.Call) -> None:
    node.args[:2] = node.args[1::-1]


def may_swap(node: ast.Call) -> bool:
    first = node.args[:2]
    return (
        len(first) == 2
        and not any(isinstance(a, ast.Starred) for a in first)
        and ast.dump(first[0]) != ast.dump(first[1])
        and called(node) not in NEVER_SWAPPED
    )


def digest_of(function: ast.AST) -> str:
    """Of what a function does: without docstrings, annotations, and where it imports from."""
    function = copy.deepcopy(function)
    for node in ast.walk(function):
        for field in NOT_CODE & {name for name, _ in ast.iter_fields(node)}:
            setattr(node, field, None)
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
        if isinstance(node, ast.ImportFrom):
            node.module = None
    return hashlib.sha256(ast.dump(function).encode()).hexdigest()[:8]


def found_again(line: dict[str, Any], there: list[Mutant]) -> Mutant | None:
    """The mutant of an earlier run in another checkout: by id, else by function and source line."""
    for mutant in there:
        if mutant.id == line["id"]:
            return mutant
    keys = ("function", "kind", "source", "old", "new")
    alike = [m for m in there if all(getattr(m, key) == line[key] for key in keys)]
    return min(alike, key=lambda m: abs(m.ordinal - line["ordinal"]), default=None)


# Which tests


def likely(root: Path, file: str) -> list[list[str]]:
    """Test files by how likely they kill a mutant of this file, the likeliest first."""
    path = root / file
    module = ".".join(Path(file).with_suffix("").parts)
    public = {
        n.name
        for n in ast.parse(path.read_text()).body
        if isinstance(n, (*FUNCTIONS, ast.ClassDef)) and not n.name.startswith("_")
    }
    tests = sorted((root / "tests").rglob("test_*.py"))
    named = [t for t in tests if t.stem == f"test_{path.stem}" or
             t.stem.startswith(f"test_{path.stem}_")]  # fmt: skip
    using = [t for t in tests if module in (used := uses(t)) or public & used]
    beside = [t for t in tests if t.parent == root / "tests" / Path(*Path(file).parts[1:-1])]
    tiers, seen = [], set(TOGETHER)
    for tier in (named, using, beside):
        names = [str(t.relative_to(root)) for t in tier]
        tiers.append([name for name in names if name not in seen])
        seen |= set(names)
    return [*tiers, [name for name in TOGETHER if (root / name).exists()]]


def uses(test: Path) -> set[str]:
    """Modules of defend that a test imports, and the names that it takes from them."""
    found = set()
    for node in ast.walk(ast.parse(test.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "defend":
            names = {a.name for a in node.names}
            found |= {node.module} | names | {f"{node.module}.{name}" for name in names}
        elif isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "defend":
            found.add(node.attr)
    return found


def chosen(
    tiers: list[list[str]], known: dict[str, dict[str, Any]], limit: float
) -> tuple[list[str], list[str]]:
    """(the files to run, in order; those that fail unchanged or do not fit into the limit)."""
    left = FILLED * limit
    named, *others, together = tiers

    def fitting(names: list[str], limit: float) -> list[str]:
        nonlocal left
        fit = first_fitting(names, known, limit)
        left -= sum(known[name]["seconds"] for name in fit)
        return fit

    run = fitting(named, left)
    last = fitting(together, left / 2)
    for tier in others:
        run += fitting(tier, left)
    run += last
    out = [name for tier in tiers for name in tier if name not in run]
    # Too slow as a whole, but what comes first in them may kill: for the time that is left.
    slow = [name for name in named + together if name in out and known[name]["status"] != "killed"]
    return run + slow, out


def first_fitting(names: list[str], known: dict[str, dict[str, Any]], limit: float) -> list[str]:
    """The fastest that pass on the unchanged copy and take no longer than this together."""
    fit: list[str] = []
    for name in sorted(names, key=lambda name: known[name]["seconds"]):
        if known[name]["status"] == "survived" and known[name]["seconds"] <= limit:
            fit.append(name)
            limit -= known[name]["seconds"]
    return fit


# Running them


class Watcher:
    """A pytest plugin that writes down which test runs, and the first that fails."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def _write(self, test: str, failed: bool) -> None:
        self.path.write_text(json.dumps({"test": test, "failed": failed}))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._write(nodeid, failed=False)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self._write(report.nodeid, failed=True)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self._write(report.nodeid, failed=True)


def outcome(copied: Path, files: list[str], limit: float) -> dict[str, Any]:
    """Run test files of a copy in a fork of this process: status, killer, seconds."""
    notes = copied.parent / "notes.json"
    notes.unlink(missing_ok=True)
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        _in_child(copied, files, notes, limit)
    status = _waited(child, start + limit)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # what it started
    note = json.loads(notes.read_text()) if notes.exists() and notes.read_text() else {}
    verdict = "timeout" if status is None else "survived" if status == 0 else "killed"
    seconds = round(time.monotonic() - start, 2)
    killer = None if verdict == "survived" else note.get("test")
    return {"status": verdict, "killer": killer, "seconds": seconds}


def _waited(child: int, end: float) -> int | None:
    """The exit code of a process, or None where it was still running at the end."""
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _in_child(copied: Path, files: list[str], notes: Path, limit: float) -> None:
    """Run pytest in the copy as if this process had been started there, and exit."""
    code = 99
    try:
        os.setsid()
        signal.alarm(int(limit) + 5)  # where nobody is left to stop it
        with open(os.devnull, "r+b") as nothing:  # noqa: PTH123
            for stream in (0, 1, 2):
                os.dup2(nothing.fileno(), stream)
        os.chdir(copied)
        os.environ["PYTHONPATH"] = str(copied)
        elsewhere = ("", str(Path(__file__).parents[1]))
        sys.path[:] = [str(copied), *(p for p in sys.path if p not in elsewhere)]
        sys.argv[:] = ["pytest"]
        sys.modules["__main__"] = types.ModuleType("__main__")  # spawned processes import it
        for name in [n for n in sys.modules if n.split(".")[0] in ("defend", "tests")]:
            del sys.modules[name]
        import pytest

        options = ["-x", "-q", "-p", "no:cacheprovider", *files]
        code = int(pytest.main(options, plugins=[Watcher(notes)]))
    finally:
        os._exit(code)


_COPY = Path()  # of this worker


def _start(root: Path, folder: str) -> None:
    """Give a worker a copy of its own."""
    global _COPY
    _COPY = Path(tempfile.mkdtemp(dir=folder)) / "copy"
    unwanted = shutil.ignore_patterns(
        ".git", ".venv", "__pycache__", ".*_cache", ".hypothesis", "*.egg-info", "privacy_ledgers"
    )
    shutil.copytree(root, _COPY, ignore=unwanted)
    sys.dont_write_bytecode = True  # a file that changes twice within a second has the same stamp
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"


def _unchanged(task: tuple[str, float]) -> tuple[str, dict[str, Any]]:
    name, limit = task
    return name, outcome(_COPY, [name], limit)


def _changed(task: tuple[Mutant, list[str], list[str], float]) -> dict[str, Any]:
    mutant, files, left_out, limit = task
    path = _COPY / mutant.file
    text = path.read_bytes()
    path.write_bytes(mutant.applied(text))
    try:
        result = outcome(_COPY, files, limit)
    finally:
        path.write_bytes(text)
    if result["status"] == "timeout" and (result["killer"] or "").split("::")[0] in left_out:
        result |= {"status": "survived", "killer": None}
    return {**described(mutant), **result, "left_out": left_out}


def described(mutant: Mutant) -> dict[str, Any]:
    fields = dataclasses.asdict(mutant)
    return {"id": mutant.id, "diff": f"- {mutant.old}\n+ {mutant.new}", **fields}


def preload(root: Path) -> None:
    """Import what the checkout needs, once for all forks."""
    text = "".join(f.read_text() for d in ("defend", "tests") for f in (root / d).rglob("*.py"))
    for name in PRELOADED:
        if f"import {name.split('.')[0]}" in text or f"from {name.split('.')[0]}" in text:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)


def durations(
    pool: Executor, root: Path, names: list[str], limit: float
) -> dict[str, dict[str, Any]]:
    """How each test file does on the unchanged copy; remembered while nothing in it changes."""
    parts = [f for d in ("defend", "tests") for f in sorted((root / d).rglob("*.py"))]
    digest = hashlib.sha256(b"".join(f.read_bytes() for f in parts)).hexdigest()[:16]
    cache = Path(tempfile.gettempdir()) / f"mutants-{digest}.json"
    known = json.loads(cache.read_text()) if cache.exists() else {}
    todo = [name for name in names if name not in known or _too_short(known[name], limit)]
    for name, result in done(pool, _unchanged, [(name, limit) for name in todo]):
        known[name] = {**result, "limit": limit}
        cache.write_text(json.dumps(known))
        note(f"{name}: {result['seconds']:.1f} s, {result['status']} unchanged")
    return known


def _too_short(result: dict[str, Any], limit: float) -> bool:
    return result["status"] == "timeout" and limit > result["limit"]


def done(pool: Executor, function: Callable[..., Any], tasks: list[Any]) -> Iterator[Any]:
    """Results as they come."""
    for future in as_completed([pool.submit(function, task) for task in tasks]):
        yield future.result()


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# The command


def drawn(options: argparse.Namespace) -> list[Mutant]:
    every = mutants(options.root)
    if options.only:
        every = [m for m in every if m.file.endswith(tuple(options.only))]
    return random.Random(options.seed).sample(every, min(options.count, len(every)))


def identified(options: argparse.Namespace, say: Callable[[dict[str, Any]], None]) -> list[Mutant]:
    """The mutants of a results file in this checkout; says which are not here."""
    there, found = mutants(options.root), []
    for line in map(json.loads, options.identify.read_text().splitlines()):
        if options.status and line["status"] not in options.status.split(","):
            continue
        mutant = found_again(line, there)
        if mutant is None:
            say({**line, "status": "not found", "killer": None, "seconds": 0.0})
        else:
            found.append(mutant)
    return found


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[1])
    parser.add_argument("--only", nargs="*", help="ends of file names")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--limit", type=float, default=90.0, help="seconds for one mutant")
    parser.add_argument("--out", type=Path, help="lines are added to this file too")
    parser.add_argument("--identify", type=Path, help="the lines of another run")
    parser.add_argument("--status", help="of these lines, those with one of these, by commas")
    parser.add_argument("--list", action="store_true", help="say which, and run nothing")
    options = parser.parse_args()
    options.root = options.root.resolve()
    return options


def main() -> None:
    options = parsed()

    def say(line: dict[str, Any]) -> None:
        text = json.dumps(line, ensure_ascii=False)
        print(text, flush=True)
        if options.out:
            with options.out.open("a", encoding="utf-8") as file:
                file.write(text + "\n")

    picked = identified(options, say) if options.identify else drawn(options)
    if options.list:
        for mutant in picked:
            say(described(mutant))
        return
    importlib.import_module("pytest")
    preload(options.root)
    tests = {file: likely(options.root, file) for file in {m.file for m in picked}}
    names = sorted({name for tiers in tests.values() for tier in tiers for name in tier})
    counts: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        fork = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(options.jobs, fork, _start, (options.root, folder)) as pool:
            known = durations(pool, options.root, names, options.limit)
            tasks = [
                (m, *chosen(tests[m.file], known, options.limit), options.limit) for m in picked
            ]
            for line in done(pool, _changed, tasks):
                counts[line["status"]] = counts.get(line["status"], 0) + 1
                say(line)
    note(", ".join(f"{count} {status}" for status, count in sorted(counts.items())))


if __name__ == "__main__":
    main()
