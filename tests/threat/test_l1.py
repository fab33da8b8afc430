import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from defend import InputError
from defend.threat import L1, InputSpace, Region
from defend.threat.l1 import affordable, project_l1_box_, shrinkage
from tests.reference.projections import l1_box_by_bisection, l1_box_by_sorting, l1_steepest


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def case(n, d, seed=0, dtype=torch.float32):
    """Vectors, boxes around 0 and radii: some boxes tight, some radii too large to matter."""
    draw = generator(seed)
    v = 2 * torch.randn(n, d, generator=draw)
    lower = -torch.rand(n, d, generator=draw) * (torch.rand(n, d, generator=draw) > 0.2)
    upper = torch.rand(n, d, generator=draw) * (torch.rand(n, d, generator=draw) > 0.2)
    eps = d * torch.rand(n, 1, generator=draw) ** 3
    return [t.to(dtype) for t in (v, lower, upper, eps)]


def by_rows(reference, v, lower, upper, eps):
    rows = zip(*(t.double().tolist() for t in (v, lower, upper, eps)), strict=True)
    return torch.tensor([reference(a, b, c, e[0]) for a, b, c, e in rows], dtype=torch.float64)


@pytest.mark.parametrize("reference", [l1_box_by_sorting, l1_box_by_bisection])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_projection_is_that_of_the_slow_references(reference, dtype, rtol):
    v, lower, upper, eps = case(60, 9, dtype=dtype)
    projected = project_l1_box_(v.clone(), lower, upper, eps)
    expected = by_rows(reference, v, lower, upper, eps)
    assert (projected - expected).abs().max() <= rtol * v.abs().max()


def brute_force(v, lower, upper, eps):
    """Quadratic programming: δ = p − q with p, q ≥ 0 and Σ p + q ≤ eps."""
    d = len(v)
    found = minimize(
        lambda z: 0.5 * np.sum((z[:d] - z[d:] - v) ** 2),
        np.zeros(2 * d),
        jac=lambda z: np.concatenate([z[:d] - z[d:] - v, v - z[:d] + z[d:]]),
        bounds=[(0, u) for u in upper] + [(0, -low) for low in lower],
        constraints={
            "type": "ineq",
            "fun": lambda z: eps - z.sum(),
            "jac": lambda z: -np.ones(2 * d),
        },
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    assert found.success
    return (found.x[:d] - found.x[d:]).tolist()


def test_projection_is_what_a_general_solver_finds():
    v, lower, upper, eps = case(25, 3, seed=1, dtype=torch.float64)
    projected = project_l1_box_(v.clone(), lower, upper, eps)
    expected = by_rows(brute_force, v, lower, upper, eps)
    torch.testing.assert_close(projected, expected, atol=1e-6, rtol=0)
    # Planted wrong answers: ball and box one after the other, in either order.
    free = torch.full_like(v, torch.inf)
    first_ball = project_l1_box_(v.clone(), -free, free, eps).clamp(lower, upper)
    first_box = project_l1_box_(v.clamp(lower, upper), -free, free, eps)
    for wrong in (first_ball, first_box):
        assert (wrong - expected).abs().max() > 1e-2


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=12),
    st.floats(0, 1e4, width=32),
    st.integers(0, 2**31),
)
def test_projection_is_legal_untouched_within_and_nearest(values, eps, seed):
    v = torch.tensor([values])
    lower = -v.abs().max() * torch.rand(v.shape, generator=generator(seed))
    upper = v.abs().max() * torch.rand(v.shape, generator=generator(seed + 1))
    eps = torch.tensor(eps)
    projected = project_l1_box_(v.clone(), lower, upper, eps)
    assert projected.abs().sum() <= eps * (1 + 1e-6)
    assert (lower <= projected).all()
    assert (projected <= upper).all()
    assert torch.equal(project_l1_box_(projected.clone(), lower, upper, eps), projected)

    legal = L1(eps.item()).random_start(v.expand(200, -1), generator(seed)).clamp(lower, upper)
    distance = (projected.double() - v.double()).norm()
    others = (legal.double() - v.double()).norm(dim=1)
    assert distance <= others.min() + 1e-6 * v.double().norm()


def test_large_records_of_mixed_sizes_are_exact_to_rounding():
    # One value a million times the others: the shrinkage is tiny beside it, and counts all the
    # same for the others. Halving an interval of multipliers would need twice the passes.
    d = 512
    v = torch.rand(4, d, generator=generator()) * 1e-6
    v[:, 0] = 1.0
    v[2:] *= -1
    eps = torch.tensor([1.0, 1.0001, 1.0, 0.5]).view(-1, 1)
    box = torch.ones_like(v)
    projected = project_l1_box_(v.clone(), -box, box, eps)
    expected = by_rows(l1_box_by_bisection, v, -box, box, eps)
    torch.testing.assert_close(projected.double(), expected, atol=1e-7, rtol=0)
    torch.testing.assert_close(projected.abs().sum(1), eps.flatten(), atol=0, rtol=1e-6)


def test_shrinkage_is_the_smallest_float_that_fits():
    v, lower, upper, eps = case(200, 20, seed=2)
    shrink = shrinkage(v, lower, upper, eps)

    def too_long(by):
        return ((v.abs() - by).clamp_min(0).minimum(v.clamp(lower, upper).abs())).sum(1) > eps[:, 0]

    assert not too_long(shrink).any()
    active = shrink[:, 0] > 0
    assert active.double().mean() > 0.5
    below = torch.nextafter(shrink, torch.zeros_like(shrink))
    assert too_long(below)[active].all()


def test_legal_records_keep_every_bit():
    v = torch.randn(5, 8, generator=generator()) * 0.01
    assert torch.equal(
        project_l1_box_(v.clone(), -torch.ones(5, 8), torch.ones(5, 8), v.new_tensor(1.0)), v
    )


@pytest.mark.parametrize("density", [0.01, 0.1, 0.3, 1.0])
def test_steepest_is_that_of_the_slow_reference(density):
    draw = generator()
    grad = torch.randn(50, 20, generator=draw)
    raw = torch.rand(50, 20, generator=draw).round(decimals=1)
    region = InputSpace(immutable=[3, 4]).region(raw, 0.4)
    delta = (torch.randn(50, 20, generator=draw)).clamp(region.lower, region.upper)
    step = L1(0.4, density=density).steepest(grad, delta, region)
    rows = zip(*(t.tolist() for t in (grad, delta, region.lower, region.upper)), strict=True)
    expected = [l1_steepest(*row, density) for row in rows]
    torch.testing.assert_close(step, torch.tensor(expected))
    torch.testing.assert_close(step.abs().sum(1), torch.ones(50))


def test_steepest_passes_over_what_the_box_stops():
    region = Region(
        torch.tensor([[-1.0, 0.0, -1.0]]), torch.tensor([[0.5, 1.0, 1.0]]), torch.tensor(1.0)
    )
    delta = torch.tensor([[0.5, 0.0, 0.0]])
    ball = L1(1.0, density=0.01)
    # The largest is at its upper bound, the next at its lower one.
    step = ball.steepest(torch.tensor([[9.0, -5.0, 1.0]]), delta, region)
    assert torch.equal(step, torch.tensor([[0.0, 0.0, 1.0]]))
    step = ball.steepest(torch.tensor([[-9.0, -5.0, 1.0]]), delta, region)
    assert torch.equal(step, torch.tensor([[-1.0, 0.0, 0.0]]))
    stuck = ball.steepest(torch.tensor([[9.0, -5.0, 0.0]]), delta, region)
    assert torch.equal(stuck, torch.zeros(1, 3))


def test_ties_share_the_step_and_a_nan_is_no_gradient():
    zero = torch.zeros(1, 4)
    region = Region(zero - 1, zero + 1, torch.tensor(1.0))
    step = L1(1.0, density=0.25).steepest(torch.tensor([[2.0, -2.0, 1.0, torch.nan]]), zero, region)
    assert torch.equal(step, torch.tensor([[0.5, -0.5, 0.0, 0.0]]))


def test_by_default_a_step_moves_what_the_radius_can_carry_across_the_box():
    raw = torch.rand(6, 2, 30, generator=generator())
    eps = torch.tensor([0.0, 0.3, 1.4, 3.6, 9.0, 50.0])
    mask = torch.arange(30) < 20  # 40 of 60 values may change
    grad = torch.randn(raw.shape, generator=generator(1))
    widths = {  # the second box is 2 wide in one channel and 4 in the other
        InputSpace(): [0, 1, 1, 4, 9, 16],
        InputSpace(low=(-1.0, -3.0), high=(1.0, 1.0)): [0, 1, 1, 1, 3, 16],
    }
    for space, expected in widths.items():
        region = space.region(raw, eps, mask)
        step = L1(1.0).steepest(grad, torch.zeros_like(raw), region)
        # At least one where anything may move, at most 16 of the 60.
        assert (step != 0).flatten(1).sum(1).tolist() == expected
        for row, gradient, k in zip(step, grad * mask, expected, strict=True):
            largest = gradient.flatten().abs().topk(k).indices
            assert set(row.flatten().nonzero().flatten().tolist()) == set(largest.tolist())
    # With room on all sides the ball itself is the box: a single value can use all of eps.
    wide = InputSpace(low=-100.0, high=100.0).region(raw, 3.0)
    assert affordable(wide).max() <= 1


@pytest.mark.parametrize("density", [0.0, -0.5, 1.1, float("nan")])
def test_refuses_a_density_that_is_no_share(density):
    with pytest.raises(InputError, match=r"Expected `density` to be in \(0, 1\] or None, got"):
        L1(1.0, density=density)
