"""`make_private` that goes on from a state: nothing that was spent is refunded."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from defend.privacy import AdaptiveClipping
from tests.training.loops import TARGET, net, private, some_steps, steps_in, train


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # for the ledgers


def test_a_resumed_plan_is_the_same_plan():
    first = private(net(), epochs=2, **TARGET)
    some_steps(first, 5)
    state = json.loads(json.dumps(first.state_dict()))  # plain data
    first.close()
    second = private(net(), epochs=2, state=state, **TARGET)
    assert second.noise_multiplier == first.noise_multiplier
    assert second.epsilon == first.epsilon > 0
    with second:
        while not second.exhausted:
            some_steps(second, 16 - second.steps)
    assert second.steps == 16
    assert 2.9 < second.epsilon <= 3.0


def test_a_rollback_is_not_refunded():
    loop = private(net(), epochs=2, **TARGET)
    some_steps(loop, 3)
    state = loop.state_dict()
    some_steps(loop, 4)
    loop.close()
    with pytest.warns(UserWarning, match=r"by 7 earlier steps, 4 of them after the checkpoint"):
        again = private(net(), epochs=2, state=state, **TARGET)
    assert again.steps == 7
    assert again.epsilon == loop.epsilon
    assert again.noise_multiplier > loop.noise_multiplier
    with again:
        while not again.exhausted:
            some_steps(again, 1)
    assert again.steps == 7 + 13  # 3 of 16 were taken when the state was saved
    assert again.epsilon <= 3.0


def test_a_run_in_another_process_is_not_refunded_either(tmp_path):
    """It dies without a word after 7 steps; its state is from after 3."""
    program = (
        "import os, signal, sys, json, torch\n"
        "from tests.training.loops import TARGET, net, private, some_steps\n"
        "loop = private(net(), epochs=2, **TARGET)\n"
        "some_steps(loop, 3)\n"
        "json.dump(loop.state_dict(), open('state.json', 'w'))\n"
        "some_steps(loop, 4)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={"PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    assert done.returncode == -9
    state = json.loads((tmp_path / "state.json").read_text())
    with private(net(), epochs=2, state=state, **TARGET) as loop:
        assert loop.steps == 7
        some_steps(loop, 1)
    assert loop.steps == steps_in(loop.ledger_path) == 8


def test_a_learned_clipping_norm_goes_on():
    first = train(private(net(), clipping=AdaptiveClipping(), noise_multiplier=0.7))
    assert first.max_grad_norm != 0.5
    second = private(net(), epochs=2, clipping=AdaptiveClipping(), state=first.state_dict())
    assert second.max_grad_norm == first.max_grad_norm
    second.close()


def test_a_ledger_of_ones_own_and_none():
    with private(net(), ledger="here.jsonl") as loop:
        some_steps(loop, 2)
    assert loop.ledger_path == Path("here.jsonl")
    assert steps_in("here.jsonl") == 2
    with private(net(), ledger=False) as loop:
        some_steps(loop, 1)
    assert loop.ledger_path is None
    assert [p.name for p in Path().iterdir()] == ["here.jsonl"]
