import pytest
from torch import nn

from defend.attacks import cuda_graphs
from defend.attacks.cuda_graphs import captured_step
from tests.attacks.cuda_graphs.cases import Recorder


@pytest.fixture
def recorder(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(captured_step, "_record", recorder)
    monkeypatch.setattr(cuda_graphs, "may_capture", lambda model, x: isinstance(model, nn.Module))
    return recorder
