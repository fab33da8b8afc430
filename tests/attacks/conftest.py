import pytest
from torch import nn

from defend.attacks.cuda_graphs import cache as graphs
from tests.attacks.cuda_graphs.cases import Recorder


@pytest.fixture
def recorder(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(graphs, "_record", recorder)
    monkeypatch.setattr(graphs, "may_capture", lambda model, x: isinstance(model, nn.Module))
    return recorder
