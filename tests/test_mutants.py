"""Mutants are found wherever a function lies, killed by a test that looks, and survive one that
does not."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mutants import chosen, found_again, likely, mutants, mutants_of

ROOT = Path(__file__).parents[1]

CODE = '''"""A module."""


class Rule:
    """A rule."""

    def __repr__(self):
        return "Rule" + "()" * 1

    def apply(self, a: int, b: "int + 1" = 0) -> bool:
        """Compare with max(a, 1)."""
        if not a:
            raise ValueError(f"Expected {a + 1} < {b}, got " + str(1))
        return sub(max(a, b), a * b) < 2


def sub(ε, b):
    return ε - b
'''
TESTED = (
    "from defend.privacy.rule import Rule, sub\n\n\ndef test_sub():\n    assert sub(3, 1) == 2\n"
)


def checkout(root, module, test):
    files = {
        "defend/__init__.py": "",
        f"defend/{module}.py": CODE,
        f"tests/{test}.py": TESTED.replace("privacy.rule", module.replace("/", ".")),
    }
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.fixture
def new(tmp_path):
    return checkout(tmp_path / "new", "privacy/mechanism/rule", "privacy/mechanism/test_rule")


@pytest.fixture
def old(tmp_path):
    return checkout(tmp_path / "old", "privacy/rules", "privacy/test_rules")


def test_what_is_changed_and_what_is_left_alone(new):
    found = {(m.function, m.kind, m.old, m.new) for m in mutants(new)}
    assert found == {
        ("Rule.apply", "const", "0", "(1)"),
        ("Rule.apply", "not", "not a", "(a)"),
        ("Rule.apply", "compare", "sub(max(a, b), a * b) < 2", "(sub(max(a, b), a * b) <= 2)"),
        ("Rule.apply", "swap", "sub(max(a, b), a * b)", "(sub(a * b, max(a, b)))"),
        ("Rule.apply", "minmax", "max(a, b)", "(min(a, b))"),
        ("Rule.apply", "swap", "max(a, b)", "(max(b, a))"),
        ("Rule.apply", "drop", "a * b", "(a)"),
        ("Rule.apply", "const", "2", "(3)"),
        ("sub", "drop", "ε - b", "(ε)"),
    }
    text = CODE.encode()
    applied = next(m for m in mutants(new) if m.function == "sub").applied(text).decode()
    assert applied == CODE.replace("return ε - b", "return (ε)")


def test_a_mutant_is_the_same_wherever_its_file_lies(new, old):
    assert [m.id for m in mutants(new)] == [m.id for m in mutants(old)]
    told = CODE.replace("Compare with", "Otherwise:").replace("a: int", "a: float")
    assert {m.id for m in mutants_of(told.encode(), "x.py")} == {m.id for m in mutants(old)}
    other = CODE.replace("if not a:", "if not a and b is None:")
    changed = [m for m in mutants_of(other.encode(), "x.py") if m.function == "Rule.apply"]
    line = {**vars(next(m for m in mutants(new) if m.kind == "minmax")), "id": "gone"}
    assert found_again(line, changed).new == "(min(a, b))"
    assert found_again({**line, "source": "gone"}, changed) is None


def test_the_likeliest_tests_come_first():
    named, using, beside, together = likely(ROOT, "defend/privacy/mechanism/clipping.py")
    assert named == ["tests/privacy/mechanism/test_clipping.py"]
    assert "tests/privacy/mechanism/test_adaptive_noise.py" in using
    assert "tests/privacy/mechanism/test_step.py" in beside
    assert "tests/contracts/test_silent_breaks.py" in together


def test_what_fails_unchanged_or_does_not_fit_is_left_out_and_said():
    known = {
        name: {"status": status, "seconds": seconds}
        for name, status, seconds in [
            ("named", "survived", 9), ("broken", "killed", 1), ("long", "survived", 50),
            ("short", "survived", 5), ("together", "survived", 20), ("slow", "timeout", 90),
        ]
    }  # fmt: skip
    tiers = [["named"], ["broken", "long", "short"], [], ["slow", "together"]]
    run, left_out = chosen(tiers, known, limit=90)
    assert run == ["named", "short", "together", "slow"]
    assert left_out == ["broken", "long", "slow"]
    run, left_out = chosen([["long", "named"], ["short"], ["slow"]], known, limit=30)
    assert run == ["named", "short", "long", "slow"]
    assert left_out == ["long", "slow"]


def run(*options):
    done = subprocess.run(
        [sys.executable, "-m", "tests.mutants", *map(str, options)],
        capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    return list(map(json.loads, done.stdout.splitlines()))


def test_a_test_that_looks_kills_and_the_rest_survives(new, old, tmp_path):
    results = tmp_path / "results.jsonl"
    lines = run("--root", new, "--only", "rule.py", "--out", results)
    assert lines == list(map(json.loads, results.read_text().splitlines()))
    by = {(line["function"], line["kind"]): line for line in lines}
    assert len(lines) == 9
    assert by["sub", "drop"]["status"] == "killed"
    assert by["sub", "drop"]["killer"] == "tests/privacy/mechanism/test_rule.py::test_sub"
    assert {line["status"] for line in lines if line["function"] != "sub"} == {"survived"}
    assert (new / "defend/privacy/mechanism/rule.py").read_text() == CODE
    results.write_text(json.dumps(by["sub", "drop"]))
    (again,) = run("--root", old, "--identify", results, "--status", "killed")
    assert again["status"] == "killed"
    assert again["file"] == "defend/privacy/rules.py"
