"""Replayed steps on a GPU: the same as Python's, and nothing left behind where they fail."""

import dataclasses
import gc
import logging

import pytest
import torch
from torch import nn

from defend import PGD
from defend.attacks.cuda_graphs import cache as graphs
from defend.attacks.cuda_graphs import capture as recording
from defend.threat import Linf
from tests.attacks.cuda_graphs.cases import ATTACKS, Net, X, Y, graphed, net, plain

pytestmark = pytest.mark.cuda


@pytest.fixture
def said(caplog):
    with caplog.at_level(logging.WARNING, logger="defend"):
        yield caplog


def captured(model):
    """How many graphs a model has."""
    cache = graphs._CACHES.get(model)
    return sum(isinstance(g, graphs.CapturedStep) for g in cache._graphs.values()) if cache else 0


def close(found, expected):
    """A few signs of tiny gradients differ between kernels; nothing else."""
    different = (found.x_adv - expected.x_adv).abs() > 5e-3
    assert different.float().mean() < 0.1
    assert found.gradients == expected.gradients


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", [name for name in ATTACKS if name != "bf16"])
def test_on_cuda_replays_what_python_does(said, name, precision):
    attack, settings = ATTACKS[name]
    attack = dataclasses.replace(attack, precision=precision)
    settings = {k: v.cuda() if torch.is_tensor(v) else v for k, v in settings.items()}
    model, x, y = net().cuda(), attack.inputs.to_model(X).cuda(), Y.cuda()
    first = [graphed(attack, model, x, y, **settings) for _ in range(3)]
    assert captured(model) >= 1
    kept = [found.x_adv.clone() for found in first]
    for found in first:
        close(found, plain(attack, model, x, y, **settings))
    graphed(attack, model, x.flip(0), y, **settings)
    assert all(torch.equal(f.x_adv, k) for f, k in zip(first, kept, strict=True))
    assert not said.records


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_on_cuda_weights_updated_in_place_are_seen(precision):
    model, x, y = net().cuda(), X.cuda(), Y.cuda()
    attack = PGD(Linf(0.1), steps=4, precision=precision)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    for _ in range(5):
        close(graphed(attack, model, x, y), plain(attack, model, x, y))
        model.train()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert captured(model) == 1


def test_on_cuda_random_numbers_are_those_of_python():
    class Smoothed(Net):
        def forward(self, x):
            return super().forward(x + 0.1 * torch.randn_like(x))

    model, x, y = net(Smoothed).cuda(), X.cuda(), Y.cuda()
    attack = PGD(Linf(0.1), steps=4)
    for _ in range(4):
        torch.cuda.manual_seed(5)
        found = graphed(attack, model, x, y)
        torch.cuda.manual_seed(5)
        close(found, plain(attack, model, x, y))
    assert captured(model) == 1


class Waits(Net):
    """Asks the GPU for a number."""

    def forward(self, x):
        return super().forward(x) * (1.0 if x.sum().item() > -1e9 else 0.0)


class Stops(Net):
    """Waits for the whole GPU, which no look before a capture shows."""

    def forward(self, x):
        torch.cuda.synchronize()
        return super().forward(x)


@pytest.mark.parametrize("kind", [Waits, Stops])
def test_on_cuda_a_forward_that_waits_runs_step_by_step_and_leaves_nothing_behind(said, kind):
    model, x, y = net(kind).cuda(), X.cuda(), Y.cuda()
    attack = PGD(Linf(0.1), steps=3)
    stream, mode = torch.cuda.current_stream(), torch.cuda.get_sync_debug_mode()
    for _ in range(4):
        close(graphed(attack, model, x, y), plain(attack, model, x, y))
    assert captured(model) == 0
    assert len(said.records) == 1
    assert "steps run one by one" in said.text
    assert torch.cuda.current_stream() == stream
    assert torch.cuda.get_sync_debug_mode() == mode
    assert not torch.cuda.is_current_stream_capturing()
    torch.rand(1000, device="cuda").sum().item()  # the generator draws again
    torch.cuda.empty_cache()
    other = net().cuda()  # and others are captured
    for _ in range(3):
        close(graphed(attack, other, x, y), plain(attack, other, x, y))
    assert captured(other) == 1


def test_on_cuda_a_graph_that_would_keep_too_much_is_not_made(said, monkeypatch):
    monkeypatch.setattr(recording, "_MAX_SHARE_OF_FREE_MEMORY", 0.0)
    model, attack = net().cuda(), PGD(Linf(0.1), steps=2)
    for _ in range(3):
        graphed(attack, model, X.cuda(), Y.cuda())
    assert captured(model) == 0
    assert "GiB of free memory" in said.text


def test_on_cuda_memory_comes_back_with_the_model():
    attack = PGD(Linf(0.1), steps=2)
    x, y = torch.rand(256, 2, 32, 32, device="cuda"), torch.zeros(256, dtype=torch.int64).cuda()

    def use():
        model = net().cuda()
        for _ in range(3):
            graphed(attack, model, x, y)
        assert captured(model) == 1

    held = []
    for _ in range(4):
        use()
        gc.collect()
        torch.cuda.empty_cache()
        held.append(torch.cuda.memory_reserved())
    assert held[-1] == held[1]
