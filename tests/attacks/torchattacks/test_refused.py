"""TorchAttack refuses what torchattacks would trip over, and says what to do instead."""

import sys

import pytest
import torch

from defend import InputError, InputSpace
from defend.attacks.torchattacks.adapter import TorchAttack
from tests.attacks.torchattacks.test_adapter import batch, mlp


def test_names_the_install_command(monkeypatch):
    import torchattacks

    monkeypatch.setattr(torchattacks, "__version__", "3.5.1")
    with pytest.raises(InputError, match=r"got 3\.5\.1.*pip install torchattacks==3\.3\.0"):
        TorchAttack("PGD")
    monkeypatch.setitem(sys.modules, "torchattacks", None)
    with pytest.raises(InputError, match=r"got none\. pip install torchattacks==3\.3\.0"):
        TorchAttack("PGD")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("PDG",), "`name` to be one of APGD, APGDT, AutoAttack.*got 'PDG'"),
        (("LGV",), "got 'LGV'. It trains copies of the model"),
        (("MultiAttack",), "got 'MultiAttack'. It takes attacks"),
        (("PGD", ["eps"]), "`settings` to be a mapping"),
        (("PGD", {"epsilon": 0.1}), "which are alpha, eps, random_start, steps, got 'epsilon'"),
        (("VANILA", {"eps": 0.1}), "which are none, got 'eps'"),
        (("APGD", {"seed": 1}), "got 'seed'. Random numbers come from the generator"),
        (("APGD", {"verbose": True}), "got 'verbose'.*attacks are silent"),
        (("PGD", {"eps": 8}), "`eps` to be a number ≥ 0 and ≤ 1, in units of"),
        (("PGD", {"eps": "8/255"}), "got '8/255'"),
        (("PGDL2", {"eps": -1.0}), "`eps` to be a number ≥ 0, in units of"),
        (("APGD", {"norm": "L2", "eps": float("inf")}), "got inf"),
        (("FAB", {"norm": "L1"}), r"`norm` to be one of \('Linf', 'L2'\), got 'L1'"),
        (("PGDRS", {"noise_type": "gaussian"}), "`noise_type` to be one of"),
        (("AutoAttack", {"version": "fast"}), "that torchattacks' AutoAttack takes.*Not valid"),
        (("TIFGSM", {"kernel_name": "box"}), "got {'kernel_name': 'box'}: NotImplementedError"),
    ],
)  # fmt: skip
def test_refuses_bad_settings(arguments, message):
    with pytest.raises(InputError, match=message):
        TorchAttack(*arguments)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (InputSpace(low=-1.0), r"the box \[0, 1\].*got \[-1.0, 1.0\]"),
        (InputSpace(high=(1.0, 2.0)), r"got \[0.0, \(1.0, 2.0\)\]"),
        (InputSpace(immutable=(1,)), r"no immutable channels, got \(1,\)"),
    ],
)
def test_refuses_other_boxes(space, message):
    with pytest.raises(InputError, match=message):
        TorchAttack("PGD", inputs=space)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.ones(2, 3, 6, 6, dtype=torch.uint8), torch.zeros(2).long(), "floating point inputs"),
        (torch.rand(3), torch.zeros(3).long(), "one record a row"),
        (torch.rand(3, 4), torch.zeros(2).long(), "3 inputs, 2 targets"),
        (torch.rand(3, 4), torch.rand(3), r"class indices of shape \[3\], got torch.float32"),
        (torch.rand(3, 4), torch.zeros(3, 5).long(), r"got torch.int64 of shape \(3, 5\)"),
        (torch.rand(3, 4) + 5, torch.zeros(3).long(), "inside the box"),
    ],
)
def test_refuses_bad_batches(x, y, message):
    with pytest.raises(InputError, match=message):
        TorchAttack("PGD")(mlp((1, 4)), x, y)


def test_refuses_bad_chunks():
    x, y, model = batch()
    with pytest.raises(InputError, match="`chunk_size` to be 'auto', None or an integer"):
        TorchAttack("PGD")(model, x, y, chunk_size=0)


@pytest.mark.parametrize(
    ("name", "settings", "shape", "message"),
    [
        ("TIFGSM", {}, (2, 1, 6, 6), "images of 3 channels for torchattacks' TIFGSM, got 1"),
        ("Pixle", {}, (2, 12), "images of 3 channels for torchattacks' Pixle, got 1"),
        ("Pixle", {}, (2, 3, 6, 5), "square images for torchattacks' Pixle, got 6 × 5"),
        ("DIFGSM", {}, (2, 12), "square images for torchattacks' DIFGSM, got 1 × 12"),
        ("DIFGSM", {"resize_rate": 1.5}, (2, 1, 6, 6), "`resize_rate` that makes the images smal"),
        ("Square", {"norm": "L2"}, (2, 30), "at least 5 × 5 for torchattacks' Square"),
        ("Square", {"norm": "L2"}, (2, 1, 12, 6), "about square.*got 12 × 6"),
        ("AutoAttack", {"norm": "L2"}, (2, 1, 4, 4), "at least 5 × 5 for torchattacks' AutoAtt"),
    ],
)
def test_refuses_images_that_torchattacks_would_trip_over(name, settings, shape, message):
    x, y, model = batch(shape)
    with pytest.raises(InputError, match=message):
        TorchAttack(name, settings)(model, x, y)


@pytest.mark.parametrize(
    ("name", "settings", "classes", "message"),
    [
        ("APGD", {"loss": "dlr"}, 2, "at least 3 classes for torchattacks' APGD, got 2"),
        ("UPGD", {"loss": "dlr"}, 2, "at least 3 classes for torchattacks' UPGD, got 2"),
        ("APGDT", {}, 3, "at least 4 classes for torchattacks' APGDT, got 3"),
        ("AutoAttack", {}, 3, "at least 4 classes for torchattacks' AutoAttack, got 3"),
        ("AutoAttack", {"version": "plus"}, 2, "at least 4 classes"),
        ("AutoAttack", {"version": "rand"}, 2, "at least 3 classes"),
        ("APGDT", {"n_classes": 6}, 5, "`n_classes` from 2 to the 5 classes of the model, got 6"),
        ("APGDT", {"n_classes": 1}, 5, "`n_classes` from 2 to the 5 classes of the model, got 1"),
    ],
)
def test_refuses_models_of_too_few_classes(name, settings, classes, message):
    x, model = batch()[0], mlp((4, 3, 6, 6), classes)
    with pytest.raises(InputError, match=message):
        TorchAttack(name, settings)(model, x, model(x).argmax(1))


def test_refuses_what_is_no_classifier():
    x, y, _ = batch()
    with pytest.raises(InputError, match=r"logits of shape \[4, classes\], got \(4, 3, 6, 6\)"):
        TorchAttack("FGSM")(lambda v: v, x, y)
