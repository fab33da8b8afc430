"""`pytorch_lightning` is `lightning.pytorch` under its other name, and may be there alone."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
BOTH = ("lightning.pytorch", "pytorch_lightning")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each case of `tests.callbacks.two_names` found."""
    folder = tmp_path_factory.mktemp("two-names")
    program = [sys.executable, "-W", "ignore", "-m", "tests.callbacks.two_names", str(folder)]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    return {file.stem: torch.load(file, weights_only=False) for file in folder.glob("*.pt")}


def test_each_alone_gives_the_same(found):
    """A private and adversarial fit with its evidence, a resume, a loop of Fabric."""
    one, other = (found[name] for name in BOTH)
    for weights in ("weights", "fabric"):
        assert torch.equal(one[weights], other[weights])
    assert (one["epsilon"], one["evidence"]) == (other["epsilon"], other["evidence"])
    for run in (one, other):
        # One goes on from its own checkpoint, and one from that of the other.
        torch.testing.assert_close(run["resumed"], one["weights"], rtol=0, atol=1e-7)
    evidence = one["evidence"]
    assert evidence["params"]["defend/attack"] == "PGD"
    assert evidence["tags"]["defend.private"] == "false"  # with a seed that is known
    assert {"privacy/epsilon", "robust/worst_case_accuracy"} <= evidence["metrics"]
    assert "defend/card.md" in evidence["files"]


@pytest.mark.parametrize("name", BOTH)
def test_each_is_refused_what_the_other_is(found, name):
    said = found[name]["refusals"]
    assert set(said) == {"backward", "sharded", "older"}  # nothing wrong: no refusal
    assert "Expected Lightning's own `backward`" in said["backward"]
    assert "got FSDPStrategy" in said["sharded"]
    assert f"Expected a Trainer of {name} 2.6, got one of 2.5.6" in said["older"]


def test_nobody_asks_for_the_other_one(found):
    assert found["pytorch_lightning"]["asked"] == []
    assert found["lightning.pytorch"]["asked"] == ["pytorch_lightning"]  # as defend came first


def test_a_callback_of_the_one_works_in_a_trainer_of_the_other(found):
    assert found["mixed"]["bases"] == [True, False]
    assert torch.equal(found["mixed"]["weights"], found["pytorch_lightning"]["weights"])


def test_either_cli_builds_callbacks_that_were_there_before_it(found):
    assert [found["defend first"][name] for name in BOTH] == [True, True]


def test_one_that_cannot_be_imported_is_left_out(found):
    *some, none = found["defend first"]["bases"]
    assert some == [["lightning", "pytorch_lightning"], ["pytorch_lightning"], ["lightning"]]
    assert "Expected `lightning` or `pytorch_lightning` to be installed" in none
