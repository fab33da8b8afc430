"""Steps that are not replayed: what cannot be captured, or is no longer what was captured."""

import dataclasses
import logging
import threading

import pytest
import torch
from torch import nn

from defend import PGD, InputError
from defend.attacks.cuda_graphs import cache as graphs
from defend.attacks.cuda_graphs import captured_step
from defend.threat import Linf
from tests.attacks.cuda_graphs.cases import (
    Counts,
    Net,
    Recorder,
    X,
    Y,
    assert_same,
    graphed,
    net,
    plain,
)


def test_what_the_forward_itself_changes_is_no_change(recorder):
    model, attack = net(Counts), PGD(Linf(0.1), steps=4)
    for _ in range(3):
        graphed(attack, model)
    assert recorder.made == 1


def test_a_model_that_is_never_the_same_is_said_once(recorder, caplog):
    model, attack = net(), PGD(Linf(0.1), steps=1)
    with caplog.at_level(logging.WARNING):
        for step in range(100):
            model.step = step
            graphed(attack, model, X[:2], Y[:2])
    assert recorder.made == 0
    assert [r.getMessage() for r in caplog.records] == [
        "CUDA graph not captured, steps run one by one: the model's step changes at every batch."
    ]


def test_what_python_hides_is_noticed_sooner_or_later(recorder, caplog, monkeypatch):
    monkeypatch.setattr(captured_step, "_CALLS_BETWEEN_CHECKS", 3)
    hidden = {"sign": 1.0}

    class Hides(Net):
        def forward(self, x):
            return hidden["sign"] * super().forward(x)

    model, attack = net(Hides), PGD(Linf(0.1), steps=4)
    monkeypatch.setattr(
        Recorder, "__call__", lambda self, own, pool: (stale(own, hidden["sign"]), pool)
    )
    for _ in range(4):
        assert_same(graphed(attack, model), plain(attack, model))
    hidden["sign"] = -1.0
    with caplog.at_level(logging.WARNING):
        found = [torch.equal(graphed(attack, model).x_adv, plain(attack, model).x_adv)
                 for _ in range(6)]  # fmt: skip
    assert found[3:] == [True, True, True]
    assert len(caplog.records) == 1
    assert "no longer agrees with the model's forward" in caplog.text


def stale(own, sign):
    """A replay with a number that Python looked up at capture."""
    model = own.model
    return dataclasses.replace(own, model=lambda x: sign * Net.forward(model, x))


@pytest.mark.parametrize(
    "error", [RuntimeError("cannot be captured\nmore"), torch.OutOfMemoryError("no room")]
)
def test_what_cannot_be_captured_runs_step_by_step_and_says_so_once(recorder, caplog, error):
    model, attack = net(), PGD(Linf(0.1), steps=4)
    recorder.fails = error
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            for rows in (12, 7):
                found = graphed(attack, model, X[:rows], Y[:rows])
                assert_same(found, plain(attack, model, X[:rows], Y[:rows]))
    reason = str(error).splitlines()[0]
    assert [r.getMessage() for r in caplog.records] == [
        f"CUDA graph not captured, steps run one by one: {reason}"
    ]


@pytest.mark.parametrize("kind", ["compiled", "in place", "parallel", "elsewhere"])
def test_models_that_are_not_to_be_captured(recorder, caplog, kind):
    model = net()
    if kind == "compiled":
        model = nn.Sequential(torch.compile(model, backend="eager"))
    elif kind == "in place":
        model.conv.compile(backend="eager")
    elif kind == "parallel":
        model = nn.DataParallel(model)
    else:
        model.register_buffer("far", torch.empty(1, device="meta"))
    attack = PGD(Linf(0.1), steps=2)
    with caplog.at_level(logging.WARNING, logger="defend"):
        for _ in range(3):
            assert_same(graphed(attack, model), plain(attack, model))
    assert recorder.made == 0
    said = {"parallel": "DataParallel runs in", "elsewhere": "parts of the model are on meta"}
    messages = [r.getMessage() for r in caplog.records if r.name.startswith("defend")]
    assert len(messages) == 1
    assert said.get(kind, "the model is compiled") in messages[0]


def test_an_error_of_the_users_own_is_raised(recorder):
    class Broken(Net):
        def forward(self, x):
            raise ValueError("my own mistake")

    with pytest.raises(ValueError, match="my own mistake"):
        graphed(PGD(Linf(0.1), steps=2), Broken())


def test_a_first_call_that_failed_says_nothing_about_the_model(recorder):
    """A loss that was wrong, a batch that did not fit: the next attack is captured all the same."""

    class Sulks(Net):
        fail = True

        def forward(self, x):
            if self.fail:
                raise torch.OutOfMemoryError("not now")
            return super().forward(x)

    for model, bad, error in (
        (net(), PGD(Linf(0.1), loss=nn.functional.cross_entropy), InputError),
        (net(Sulks), PGD(Linf(0.1), steps=3), torch.OutOfMemoryError),
    ):
        made = recorder.made
        for _ in range(2):
            with pytest.raises(error):
                graphed(bad, model, X[:1], Y[:1])
        model.fail = False
        attack = PGD(Linf(0.1), steps=3)
        for _ in range(3):
            assert_same(graphed(attack, model), plain(attack, model))
        assert recorder.made == made + 1


def test_a_second_thread_does_not_wait_and_does_not_disturb(recorder):
    model, attack = net(), PGD(Linf(0.1), steps=3)
    for _ in range(3):
        graphed(attack, model)
    replays, found = recorder.replays, []
    with graphs._BUSY:
        thread = threading.Thread(target=lambda: found.append(graphed(attack, model)))
        thread.start()
        thread.join()
    assert recorder.replays == replays
    assert_same(found[0], plain(attack, model))


def test_the_check_does_not_need_memory_that_is_not_there(recorder, monkeypatch):
    model, attack = net(), PGD(Linf(0.1), steps=3)
    monkeypatch.setattr(captured_step, "_CALLS_BETWEEN_CHECKS", 1)
    graphed(attack, model)
    graphed(attack, model)
    expected = plain(attack, model)

    def full(x):
        raise torch.OutOfMemoryError("no room for a look")

    monkeypatch.setattr(model, "forward", full)
    cache = graphs._CACHES[model]
    signature = next(iter(cache._graphs))[1]
    monkeypatch.setattr(graphs, "signature_of", lambda model, without: signature)
    assert_same(graphed(attack, model), expected)
