"""What goes wrong with torchattacks alone, and does not through TorchAttack.

Each test first shows the trap with the bare library, so that it fails should the trap go away.
"""

import random
import weakref

import numpy as np
import pytest
import torch
import torchattacks
from torch import nn

from defend import InputError, InputSpace
from defend.attacks.torchattacks.adapter import TorchAttack

SPACE = InputSpace(mean=(0.5,), std=(0.25,))


class Failing(nn.Module):
    """Runs out of memory at its n-th forward."""

    def __init__(self, net, fail_at):
        super().__init__()
        self.net, self.fail_at, self.calls = net, fail_at, 0

    def forward(self, x):
        self.calls += 1
        if self.calls == self.fail_at:
            raise torch.OutOfMemoryError("out of memory")
        return self.net(x)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def case(shape=(6, 1, 6, 6), classes=5):
    torch.manual_seed(1)
    width = torch.Size(shape[1:]).numel()
    model = nn.Sequential(nn.Flatten(), nn.Linear(width, 16), nn.Tanh(), nn.Linear(16, classes))
    x = torch.rand(shape)
    return model, x, model(x).argmax(1)


def test_frozen_batch_norm_stays_frozen():
    model, x, y = case()
    model = nn.Sequential(nn.BatchNorm2d(1).eval(), *model).train()
    model[0].eval()
    torchattacks.PGD(model)(x, y)
    assert model[0].training  # the trap
    model[0].eval()
    TorchAttack("PGD")(model, x, y)
    assert [m.training for m in model] == [False, True, True, True, True]


def test_modes_come_back_when_the_model_raises():
    net, x, y = case()
    model = Failing(net, 3).train()
    with pytest.raises(torch.OutOfMemoryError):
        torchattacks.PGD(model)(x, y)
    assert not model.training  # the trap
    model.train().calls = 0
    with pytest.raises(torch.OutOfMemoryError):
        TorchAttack("PGD")(model, x, y)
    assert all(m.training for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_an_attack_that_ran_out_of_memory_stays_in_its_ball_the_next_time():
    net, raw, y = case()
    x, eps = SPACE.to_model(raw), 8 / 255
    model = Failing(net, 3)
    alone = torchattacks.PGD(model, eps=eps)
    alone.set_normalization_used(mean=SPACE.mean, std=SPACE.std)
    with pytest.raises(torch.OutOfMemoryError):
        alone(x, y)
    assert (alone(x, y) - x).abs().max() > 1.9  # the trap, in model units; eps is 0.13 of them
    model.calls = 0
    attack = TorchAttack("PGD", {"eps": eps}, inputs=SPACE)
    with pytest.raises(torch.OutOfMemoryError):
        attack(model, x, y)
    assert (attack(model, x, y) - x).abs().max() <= eps / 0.25 + 1e-6


def test_normalized_inputs_are_not_clamped():
    model, raw, y = case()
    x = SPACE.to_model(raw)
    assert (torchattacks.PGD(model)(x, y) - x).abs().max() > 1.9  # the trap
    with pytest.raises(InputError, match=r"inside the box \[0.0, 1.0\].*pass inputs=InputSpace"):
        TorchAttack("PGD")(model, x, y)
    adv = TorchAttack("PGD", inputs=SPACE)(model, x, y)
    assert 0 < (adv - x).abs().max() <= 8 / 255 / 0.25 + 1e-6


@pytest.mark.parametrize("name", ["APGD", "APGDT", "FAB", "Square"])
def test_the_global_rng_is_not_reseeded(name, monkeypatch):
    model, x, y = case()
    reseeded = []
    monkeypatch.setattr(torch.cuda.random, "manual_seed", reseeded.append)

    def noise_after(attack):
        drawn = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            attack(model, x, y)
            drawn.append(torch.randn(3))
        return drawn

    settings = {"eps": 0.9, **({"n_queries": 5} if name == "Square" else {"steps": 2})}
    one, other = noise_after(lambda *a: getattr(torchattacks, name)(model, **settings)(*a[1:]))
    assert torch.equal(one, other)  # the trap: noise that was secret is the same every time
    assert len(reseeded) == 2  # and CUDA's, when it starts, will be too
    one, other = noise_after(TorchAttack(name, settings))
    assert not torch.equal(one, other)
    torch.manual_seed(1)
    assert torch.equal(one, torch.randn(3))
    assert len(reseeded) == 2


@pytest.mark.parametrize("name", ["OnePixel", "Pixle"])
def test_numpy_is_not_moved(name):
    model, x, y = case((4, 3, 6, 6))
    settings = {"steps": 2} if name == "OnePixel" else {"restarts": 1, "max_iterations": 2}

    def state():
        return str(np.random.get_state(legacy=False)["state"])  # noqa: NPY002

    before = state()
    getattr(torchattacks, name)(model, **settings)(x, y)
    assert state() != before  # the trap
    before, python = state(), random.getstate()
    TorchAttack(name, settings)(model, x, y)
    assert state() == before
    assert random.getstate() == python


def test_works_under_inference_mode():
    model, x, y = case()
    with torch.inference_mode():
        x, y = x.clone(), y.clone()  # inference tensors, as in Lightning's validation
        with pytest.raises(RuntimeError, match=r"inference|does not require grad|element 0"):
            torchattacks.PGD(model)(x, y)  # the trap
        assert not torch.equal(TorchAttack("PGD")(model, x, y), x)


@pytest.mark.parametrize("layout", ["channels_last", "2d"])
def test_pgdl2_takes_any_layout_and_rank(layout):
    model, x, y = case((6, 12) if layout == "2d" else (6, 3, 6, 6))
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match=r"view size is not|match the broadcast shape"):
        torchattacks.PGDL2(model)(x, y)  # the trap
    adv = TorchAttack("PGDL2", {"eps": 0.5})(model, x, y)
    assert adv.stride() == x.stride()
    assert 0.4 < (adv - x).flatten(1).norm(dim=1).max() <= 0.5 + 1e-5


@pytest.mark.parametrize("name", ["CW", "DeepFool", "FAB"])
@pytest.mark.parametrize("hidden", [False, True])
def test_no_gradient_of_a_weight_is_left(name, hidden):
    model, x, y = case()
    getattr(torchattacks, name)(model, steps=2)(x, y)
    assert all(p.grad is not None for p in model.parameters())  # the trap
    model.zero_grad(set_to_none=True)
    adv = TorchAttack(name, {"steps": 2})((lambda v: model(v)) if hidden else model, x, y)
    assert all(p.grad is None for p in model.parameters())
    assert all(p.requires_grad for p in model.parameters())
    assert not adv.requires_grad


def test_the_result_holds_no_graph():
    model, x, y = case()
    settings = {"eps": 0.9}
    assert torchattacks.APGD(model, **settings)(x, y).requires_grad  # the trap
    assert not TorchAttack("APGD", settings)(model, x, y).requires_grad


def test_activations_are_freed_after_a_backward():
    """The stand-in's own graph must not outlive torchattacks', or two steps' would pile up."""
    model, x, y = case()
    alive, most = [0], [0]

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            alive[0] += 1
            most[0] = max(most[0], alive[0])
            ctx.save_for_backward(token := z.clone())
            weakref.finalize(token, lambda: alive.__setitem__(0, alive[0] - 1))
            return z * 1

        @staticmethod
        def backward(ctx, grad):
            return grad * ctx.saved_tensors[0].sign().abs()

    TorchAttack("PGD", {"steps": 5})(lambda v: model(Counted.apply(v)), x, y)
    assert alive == [0]
    assert most == [1]


def test_pgdrs_beyond_its_batch_and_pixle_with_more_than_one_image():
    model, x, y = case((6, 3, 6, 6))
    settings = {"steps": 1, "noise_batch_size": 2, "batch_max": 5}
    with pytest.raises(NameError):
        torchattacks.PGDRS(model, **settings)(x, y)  # the trap
    rows = []
    model.register_forward_hook(lambda module, args, out: rows.append(len(args[0])))
    assert not torch.equal(TorchAttack("PGDRS", settings)(model, x, y), x)
    assert rows == [4, 4, 4]
    settings = {"update_each_iteration": True, "max_iterations": 2}
    with pytest.raises(AssertionError):
        torchattacks.Pixle(model, **settings)(x, y)  # the trap
    assert not torch.equal(TorchAttack("Pixle", settings)(model, x, y), x)


@pytest.mark.parametrize("normalized", [False, True])
def test_autocast_holds_for_the_model_and_not_for_the_attack(normalized):
    net, raw, y = case()
    space = SPACE if normalized else InputSpace()
    x, seen = space.to_model(raw), []
    net[1].register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    attack = TorchAttack("PGD", {"eps": 1e-3, "alpha": 2e-4, "steps": 20}, inputs=space)
    with torch.autocast("cpu", torch.bfloat16):
        adv = attack(net, x, y)
        with pytest.raises(RuntimeError, match="dtype"):
            torchattacks.Square(net, n_queries=5)(raw, y)  # the trap: its buffers are float32
        TorchAttack("Square", {"n_queries": 5}, inputs=space)(net, x, y)
    assert set(seen) == {torch.bfloat16}
    assert adv.dtype == torch.float32
    inner = (raw > 0.01) & (raw < 0.99)
    moved = (space.to_raw(adv) - raw).abs()[inner]
    assert (moved > 0.9e-3).float().mean() > 0.8  # bfloat16 could not hold such steps


def test_a_first_layer_that_works_in_place():
    model, x, y = case()
    model = nn.Sequential(nn.Threshold(0.5, 0.0, inplace=True), *model)
    with pytest.raises(RuntimeError, match="in-place operation"):
        torchattacks.PGD(model)(x, y)  # the trap
    kept = x.clone()
    for name in ("PGD", "Square"):
        adv = TorchAttack(name, {"eps": 0.3})(model, x, y)
        assert torch.equal(x, kept)
        assert (adv - x).abs().max() <= 0.3 + 1e-6


def test_a_result_that_is_not_finite_is_an_error():
    net, x, y = case()
    model = nn.Sequential(net, nn.LogSoftmax(1))
    net[3].weight.data[0, 0] = float("nan")
    assert torchattacks.PGDL2(model)(x, y).isnan().any()  # the trap
    with pytest.raises(InputError, match=r"PGDL2 to return finite values.*from nan"):
        TorchAttack("PGDL2")(model, x, y)


def test_too_few_classes_are_named():
    model, x, y = case(classes=3)
    with pytest.raises(IndexError):
        torchattacks.APGDT(model, n_classes=3)(x, y)  # the trap
    with pytest.raises(InputError, match="at least 4 classes for torchattacks' APGDT, got 3"):
        TorchAttack("APGDT")(model, x, y)


COUPLES = [
    ("CW", {"lr": 0.05, "steps": 50}, True),
    ("APGDT", {"norm": "L2", "eps": 2.0}, True),
    ("APGDT", {"norm": "Linf", "eps": 0.5}, False),
    ("APGD", {"norm": "L2", "eps": 2.0}, False),
]


@pytest.mark.parametrize(("name", "settings", "couples"), COUPLES)
def test_the_attacks_that_couple_records_say_so(name, settings, couples):
    """What becomes of ten records depends on one that was put before them, or it does not."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.Tanh(), nn.Linear(16, 5))
    with torch.no_grad():  # steep, so that there is something to find for every record
        model[1].weight.mul_(8)
        model[1].bias.copy_(-model[1].weight.sum(1) / 2)
    x = torch.rand(30, 1, 6, 6)
    y = model(x).argmax(1)
    attack = TorchAttack(name, settings)

    def others(first, chunk_size=None):
        rows = [first, *range(20, 30)]
        return attack(model, x[rows], y[rows], generator=seeded(), chunk_size=chunk_size)[1:]

    found = [others(first) for first in range(8)]
    assert all((rows != x[20:]).any() for rows in found)
    moved = max((rows - found[0]).abs().max() for rows in found)
    assert (moved > 1e-4) == couples == attack.couples_records
    if name == "CW":  # draws no random numbers, which the others take one record after another
        assert all(torch.equal(others(first, 1), others(0, 1)) for first in (1, 6))


def test_the_others_do_not():
    assert not TorchAttack("APGDT").couples_records
    assert not TorchAttack("APGD", {"norm": "L2"}).couples_records
    assert not TorchAttack("AutoAttack").couples_records
    assert TorchAttack("AutoAttack", {"norm": "L2"}).couples_records
    assert not TorchAttack("AutoAttack", {"norm": "L2", "version": "rand"}).couples_records
    model, x, y = case((8, 1, 6, 6))
    other = x.clone()
    other[0] = 1 - x[0]
    for name in ("BIM", "MIFGSM", "UPGD", "DeepFool", "FAB"):
        attack = TorchAttack(name, {"steps": 4})
        same = attack(model, x, y)[1:] == attack(model, other, y)[1:]
        assert same.all(), name
