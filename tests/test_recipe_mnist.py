"""The recipe for MNIST, on scikit-learn's digits in MNIST's clothes."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.utils.data import TensorDataset

from recipes import mnist_robust_private as recipe
from tests.privacy.accounting.test_calibration import second_opinion

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """1,797 digits of 28 × 28, as a Keras-style npz."""
    digits = load_digits()
    small = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    x = F.interpolate(small, size=28, mode="bilinear").mul(255).byte().squeeze(1).numpy()
    path = tmp_path_factory.mktemp("mnist") / "digits.npz"
    np.savez(path, x_train=x[:1500], y_train=digits.target[:1500].astype(np.uint8),
             x_test=x[1500:], y_test=digits.target[1500:].astype(np.uint8))  # fmt: skip
    return path


@pytest.fixture(scope="module")
def printed(file):
    few = {"epochs": 3, "batch-size": 500, "attacked": 3, "longer": 1, "seeds": 0}
    process = subprocess.run(
        [sys.executable, ROOT / "recipes" / "mnist_robust_private.py", "--data-file", file,
         "--runs", "robust and private", "plain", "--output", file.parent / "out",
         *(f"--{name}={value}" for name, value in few.items())],
        cwd=file.parent, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-4000:]
    return process.stdout


def test_it_trains_and_measures(printed, file):
    last = json.loads(printed.splitlines()[-1])
    both, plain = last["results"]
    assert (both["run"], plain["run"]) == ("robust and private", "plain")
    assert 1.0 < both["epsilon"] <= recipe.EPSILON
    assert plain["epsilon"] is None
    assert plain["clean"] > 60  # after nine steps
    assert both["clean"] > 30  # 1,500 records at ε = 1: mostly noise
    for result in (both, plain):
        assert result["autoattack"] * 3 / 100 == pytest.approx(round(result["autoattack"] * 0.03))
        assert result["longer"] in (0, 100)
    lines = (file.parent / "out" / "results.jsonl").read_text().splitlines()
    kept = [json.loads(line) for line in lines]
    assert [line.pop("settings")["contrast"] for line in kept] == [10.0, 10.0]
    assert kept == last["results"]
    assert f"| robust and private | {both['epsilon']:.3f} |" in printed


def test_its_epsilon_by_a_second_accountant(printed, file):
    """From σ, q and the steps that the ledger holds."""
    (ledger,) = (file.parent / "out" / "privacy_ledgers").glob("*.jsonl")
    steps = [json.loads(line) for line in ledger.read_text().splitlines()]
    steps = [line for line in steps if line["kind"] == "step"]
    sigmas = {line["noise_multiplier"] for line in steps}
    rates = {line["sample_rate"] for line in steps}
    assert len(sigmas) == len(rates) == 1
    assert rates == {500 / 1500}
    assert len(steps) == 3 * 3
    recomputed = second_opinion([(sigmas.pop(), rates.pop(), len(steps))], recipe.DELTA)
    epsilon = json.loads(printed.splitlines()[-1])["results"][0]["epsilon"]
    assert recomputed <= recipe.EPSILON
    assert recomputed - 0.01 <= epsilon <= recomputed + 0.05


def test_the_table_has_means_and_each_seed():
    figures = {"run": "both", "epsilon": 1.039, "longer": 79.0, "train_seconds": 60.0}
    runs = [{**figures, "clean": 97.0, "autoattack": 80.0}]
    runs.append({**figures, "clean": 98.0, "autoattack": 83.0})
    expected = "| both | 1.039 | 97.50 | 81.5 | 79.0 | 97.00 / 80.0, 98.00 / 83.0 | 1.0 |"
    assert expected in recipe.table(runs)


def test_held_out_images_are_training_images_and_the_same_each_time():
    data = TensorDataset(torch.arange(100.0), torch.arange(100))
    train, val = recipe.held_out(data, 10)
    again = recipe.held_out(data, 10)[1]
    assert torch.equal(val.tensors[1], again.tensors[1])
    assert sorted([*train.tensors[1].tolist(), *val.tensors[1].tolist()]) == list(range(100))
    assert len(val) == 10


# --- the features ---------------------------------------------------------------------------------


def test_wavelets_are_blind_to_brightness_and_see_their_own_orientation():
    waves = recipe.morlet(4)
    assert waves.sum((1, 2, 3)).abs().max() < 1e-6
    r = torch.arange(28) * 1.5
    stripes = torch.stack([r.cos().expand(28, 28), r.cos()[:, None].expand(28, 28)]).unsqueeze(1)
    moduli = recipe.Scattering(contrast=0).moduli(stripes)[:, :, 8:-8, 8:-8].mean((2, 3))
    assert moduli[0].argmax() == 0  # varies along x
    assert moduli[1].argmax() == 2  # along y
    assert moduli[0, 0] > 5 * moduli[0, 2]


def test_features_are_each_records_own_and_have_a_gradient():
    x = torch.rand(5, 1, 28, 28, requires_grad=True)
    net = recipe.Scattering()
    together = net(x)
    assert together.shape == (5, net.features) == (5, 1225)
    for i in range(5):
        torch.testing.assert_close(net(x[i : i + 1])[0], together[i], rtol=0, atol=1e-5)
    (gradient,) = torch.autograd.grad(together.pow(2)[:, ::7].sum(), x)
    assert (gradient != 0).all()
    assert gradient.isfinite().all()


def test_the_curve_keeps_black_and_white_and_loses_what_is_near_them():
    """As the recipe's header says: an attacker's 0.1 becomes a tenth of that."""

    def curve(value):
        return float(recipe.contrast(torch.tensor(value), 10.0))

    assert curve(0.0) == pytest.approx(0, abs=1e-6)
    assert curve(1.0) == pytest.approx(1, abs=1e-6)
    assert 0.005 < curve(0.1) - curve(0.0) < 0.015
    assert recipe.contrast(torch.tensor(0.3), 0.0) == torch.tensor(0.3)


# --- data -----------------------------------------------------------------------------------------


def test_reads_the_file(file):
    train, test = recipe.load(file)
    x, y = train[:]
    assert (x.shape, y.shape, len(test)) == ((1500, 1, 28, 28), (1500,), 297)
    assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
    assert 0 <= x.min() < x.max() <= 1


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x_train": np.zeros((2, 28, 28), np.uint8)}, r"Expected \['x_test', 'y_test', 'y_train"),
        ({k: np.zeros((2, 8, 8), np.uint8) for k in ("x_train", "y_train", "x_test", "y_test")},
         "uint8 images of 28 × 28, got uint8 of shape"),
    ],
)  # fmt: skip
def test_other_files_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "other.npz", **arrays)
    with pytest.raises(SystemExit, match=message):
        recipe.load(tmp_path / "other.npz")


def test_without_a_file_and_without_torchvision_it_says_what_to_give(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(SystemExit, match="Expected --data-file, an npz"):
        recipe.load(None)


def test_private_runs_ask_for_no_more_than_the_published_epsilon():
    callback = recipe.private(argparse.Namespace())
    assert (recipe.EPSILON, recipe.DELTA) == (1.04, 1e-5)
    assert callback.settings()["target_epsilon"] == 1.04
    assert callback.settings()["delta"] == 1e-5
