"""`make_private` under Fabric gives what it gives in a plain loop."""

import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import FSDPStrategy
from torch.utils.data import DataLoader

from defend import InputError, PrivacyError
from tests.helpers import data, flat
from tests.loops import private_loop
from tests.training.programs import SETTINGS, alone, fabric, mean_loss, mlp, plain, reports


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # for the ledgers


def test_one_process_equals_a_plain_loop():
    noisy = {"noise_multiplier": 0.8}
    one, other = fabric(1, chunk_size=5, **noisy), plain(1, **noisy)
    torch.testing.assert_close(one["weights"], other["weights"], rtol=0, atol=1e-6)
    assert (one["steps"], one["epsilon"]) == (other["steps"], other["epsilon"])


def test_two_processes_equal_a_plain_loop():
    first, second = reports("fabric exact")
    assert torch.equal(first["weights"], second["weights"])
    torch.testing.assert_close(first["weights"], alone("plain exact")["weights"], rtol=0, atol=1e-6)
    assert (first["writes"], second["writes"]) == (True, False)


def test_mixed_precision_comes_close_and_is_really_on():
    half, full = fabric(1, precision="bf16-mixed"), plain(1)
    moved = (full["weights"] - flat(_untrained())).norm()
    apart = (half["weights"] - full["weights"]).norm()
    assert 1e-6 < apart < 0.02 * moved


def _untrained():
    torch.manual_seed(0)
    return mlp()


def set_up(run):
    model = mlp()
    return run.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))


def private(model, optimizer, loader=None, **settings):
    loader = loader or DataLoader(data(64), batch_size=16)
    return private_loop(
        model, optimizer, loader, loss=mean_loss, epochs=1, **{**SETTINGS, **settings}
    )


def test_a_scaled_precision_is_refused():
    run = Fabric(accelerator="cpu", devices=1)
    model, optimizer = set_up(run)
    run.strategy.precision.precision = "16-mixed"  # needs a GPU to be set up
    try:
        with pytest.raises(PrivacyError, match=r"32-true, 64-true or bf16-mixed, got '16-mixed'"):
            private(model, optimizer, fabric=run)
    finally:
        del run.strategy.precision.precision


def test_a_sharding_strategy_is_refused():
    run = Fabric(accelerator="cpu", devices=1)
    model, optimizer = set_up(run)
    run._strategy = FSDPStrategy()
    with pytest.raises(PrivacyError, match=r"one device or the DDP strategy, got FSDPStrategy"):
        private(model, optimizer, fabric=run)


def test_model_and_fabric_come_together():
    run = Fabric(accelerator="cpu", devices=1)
    model, optimizer = set_up(run)
    with pytest.raises(InputError, match=r"or neither, got only the model. Pass both"):
        private(model, optimizer)
    bare = mlp()
    with pytest.raises(InputError, match=r"or neither, got only `fabric`. Pass both"):
        private(bare, torch.optim.SGD(bare.parameters(), lr=0.1), fabric=run)


def test_a_loader_that_fabric_set_up_is_refused():
    run = Fabric(accelerator="cpu", devices=1)
    model, optimizer = set_up(run)
    loader = run.setup_dataloaders(DataLoader(data(64), batch_size=16))
    with pytest.raises(PrivacyError, match=r"a torch.utils.data.DataLoader for training, got a"):
        private(model, optimizer, loader, fabric=run)


def test_closing_leaves_fabrics_model_as_it_was():
    run = Fabric(accelerator="cpu", devices=1)
    model, optimizer = set_up(run)
    with private(model, optimizer, fabric=run) as loop:
        for batch in loop.loader:
            loop.step(batch)
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())
    optimizer.step()  # nothing refuses it any more
