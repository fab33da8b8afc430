"""Replayed steps: what Python's steps come to, for as long as the model is what was captured."""

import contextlib
import copy
import dataclasses
import gc
import weakref

import pytest
import torch
from torch import nn

from defend import PGD
from defend.attacks.cuda_graphs import cache as graphs
from defend.attacks.cuda_graphs import captured_step
from defend.threat import L2, Linf
from tests.attacks.cuda_graphs.cases import ATTACKS, Net, X, Y, assert_same, graphed, net, plain


@pytest.mark.parametrize(("attack", "settings"), ATTACKS.values(), ids=ATTACKS)
def test_replays_what_python_does(recorder, attack, settings):
    model = net()
    x = attack.inputs.to_model(X)
    kept = []
    for turn in range(3):
        other = attack.inputs.to_model((X * (1 - 0.1 * turn)).flip(turn % 3))
        for batch in (x, other):
            found = graphed(attack, model, batch, **settings)
            expected = plain(attack, model, batch, **settings)
            assert_same(found, expected)
            kept.append((found.x_adv, expected.x_adv))
    assert recorder.replays >= 5 * attack.steps  # all but the first batch
    # No result lies in the memory of a graph, which the next batch overwrites.
    assert all(torch.equal(*pair) for pair in kept)


def test_the_comparison_sees_a_replay_that_went_wrong(recorder, monkeypatch):
    """A planted wrong answer: the graph's memory is not filled before it runs."""
    model, attack = net(), PGD(Linf(0.1), steps=4)
    graphed(attack, model)
    graphed(attack, model)
    monkeypatch.setattr(captured_step, "_load", lambda own, ascent: None)
    assert not torch.equal(graphed(attack, model).x_adv, plain(attack, model).x_adv)


def test_one_graph_for_a_shape_whatever_the_radius(recorder):
    model, attack = net(), PGD(L2(0.5), steps=3)
    for eps in (0.1, 0.2, 0.3, 0.4):
        found = graphed(attack.with_eps(eps), model)
        assert_same(found, plain(attack.with_eps(eps), model))
        assert_same(graphed(attack, model, eps=eps), plain(attack, model, eps=eps))
    assert recorder.made == 1
    for rows in (7, 7):
        assert_same(graphed(attack, model, X[:rows], Y[:rows]), plain(attack, model, X[:7], Y[:7]))
    assert recorder.made == 2


def test_a_step_that_comes_once_is_not_captured(recorder):
    graphed(PGD(Linf(0.1), steps=3), net())
    assert recorder.made == 0


def test_nothing_is_captured_unless_asked_for(recorder):
    model = net()
    for _ in range(3):
        PGD(Linf(0.1), steps=3).perturb(model, X, Y)
    assert recorder.made == 0


def test_weights_updated_in_place_are_seen(recorder):
    model, attack = net(), PGD(L2(0.5), steps=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    results = []
    for _ in range(6):
        found = graphed(attack, model)
        assert_same(found, plain(attack, model))
        results.append(found.x_adv)
        model.train()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X), Y).backward()
        optimizer.step()
    assert recorder.made == 1
    assert not torch.equal(results[-1], results[-2])  # the updates do make a difference


def moved(model):
    model.head.weight.data = model.head.weight.data.flip(0).clone()


def registered_again(model):
    model.head = nn.Linear(6, 5)


def another_flag(model):
    model.sign = -1.0


def another_buffer(model):
    model.norm.running_var = torch.rand(6) + 0.5


def a_hook(model):
    model.head.register_forward_hook(lambda module, args, output: -output)


def a_module(model):
    model.norm = nn.Softmax(dim=1)


@pytest.mark.parametrize(
    "change", [moved, registered_again, another_flag, another_buffer, a_hook, a_module]
)
def test_a_model_that_is_no_longer_the_same_is_captured_again(recorder, change):
    model, attack = net(), PGD(Linf(0.1), steps=4)
    for _ in range(3):
        graphed(attack, model)
    before = plain(attack, model)
    change(model)
    assert not torch.equal(plain(attack, model).x_adv, before.x_adv)
    for _ in range(3):
        assert_same(graphed(attack, model), plain(attack, model))
    assert recorder.made == 2
    assert recorder.replays == (1 + 2 * 4) + (1 + 2 * 4)  # a check each, and two attacks


def test_a_flag_that_goes_back_and_forth_finds_its_graph(recorder):
    model, attack = net(), PGD(Linf(0.1), steps=4)
    for turn in range(8):
        model.sign = 1.0 if turn % 2 else -1.0
        assert_same(graphed(attack, model), plain(attack, model))
    assert recorder.made == 2


def test_no_model_is_kept_alive(recorder):
    class Loses(Net):
        def loss(self, logits, y):
            return nn.functional.cross_entropy(logits, y, reduction="none")

    model = net(Loses)
    for attack in (PGD(Linf(0.1), steps=2), PGD(Linf(0.1), steps=2, loss=model.loss)):
        for _ in range(3):
            graphed(attack, model)
    assert recorder.made == 2
    dead, known = weakref.ref(model), len(graphs._CACHES)
    del model, attack
    gc.collect()
    assert dead() is None
    assert len(graphs._CACHES) == known - 1


def test_a_copy_of_a_model_has_graphs_of_its_own(recorder):
    model, attack = net(), PGD(Linf(0.1), steps=3)
    for _ in range(3):
        graphed(attack, model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.head.weight.neg_()
    for _ in range(3):
        assert_same(graphed(attack, twin), plain(attack, twin))
        assert_same(graphed(attack, model), plain(attack, model))
    assert recorder.made == 2
    assert not any("graph" in name for name in vars(model))


def test_no_more_graphs_than_are_worth_it(recorder, monkeypatch):
    monkeypatch.setattr(graphs, "_MAX_GRAPHS_PER_MODEL", 3)
    model, attack = net(), PGD(Linf(0.1), steps=2)
    for rows in range(2, 9):
        for _ in range(2):
            graphed(attack, model, X[:rows], Y[:rows])
    assert recorder.made == 7
    cache = graphs._CACHES[model]
    assert len(cache._graphs) == 3
    made = recorder.made
    graphed(attack, model, X[:8], Y[:8])  # the latest is still there
    assert recorder.made == made


def targeted(attack):
    return dataclasses.replace(attack, targeted=True), contextlib.nullcontext()


def under_autocast(attack):
    return attack, torch.autocast("cpu", torch.bfloat16)


def in_half_precision(attack):
    return dataclasses.replace(attack, precision="bf16"), contextlib.nullcontext()


def of_another_loss(attack):
    return dataclasses.replace(attack, loss="margin"), contextlib.nullcontext()


def of_another_norm(attack):
    return dataclasses.replace(attack, ball=L2(0.1)), contextlib.nullcontext()


@pytest.mark.parametrize(
    "change", [targeted, under_autocast, in_half_precision, of_another_loss, of_another_norm]
)
def test_another_attack_on_the_same_batch_has_a_graph_of_its_own(recorder, change):
    model, attack = net(), PGD(Linf(0.1), steps=3, random_start=False)
    for _ in range(3):
        graphed(attack, model)
    before, (other, around) = plain(attack, model), change(attack)
    with around:
        expected = plain(other, model)
        assert not torch.equal(expected.x_adv, before.x_adv)
        for _ in range(3):
            assert_same(graphed(other, model), expected)
    assert_same(graphed(attack, model), plain(attack, model))
    assert recorder.made == 2


def test_who_counts_as_fooled_is_part_of_a_graph(recorder):
    """The same autocast, asked for or found: NaN is a verdict only where it is the training's."""

    class Undefined(Net):
        def forward(self, x):
            logits = super().forward(x)
            return torch.where(logits.amax(1, True) < self.least, float("nan"), logits)

    model, logits = net(Undefined), net().eval()(X).detach()
    y, model.least = logits.argmax(1), float(logits.amax(1).median())
    attack = PGD(Linf(0.2), steps=4, iterate="best")
    own = dataclasses.replace(attack, precision="bf16")
    with torch.autocast("cpu", torch.bfloat16):
        found, chosen = plain(attack, model, y=y), plain(own, model, y=y)
        assert not torch.equal(found.x_adv, chosen.x_adv)
        for _ in range(3):
            assert_same(graphed(own, model, y=y), chosen)
            assert_same(graphed(attack, model, y=y), found)
