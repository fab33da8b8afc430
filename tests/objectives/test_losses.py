"""Losses of each record."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from defend import InputError
from defend.objectives.losses import (
    cross_entropy,
    in_full_precision,
    kl,
    labels_of,
    margin,
    targeted_margin,
)
from tests.reference import objectives as reference


def logits(records=12, classes=5, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(records, classes, generator=generator, dtype=dtype)


def targets(records=12, classes=5):
    return torch.arange(records) % classes


def one_hot(y, classes=5):
    return torch.nn.functional.one_hot(y, classes).double()


@pytest.mark.parametrize("classes", [2, 3, 4, 5, 10])
def test_margin_is_the_paper_s(classes):
    z, y = logits(classes=classes), targets(classes=classes)
    expected = [reference.dlr(row.tolist(), int(label)) for row, label in zip(z, y, strict=True)]
    torch.testing.assert_close(margin(z, y), torch.tensor(expected, dtype=torch.float64))
    assert min(expected) < 0 < max(expected)  # records on both sides of the boundary


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(-50, 50), min_size=2, max_size=8, unique=True),
    st.integers(0, 7),
)
def test_margin_of_any_record(values, label):
    label %= len(values)
    value = float(margin(torch.tensor([values], dtype=torch.float64), torch.tensor([label])))
    best = max(range(len(values)), key=values.__getitem__)
    assert (value > 0) == (best != label)
    ordered = sorted(values, reverse=True)
    if len(values) < 4 or ordered[0] - ordered[2] > 1e-6:
        assert value == pytest.approx(reference.dlr(values, label), rel=1e-6, abs=1e-12)


def test_margin_does_not_change_with_the_scale_from_four_classes_on():
    for classes in (4, 10):
        z, y = logits(classes=classes), targets(classes=classes)
        torch.testing.assert_close(margin(1000 * z + 7, y), margin(z, y))
    few = logits(classes=3)
    y = targets(classes=3)
    torch.testing.assert_close(margin(10 * few, y), 10 * margin(few, y))


def test_margin_has_a_gradient_where_cross_entropy_has_none():
    z = torch.tensor([[200.0, 0.0, -3.0, -5.0]], requires_grad=True)
    y = torch.tensor([0])
    assert not torch.autograd.grad(cross_entropy(z, y).sum(), z)[0].any()
    assert torch.autograd.grad(margin(z, y).sum(), z)[0].abs().max() > 1e-4


def test_margin_of_equal_logits_is_zero_and_finite():
    z = torch.zeros(3, 6, requires_grad=True)
    loss = margin(z, torch.tensor([0, 1, 2]))
    assert not loss.any()
    assert torch.autograd.grad(loss.sum(), z)[0].isfinite().all()


def slow_targeted_margin(z, t):
    """The formula of the paper, from a list of logits."""
    lead = max(value for i, value in enumerate(z) if i != t) - z[t]
    ranked = sorted(z, reverse=True)
    return lead / (ranked[0] - (ranked[2] + ranked[3]) / 2) if len(z) > 3 else lead


@pytest.mark.parametrize("classes", [2, 3, 4, 5, 10])
def test_targeted_margin_is_the_paper_s(classes):
    z, t = logits(classes=classes), targets(classes=classes)
    expected = [slow_targeted_margin(row.tolist(), int(i)) for row, i in zip(z, t, strict=True)]
    torch.testing.assert_close(targeted_margin(z, t), torch.tensor(expected, dtype=z.dtype))
    assert min(expected) < 0 < max(expected)
    # The planted wrong answer: divided as the untargeted one is.
    assert torch.allclose(targeted_margin(z, t), margin(z, t)) == (classes < 4)
    soft = 0.9 * one_hot(t, classes) + 0.1 / classes
    torch.testing.assert_close(targeted_margin(z, soft), targeted_margin(z, t))


def test_targeted_margin_has_a_gradient_where_the_target_is_third():
    z = torch.tensor([[3.0, 2.0, 1.0, 0.0, -1.0]], requires_grad=True)
    third = torch.tensor([2])
    slopes = [torch.autograd.grad(f(z, third).sum(), z)[0][0, 2] for f in (margin, targeted_margin)]
    assert float(slopes[0]) == 0  # the constant 1
    assert float(slopes[1]) < -0.1
    equal = torch.zeros(2, 6, requires_grad=True)
    loss = targeted_margin(equal, torch.tensor([0, 5]))
    assert torch.autograd.grad(loss.sum(), equal)[0].isfinite().all()


@pytest.mark.parametrize("loss", [margin, targeted_margin])
@pytest.mark.parametrize("shape", [(12, 1), (12, 4), (11,), (12, 5, 1)], ids=str)
def test_margins_refuse_targets_of_another_shape(loss, shape):
    message = r"indices of shape \(12,\) or class probabilities of shape \(12, 5\), got .* shape"
    with pytest.raises(InputError, match=message):
        loss(logits(), torch.zeros(shape).long())


@pytest.mark.parametrize("turned", [False, True])
def test_kl_of_classes_that_are_ruled_out(turned):
    """Logits of −inf: as if the class were not, in value and gradient."""
    clean, adv = logits(classes=4), logits(classes=4, seed=1)
    out = torch.full((12, 2), -math.inf, dtype=clean.dtype)
    parts = (out, clean) if turned else (clean, out)
    adv.requires_grad_()
    wide = torch.cat([out, adv] if turned else [adv, out], 1)
    loss, expected = kl(torch.cat(parts, 1), wide), kl(clean, adv)
    torch.testing.assert_close(loss, expected)
    slopes = [torch.autograd.grad(value.sum(), adv)[0] for value in (loss, expected)]
    torch.testing.assert_close(*slopes)
    # What only the adversarial input rules out is infinitely far.
    assert (kl(torch.cat([clean, clean[:, :2]], 1), torch.cat([adv, out], 1)) == math.inf).all()


def test_soft_labels():
    z, y = logits(), targets()
    soft = 0.9 * one_hot(y) + 0.02
    torch.testing.assert_close(margin(z, soft), margin(z, y))
    torch.testing.assert_close(cross_entropy(z, soft), reference.batch_soft(z, soft))
    assert torch.equal(labels_of(soft), y)
    assert labels_of(y) is y


def test_cross_entropy_is_of_each_record():
    z, y = logits(), targets()
    expected = [reference.cross_entropy(row, label) for row, label in zip(z, y, strict=True)]
    torch.testing.assert_close(cross_entropy(z, y), torch.stack(expected))


def test_kl_is_of_each_record_and_has_a_direction():
    clean, adv = logits(), logits(seed=1)
    expected = [reference.divergence(c, a) for c, a in zip(clean, adv, strict=True)]
    torch.testing.assert_close(kl(clean, adv), torch.stack(expected))
    assert (kl(clean, adv) > 0).all()
    assert not torch.allclose(kl(adv, clean), kl(clean, adv))  # the planted wrong answer
    torch.testing.assert_close(kl(clean, clean + 3), torch.zeros(12, dtype=torch.float64))


def test_kl_of_certain_models_is_finite():
    clean = torch.tensor([[1e4, 0.0, -1e4]], requires_grad=True)
    adv = torch.tensor([[-1e4, 0.0, 1e4]], requires_grad=True)
    loss = kl(clean, adv).sum()
    assert float(loss.detach()) == pytest.approx(2e4)
    for gradient in torch.autograd.grad(loss, (clean, adv)):
        assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_full_precision(dtype, expected):
    z = logits().to(dtype)
    full = in_full_precision(z)
    assert full.dtype == expected
    assert torch.equal(full.double(), z.double())


def test_half_precision_would_lose_small_losses():
    """Why losses are computed in full precision: float16 rounds this one to zero."""
    z, y = torch.tensor([[9.0, 0.0]], dtype=torch.float16), torch.tensor([0])
    assert float(cross_entropy(z, y)) == 0.0
    full = float(cross_entropy(in_full_precision(z), y))
    assert full == pytest.approx(math.log1p(math.exp(-9)), rel=1e-3)
