import pytest
from torch import nn

from defend.attacks import graphs
from tests.attacks.graph_cases import Recorder


@pytest.fixture
def recorder(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(graphs, "_record", recorder)
    monkeypatch.setattr(graphs, "may_capture", lambda model, x: isinstance(model, nn.Module))
    return recorder
