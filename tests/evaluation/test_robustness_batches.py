"""Attacks of others on a batch, and the curve over several batches."""

import pytest
import torch
from torch import nn

from defend import PGD, InputError, Linf
from defend.evaluation import RobustnessMeter, robustness_curve
from defend.evaluation.curve import curve_of_batches
from tests.evaluation.test_robustness import Small, Threshold, X, Y

# --- attacks of others ----------------------------------------------------------------------------


def careless(model, x, y, *, generator=None, chunk_size=None):
    """Leaves modes, gradients, the RNG and its inputs as it pleases."""
    model.eval()
    x.requires_grad_(True)
    torch.rand(3)
    nn.functional.cross_entropy(model(x), y).backward()
    with torch.no_grad():
        x += 0.1 * x.grad.sign()
    y.zero_()
    return x


@pytest.mark.parametrize("inference", [False, True])
def test_a_careless_attack_leaves_no_trace(inference):
    model = nn.Sequential(Threshold(), nn.BatchNorm1d(2), nn.Dropout()).train()
    model[2].eval()
    for p in model.parameters():
        p.grad = torch.full_like(p, 7.0)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.inference_mode(inference):
        x, y = X.clone(), Y.clone()
        meter = RobustnessMeter({"own": careless, "again": careless})
        state = torch.get_rng_state()
        meter.update(model, x, y)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model] == [True, True, False]
    assert all(p.requires_grad and torch.all(p.grad == 7.0) for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(x, X)
    assert torch.equal(y, Y)
    assert not x.requires_grad
    report = meter.report()
    assert report.attack_accuracy["own"] == report.attack_accuracy["again"]
    assert report.attack_accuracy["own"] < report.clean_accuracy


# --- the curve of several batches -----------------------------------------------------------------


def test_the_curve_of_batches_weighs_each_record_alike():
    attack, radii = PGD(Linf(0.1)), [0.0, 0.1, 0.2, 0.5]
    cut = [(X[:1], Y[:1]), (X[1:5], Y[1:5]), (X[5:], Y[5:]), (X[:0], Y[:0])]
    expected = robustness_curve(Threshold(), X, Y, attack, radii)
    assert curve_of_batches(Threshold(), cut, attack, radii) == expected


def test_the_curve_of_batches_refuses_no_records():
    for none in ([], [(X[:0], Y[:0])]):
        with pytest.raises(InputError, match="at least one record"):
            curve_of_batches(Threshold(), none, PGD(Linf(0.1)), [0.1])


def test_the_curve_learns_what_fits():
    model = Small(2)
    curve_of_batches(model, [(X, Y), (X, Y)], PGD(Linf(0.1), steps=1), [0.0], chunk_size=4)
    assert model.sizes.count(3) <= 2  # once by the attack, once by the forward alone
    assert max(model.sizes) == 3
