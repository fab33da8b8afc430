"""Every attack of torchattacks keeps the contract of an attack, and bad settings are refused."""

import copy
import pickle
import random
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from torch import nn

from defend import AdversarialTraining, InputError, InputSpace, evaluate
from defend.attacks.torchattacks.adapter import TorchAttack
from tests.helpers import Net, data, loader, trainer

NORMALIZED = InputSpace(mean=(0.5, 0.4, 0.3), std=(0.25, 0.2, 0.3))
CASES = [
    *[(name, {}) for name in ("VANILA", "GN", "FGSM", "FFGSM")],
    *[
        (name, {"eps": 0.1, "alpha": 0.05, "steps": 2})
        for name in (
            "BIM", "RFGSM", "PGD", "EOTPGD", "TPGD", "MIFGSM", "UPGD", "DIFGSM", "TIFGSM",
            "Jitter", "NIFGSM", "PGDRS", "PGDRSL2", "SINIFGSM", "VMIFGSM", "VNIFGSM", "PGDL2",
        )
    ],
    ("UPGD", {"loss": "dlr", "steps": 2}),
    ("UPGD", {"loss": "margin", "steps": 2}),
    *[("APGD", {"eps": 0.3, "norm": n, "loss": "dlr", "steps": 3}) for n in ("Linf", "L2")],
    *[("APGDT", {"eps": 0.3, "norm": norm, "steps": 3}) for norm in ("Linf", "L2")],
    *[("FAB", {"eps": 0.5, "norm": norm, "steps": 2}) for norm in ("Linf", "L2")],
    ("FAB", {"eps": 0.5, "steps": 2, "multi_targeted": True}),
    *[("Square", {"eps": 0.3, "norm": norm, "n_queries": 5}) for norm in ("Linf", "L2")],
    *[("AutoAttack", {"eps": 0.9, "version": v}) for v in ("standard", "plus", "rand")],
    ("AutoAttack", {"eps": 9.0, "norm": "L2"}),
    ("CW", {"steps": 5, "c": 10, "lr": 0.1}),
    ("DeepFool", {"steps": 3}),
    ("SparseFool", {"steps": 2}),
    ("OnePixel", {"steps": 2, "pixels": 3}),
    ("Pixle", {"restarts": 1, "max_iterations": 2}),
    ("Pixle", {"max_iterations": 2, "update_each_iteration": True}),
]  # fmt: skip
IDS = ["-".join([name, *map(str, settings.values())]) for name, settings in CASES]


class Moody(nn.Module):
    """Batch statistics, a frozen norm, dropout and a draw from the global RNG; half-precise."""

    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(
            nn.ReLU(inplace=True), nn.BatchNorm2d(3), nn.BatchNorm2d(3).eval(), nn.Dropout(0.5),
            nn.Flatten(), nn.Linear(108, 5),
        ).to(dtype)  # fmt: skip

    def forward(self, x):
        torch.rand(1)
        return {"logits": self.net(x)}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def batch(shape=(4, 3, 6, 6)):
    """Raw inputs, a model, and the labels that it gives them: there is something to attack."""
    x, model = torch.rand(shape, generator=seeded(2)), mlp(shape)
    return x, model(x).argmax(1), model


def mlp(shape, classes=5):
    torch.manual_seed(1)
    width = torch.Size(shape[1:]).numel()
    return nn.Sequential(nn.Flatten(), nn.Linear(width, 16), nn.Tanh(), nn.Linear(16, classes))


def everything(model):
    """What an attack must leave as it was, as text and numbers that can be compared."""
    return [
        [m.training for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
        [None if p.grad is None else p.grad.tolist() for p in model.parameters()],
        {key: value.tolist() for key, value in model.state_dict().items()},
        torch.get_rng_state().tolist(),
        random.getstate(),
        [str(part) for part in np.random.get_state()],  # noqa: NPY002
        (torch.is_grad_enabled(), torch.random.manual_seed, torch.cuda.random.manual_seed),
    ]


def distance(attack, delta):
    l2 = attack.settings.get("norm") == "L2" or attack.name.endswith("L2")
    return delta.flatten(1).norm(p=2 if l2 else float("inf"), dim=1).max()


# A dtype is what the model sees, images and attack are float32: one after the other is enough.
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.mark.parametrize(
    ("name", "settings", "dtype"),
    [(*case, DTYPES[(i + k) % 3]) for i, case in enumerate(CASES) for k in range(2 - (i > 20))],
    ids=str,
)
def test_contract(name, settings, dtype, capsys):
    """In ball and box, as x came, the same again, silent, and nothing left behind."""
    x = NORMALIZED.to_model(batch()[0]).to(dtype).to(memory_format=torch.channels_last)
    model = Moody(dtype).eval()
    y = model(x.clone())["logits"].argmax(1)
    model.train().net[2].eval()
    before, kept = everything(model), x.clone()
    attack = TorchAttack(name, settings, inputs=NORMALIZED)
    adv = attack(model, x, y, generator=seeded())

    assert everything(model) == before
    assert torch.equal(x, kept)
    assert (adv.shape, adv.dtype, adv.stride()) == (x.shape, x.dtype, x.stride())
    assert not adv.requires_grad
    assert torch.equal(adv, x) == (name == "VANILA")
    rounding = 8 * max(torch.finfo(dtype).eps, 1e-7)
    changed = NORMALIZED.to_raw(adv.double())
    assert changed.min() >= -rounding
    assert changed.max() <= 1 + rounding
    if attack.eps is not None:
        moved = distance(attack, changed - NORMALIZED.to_raw(x.double()))
        assert moved <= attack.eps + rounding * 108**0.5
    with torch.inference_mode():
        again = attack(model, x.clone(), y.clone(), generator=seeded())
    assert torch.equal(again, adv)
    assert capsys.readouterr() == ("", "")


def test_the_cases_are_all_attacks_there_are():
    import torchattacks

    assert {name for name, _ in CASES} | {"LGV", "MultiAttack"} == set(torchattacks.__all__)


@pytest.mark.parametrize("name", ["FGSM", "BIM", "MIFGSM", "DeepFool", "CW", "FAB"])
@pytest.mark.parametrize("normalized", [False, True])
def test_finds_what_torchattacks_finds(name, normalized):
    import torchattacks

    raw, y, model = batch()
    space = NORMALIZED if normalized else InputSpace()
    x = space.to_model(raw)
    y = model(x).argmax(1)
    alone = getattr(torchattacks, name)(model)
    if normalized:
        alone.set_normalization_used(mean=space.mean, std=space.std)
    expected = alone(x, y)
    adv = TorchAttack(name, inputs=space)(model, x, y)
    torch.testing.assert_close(adv, expected, rtol=0, atol=1e-5)
    assert not torch.equal(adv, x)


@pytest.mark.parametrize("shape", [(4, 12), (4, 3, 10), (4, 2, 3, 4, 4), (1, 3, 6, 6)], ids=str)
@pytest.mark.parametrize("name", ["FGSM", "PGDL2", "APGD", "FAB", "Square", "OnePixel"])
def test_any_rank(name, shape):
    x, y, model = batch(shape)
    attack = TorchAttack(name, {"n_queries": 10, "eps": 0.5} if name == "Square" else {})
    adv = attack(model, x, y, generator=seeded())
    assert (adv.shape, adv.stride()) == (x.shape, x.stride())
    assert torch.equal(attack(model, x, y, generator=seeded()), adv)
    if name == "OnePixel":  # of a table, one column
        changed = (adv != x).flatten(1).sum(1).max()
        assert changed <= (1 if len(shape) == 2 else shape[1])


def test_a_random_attack_follows_the_generator():
    x, y, model = batch()
    for name in ("PGD", "APGD", "Square", "OnePixel", "Pixle"):
        settings = {"eps": 0.9} if name in ("APGD", "Square") else {}
        # More steps forget where they started, now and then.
        settings = {"steps": 1} if name == "PGD" else settings
        attack = TorchAttack(name, settings)
        one, other = (attack(model, x, y, generator=seeded(s)) for s in (1, 2))
        assert not torch.equal(one, other), name
        assert not torch.equal(attack(model, x, y), attack(model, x, y)), name


def test_threads_take_turns():
    x, y, model = batch()
    attack = TorchAttack("PGD")
    expected = attack(model, x, y, generator=seeded())
    found = []

    def work():
        found.append(attack(model, x, y, generator=seeded()))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert all(torch.equal(adv, expected) for adv in found)


@pytest.mark.parametrize("chunk_size", [3, "auto", None])
def test_no_more_rows_at_once_than_asked_for(chunk_size):
    x, y, model = batch((8, 3, 6, 6))
    rows = []
    model.register_forward_hook(lambda module, args, out: rows.append(len(args[0])))
    TorchAttack("FGSM")(model, x, y, chunk_size=chunk_size)
    assert rows == ([2, 3, 3] if chunk_size == 3 else [8])


def test_with_eps_scales_the_step_along():
    attack = TorchAttack("PGD", {"steps": 5}).with_eps(4 / 255)
    assert attack.eps == 4 / 255
    assert attack.settings["alpha"] == pytest.approx(1 / 255)  # of 2/255 at 8/255 by default
    assert attack.settings["steps"] == 5
    assert "alpha" not in TorchAttack("APGD").with_eps(0.1).settings
    assert TorchAttack("CW").eps is None
    with pytest.raises(InputError, match="with a radius, got torchattacks' CW"):
        TorchAttack("CW").with_eps(0.1)


def test_nothing_moves_at_radius_zero_and_an_empty_batch_stays_empty():
    x, y, model = batch()
    assert torch.equal(TorchAttack("PGDL2").with_eps(0.0)(model, x, y), x)
    assert TorchAttack("PGD")(model, x[:0], y[:0]).shape == (0, 3, 6, 6)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({}, 5), ({"n_classes": 3}, 3)],
)
def test_as_many_classes_as_the_model_has(settings, expected, monkeypatch):
    import torchattacks

    x, y, model = batch()
    attack, seen = TorchAttack("APGDT", settings), []
    init = torchattacks.APGDT.__init__

    def spy(self, model, **given):
        seen.append(given.get("n_classes"))
        init(self, model, **given)

    monkeypatch.setattr(torchattacks.APGDT, "__init__", spy)
    attack(model, x, y)
    assert seen == [expected]


def test_is_a_value_that_yaml_can_build():
    from jsonargparse import ArgumentParser

    attack = TorchAttack("PGD", {"eps": 0.1}, inputs=NORMALIZED)
    for twin in (copy.deepcopy(attack), pickle.loads(pickle.dumps(attack))):
        assert twin == attack
        assert hash(twin) == hash(attack)
    assert "'eps': 0.1" in repr(attack)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(TorchAttack, "attack")
    given = {"name": "PGD", "settings": {"eps": 0.1}, "inputs": {"mean": [0.5], "std": [0.2]}}
    built = parser.instantiate_classes(parser.parse_object({"attack": given})).attack
    assert built == TorchAttack("PGD", {"eps": 0.1}, inputs=InputSpace(mean=(0.5,), std=(0.2,)))


def test_in_training_and_evaluation():
    attack = TorchAttack("PGD", {"eps": 0.1, "steps": 2})
    module = Net()
    trainer(callbacks=[AdversarialTraining(attack)], max_epochs=20).fit(module, loader())
    assert module.training
    report = evaluate(module, [data().tensors], {"pgd": attack}, progress=False)
    assert report.attack_accuracy["pgd"] < report.clean_accuracy


def test_import_of_defend_leaves_torchattacks_alone():
    code = "import sys, defend.attacks.torchattacks.adapter; print('torchattacks' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.cuda
@pytest.mark.parametrize(("name", "settings"), CASES, ids=IDS)
def test_contract_on_cuda(name, settings):
    pytest.importorskip("torchattacks", reason="an extra")
    x, y, model = batch()
    x, y, model = x.cuda(), y.cuda(), model.cuda()
    before = torch.cuda.get_rng_state(), torch.get_rng_state()
    attack = TorchAttack(name, settings)
    adv = attack(model, x, y, generator=seeded())
    assert (adv.device, adv.dtype, adv.shape) == (x.device, x.dtype, x.shape)
    assert torch.equal(adv, x) == (name == "VANILA")
    if attack.eps is not None:
        assert distance(attack, adv - x) <= attack.eps + 1e-5
    assert torch.equal(before[0], torch.cuda.get_rng_state())
    assert torch.equal(before[1], torch.get_rng_state())
