import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from defend import L2, InputError, Linf

BALLS = [Linf(0.3), L2(0.7)]


def reference_norm(ball, row):
    values = [abs(float(v)) for v in row.flatten()]
    return max(values) if ball.name == "linf" else sum(v * v for v in values) ** 0.5


@pytest.mark.parametrize("ball", BALLS)
@pytest.mark.parametrize("shape", [(5, 7), (5, 2, 3, 3), (5, 2, 3, 3, 2)])
def test_norm_is_the_textbook_norm_of_each_record(ball, shape):
    delta = torch.randn(shape)
    expected = torch.tensor([reference_norm(ball, row) for row in delta])
    torch.testing.assert_close(ball.norm(delta), expected)


@pytest.mark.parametrize("ball", BALLS)
@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-5, 5, width=32), min_size=6, max_size=6))
def test_projection_is_the_nearest_point_of_the_ball(ball, values):
    delta = torch.tensor(values).view(1, 2, 3)
    projected = ball.project_(delta.clone())
    assert ball.norm(projected) <= ball.eps * (1 + 1e-6)
    # The obtuse-angle criterion of projections onto convex sets, against points of the ball.
    generator = torch.Generator().manual_seed(0)
    inside = ball.random_start(torch.empty(64, 2, 3), generator)
    angles = ((inside - projected) * (delta - projected)).flatten(1).sum(1)
    assert angles.max() <= 1e-4


@pytest.mark.parametrize("ball", BALLS)
def test_steepest_beats_every_other_unit_direction(ball):
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(1, 4, generator=generator)
    best = (grad * ball.steepest(grad)).sum()
    others = ball.with_eps(1.0).random_start(torch.empty(5000, 4), generator)
    others = others / ball.norm(others).view(-1, 1)
    assert (grad * others).sum(1).max() <= best + 1e-6
    assert (grad * others).sum(1).max() >= 0.9 * best  # the search is not vacuous


@pytest.mark.parametrize("ball", BALLS)
def test_no_gradient_means_no_move(ball):
    assert torch.equal(ball.steepest(torch.zeros(2, 3)), torch.zeros(2, 3))


def test_l2_ignores_non_finite_gradients():
    grad = torch.tensor([[float("nan"), 1.0], [float("inf"), 1.0], [3.0, 4.0]])
    expected = torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.6, 0.8]])
    torch.testing.assert_close(L2(1.0).steepest(grad), expected)


def radius_shares(starts, ball):
    """Share of starts within half the radius; uniform in the volume gives 2^-d."""
    return (ball.norm(starts) <= ball.eps / 2).double().mean().item()


@pytest.mark.parametrize("ball", BALLS)
def test_random_start_is_uniform_in_the_volume(ball):
    n, d = 40_000, 3
    generator = torch.Generator().manual_seed(0)
    starts = ball.random_start(torch.empty(n, d), generator)
    assert ball.norm(starts).max() <= ball.eps * (1 + 1e-6)
    expected = 2.0**-d
    tolerance = 4 * (expected * (1 - expected) / n) ** 0.5
    assert abs(radius_shares(starts, ball) - expected) < tolerance
    assert starts.mean(0).abs().max() < 4 * ball.eps / n**0.5

    # Planted wrong answer: a radius of eps · U, as some libraries draw it.
    crowded = starts / ball.norm(starts).view(-1, 1) * ball.eps * torch.rand(n, 1)
    assert abs(radius_shares(crowded, ball) - expected) > tolerance


@pytest.mark.parametrize("ball", BALLS)
def test_random_start_keeps_the_layout(ball):
    like = torch.empty(2, 3, 4, 4).to(memory_format=torch.channels_last)
    start = ball.random_start(like, torch.Generator().manual_seed(0))
    assert start.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("eps", [-0.1, float("inf"), float("nan")])
def test_refuses_a_bad_radius(eps):
    with pytest.raises(InputError, match="Expected `eps` to be a finite number ≥ 0, got"):
        Linf(eps)
