"""Two processes, under DDP or Fabric, train adversarially as one process does."""

import pytest
import torch
from lightning.fabric import Fabric

from defend import InputError
from defend.objectives import TRADES
from tests.helpers import flat
from tests.training.adversarial_cases import batches, loop_of, net, sgd
from tests.training.adversarial_programs import CASES, alone, mlp, reports

# With AWP and batch normalization each process goes by its own rows.
TOGETHER = ("plain awp", "plain batch norm")
ALIKE = [name for name in CASES if name not in (*TOGETHER, "not wrapped")]


@pytest.mark.parametrize("name", ALIKE)
def test_two_processes_equal_one(name):
    first, second = reports(name)
    one = alone(name)
    assert "error" not in first, first
    assert torch.equal(first["weights"], second["weights"])
    half = {"rtol": 0.02, "atol": 0.01} if "half" in name else {"rtol": 0, "atol": 1e-6}
    torch.testing.assert_close(first["weights"], one["weights"], **half)
    both = (first["loss"] + second["loss"]) / 2
    torch.testing.assert_close(both, one["loss"], **half)
    start = mlp(one["weights"].dtype)
    assert (one["weights"] - flat(start)).abs().max() > 0.01  # not vacuous


@pytest.mark.parametrize("name", TOGETHER)
def test_processes_stay_together(name):
    """Weights moved by AWP of each, and buffers that DDP writes to between two forwards."""
    first, second = reports(name)
    assert "error" not in first, first
    assert torch.equal(first["weights"], second["weights"])


def test_each_process_has_random_starts_of_its_own_and_all_share_a_seed():
    for name in ("plain madry", "fabric madry"):
        first, second = reports(name)
        assert not torch.equal(first["attacked"], second["attacked"])
        assert first["seed"] == second["seed"]


def test_a_model_that_nobody_wrapped_is_refused():
    for report in reports("not wrapped"):
        assert report["error"] == "InputError"
        assert "Expected a model in DistributedDataParallel" in report["message"]


def test_fabric_alone_equals_a_plain_loop():
    torch.testing.assert_close(
        alone("fabric trades")["weights"], alone("plain trades")["weights"], rtol=0, atol=1e-6
    )
    assert alone("fabric trades")["seen"] == {"torch.float64"}  # attacks included


def test_attack_and_objective_run_in_fabrics_precision():
    assert alone("fabric half")["seen"] == {"torch.bfloat16"}


def test_fabrics_wrapper_counts_as_the_model():
    """One forward of the other batch more, and none of its own again."""
    run = Fabric(accelerator="cpu", devices=1)
    bare, calls = net(torch.float32), []
    bare.register_forward_hook(lambda m, args, out: calls.append(m.training))
    model, optimizer = run.setup(bare, sgd(bare))
    loop = loop_of(model, optimizer=optimizer, objective=TRADES(), fabric=run)
    loop.step(batches(1, dtype=torch.float32)[0])
    assert sum(calls) == 2


def test_model_and_fabric_come_together():
    run = Fabric(accelerator="cpu", devices=1)
    bare = mlp()
    model, optimizer = run.setup(bare, sgd(bare))
    with pytest.raises(InputError, match=r"or neither, got only the model. Pass both"):
        loop_of(model, optimizer=optimizer)
    with pytest.raises(InputError, match=r"or neither, got only `fabric`. Pass both"):
        loop_of(mlp(), fabric=run)
