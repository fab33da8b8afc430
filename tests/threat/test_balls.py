import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from defend import InputError
from defend.threat import L1, L2, InputSpace, Linf, Region
from tests.reference.projections import l1_box_by_bisection, l2_then_box, linf_and_box

BALLS = [Linf(0.3), L2(0.7), L1(1.1)]
SHAPES = [(5, 7), (5, 3, 4), (5, 2, 3, 3), (5, 2, 3, 3, 2)]
REFERENCES = {"linf": linf_and_box, "l2": l2_then_box, "l1": l1_box_by_bisection}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def without_box(like, eps):
    """A region in which only the ball counts."""
    eps = torch.as_tensor(eps, dtype=like.dtype)
    return Region(-eps.expand(like.shape), eps.expand(like.shape), eps)


def column(t, like):
    return t.view(-1, *(1,) * (like.ndim - 1))


def reference_norm(ball, row):
    values = [abs(float(v)) for v in row.flatten()]
    if ball.name == "linf":
        return max(values)
    return sum(values) if ball.name == "l1" else sum(v * v for v in values) ** 0.5


@pytest.mark.parametrize("ball", BALLS)
@pytest.mark.parametrize("shape", SHAPES)
def test_norm_is_the_textbook_norm_of_each_record(ball, shape):
    delta = torch.randn(shape, generator=generator())
    expected = torch.tensor([reference_norm(ball, row) for row in delta])
    torch.testing.assert_close(ball.norm(delta), expected)


@pytest.mark.parametrize("ball", BALLS)
@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-5, 5, width=32), min_size=6, max_size=6),
    st.lists(st.floats(0, 1, width=32), min_size=6, max_size=6),
    st.floats(0, 4, width=32),
)
def test_projection_is_legal_idempotent_and_that_of_the_reference(ball, values, raw, eps):
    delta, raw = torch.tensor(values).view(1, 2, 3), torch.tensor(raw).view(1, 2, 3)
    region = InputSpace().region(raw, eps)
    projected = ball.project_(delta.clone(), region)
    assert ball.norm(projected) <= eps * (1 + 1e-6)
    assert (region.lower <= projected).all()
    assert (projected <= region.upper).all()
    sides = (region.lower.double().flatten().tolist(), region.upper.double().flatten().tolist())
    expected = REFERENCES[ball.name](delta.double().flatten().tolist(), *sides, eps)
    torch.testing.assert_close(projected.flatten(), torch.tensor(expected), atol=2e-6, rtol=0)
    again = ball.project_(projected.clone(), region)
    torch.testing.assert_close(again, projected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("ball", BALLS)
@pytest.mark.parametrize("boxed", [False, True])
def test_no_legal_point_is_nearer_than_the_projection(ball, boxed):
    if boxed and ball.name == "l2":
        return  # legal, and not the nearest: see below
    n = 500
    delta = 2 * torch.randn(n, 4, generator=generator())
    raw = torch.rand(n, 4, generator=generator(1))
    region = InputSpace().region(raw, ball.eps) if boxed else without_box(delta, ball.eps)
    # Legal without any projection: points of the ball, cut at the box.
    inside = ball.random_start(delta, generator(2)).clamp(region.lower, region.upper)

    def obtuse(projected):
        """Kolmogorov's criterion of projections onto convex sets, over all records."""
        return ((inside - projected) * (delta - projected)).sum(1).max() <= 1e-5

    assert obtuse(ball.project_(delta.clone(), region))
    # Planted wrong answers: pulled back along the ray, and farther than needed.
    scale = (ball.eps / ball.norm(delta)).clamp_max(1).view(-1, 1)
    rescaled = (delta * scale).clamp(region.lower, region.upper)
    assert ball.name == "l2" or not obtuse(rescaled)
    assert not obtuse(0.5 * ball.project_(delta.clone(), region))


def test_l2_with_a_box_is_legal_but_not_always_the_nearest_point():
    region = Region(torch.tensor([[-1.0, -1.0]]), torch.tensor([[0.1, 1.0]]), torch.tensor(1.0))
    delta = torch.tensor([[3.0, 1.0]])
    projected = L2(1.0).project_(delta.clone(), region)
    torch.testing.assert_close(projected, torch.tensor([[0.1, 0.1**0.5]]))
    nearer = torch.tensor([[0.1, 0.99**0.5]])
    assert (nearer - delta).norm() < (projected - delta).norm()


@pytest.mark.parametrize("ball", [Linf(0.3), L2(0.7), L1(1.1, density=0.01)])
def test_steepest_beats_every_other_unit_direction(ball):
    grad = torch.randn(1, 4, generator=generator())
    zero = torch.zeros(1, 4)
    best = (grad * ball.steepest(grad, zero, without_box(zero, ball.eps))).sum()
    others = ball.with_eps(1.0).random_start(torch.empty(20_000, 4), generator(1))
    others = others / ball.norm(others).view(-1, 1)
    assert (grad * others).sum(1).max() <= best + 1e-6
    assert (grad * others).sum(1).max() >= 0.9 * best  # the search is not vacuous


@pytest.mark.parametrize("ball", BALLS)
@pytest.mark.parametrize("bad", [0.0, math.nan])
def test_no_move_without_a_gradient(ball, bad):
    grad = torch.full((2, 3), bad)
    zero = torch.zeros(2, 3)
    assert torch.equal(ball.steepest(grad, zero, without_box(zero, ball.eps)), zero)


@pytest.mark.parametrize("ball", BALLS)
@pytest.mark.parametrize("bad", [math.inf, -math.inf])
def test_an_infinite_gradient_gives_a_finite_move(ball, bad):
    """L∞ follows its sign; the others have no length to divide by, and stay."""
    grad = torch.full((2, 3), bad)
    zero = torch.zeros(2, 3)
    move = ball.steepest(grad, zero, without_box(zero, ball.eps))
    assert torch.equal(move, grad.sign() if ball.name == "linf" else zero)


def test_l2_ignores_non_finite_gradients():
    grad = torch.tensor([[math.nan, 1.0], [math.inf, 1.0], [3.0, 4.0]])
    expected = torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.6, 0.8]])
    torch.testing.assert_close(L2(1.0).steepest(grad, grad, without_box(grad, 1.0)), expected)


@pytest.mark.parametrize("ball", BALLS)
@pytest.mark.parametrize("scale", [1e-36, 1e-24, 1e24, 1e36])
def test_direction_does_not_depend_on_the_size_of_the_gradient(ball, scale):
    grad = torch.randn(3, 40, generator=generator())
    zero = torch.zeros_like(grad)
    steepest = [ball.steepest(g, zero, without_box(zero, 1.0)) for g in (grad, grad * scale)]
    torch.testing.assert_close(*steepest)
    assert (ball.norm(steepest[1]) - 1).abs().max() < 1e-5


# E[(δ_1 / eps)²] and E[(δ_1 / eps)⁴] of the uniform distribution in d dimensions.
MOMENTS = {
    "linf": lambda d: (1 / 3, 1 / 5),
    "l2": lambda d: (1 / (d + 2), 3 / ((d + 2) * (d + 4))),
    "l1": lambda d: (2 / ((d + 1) * (d + 2)), 24 / ((d + 1) * (d + 2) * (d + 3) * (d + 4))),
}


def is_uniform(starts, ball, d):
    """Whether radii, directions and signs agree with a uniform draw, to 4.5 standard errors."""
    unit = starts.double() / ball.eps
    second, fourth = MOMENTS[ball.name](d)
    samples = [  # a mean of each record, and what it is expected to be
        ((ball.norm(unit) <= 0.5).double(), 2.0**-d),
        (unit.square().mean(1), second),
        (unit.pow(4).mean(1), fourth),
        *(((column > 0).double(), 0.5) for column in unit.T),
    ]
    errors = [
        (sample.mean() - expected).abs() / (sample.std() / len(sample) ** 0.5 + 1e-12)
        for sample, expected in samples
    ]
    return bool(ball.norm(unit).max() <= 1 + 1e-6 and max(errors) < 4.5)


@pytest.mark.parametrize("ball", BALLS)
def test_random_start_is_uniform_in_the_volume(ball):
    n, d = 40_000, 3
    starts = ball.random_start(torch.empty(n, d), generator())
    assert is_uniform(starts, ball, d)

    # Planted wrong answers: a radius of eps · U, as some libraries draw it; one orthant only;
    # and the right radii in directions that belong to another norm.
    norm = ball.norm(starts).view(-1, 1)
    assert not is_uniform(starts / norm * ball.eps * torch.rand(n, 1), ball, d)
    assert not is_uniform(starts.abs(), ball, d)
    other = (L1 if ball.name == "l2" else L2)(1.0).random_start(starts, generator(1))
    assert not is_uniform(other / ball.norm(other).view(-1, 1) * norm, ball, d)


@pytest.mark.parametrize("ball", BALLS)
def test_random_start_is_uniform_in_what_is_free(ball):
    n, d = 40_000, 5
    free = torch.tensor([[True, False, True, False, True]])
    starts = ball.random_start(torch.empty(n, d), generator(), free=free)
    assert torch.equal(starts[:, [1, 3]], torch.zeros(n, 2))
    assert is_uniform(starts[:, [0, 2, 4]], ball, 3)
    if ball.name != "linf":
        # Planted wrong answer: drawn in all dimensions, and only then held.
        late = ball.random_start(torch.empty(n, d), generator())[:, [0, 2, 4]]
        assert not is_uniform(late, ball, 3)


@pytest.mark.parametrize("ball", BALLS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_record_has_its_own_radius(ball, shape, dtype):
    raw = torch.rand(shape, dtype=dtype, generator=generator())
    eps = torch.tensor([0.0, 0.1, 0.4, 1.0, 3.0], dtype=dtype)
    region = InputSpace().region(raw, eps)
    start = ball.random_start(raw, generator(), eps=region.eps)
    assert start.dtype == dtype
    assert (ball.norm(start) <= eps * (1 + 1e-6)).all()
    unit = ball.random_start(raw, generator(), eps=1.0)
    torch.testing.assert_close(start, unit * column(eps, raw))

    moved = start + torch.randn(shape, dtype=dtype, generator=generator(1))
    projected = ball.project_(moved.clone(), region)
    rows = [
        ball.project_(moved[i : i + 1].clone(), InputSpace().region(raw[i : i + 1], eps[i].item()))
        for i in range(len(raw))
    ]
    torch.testing.assert_close(projected, torch.cat(rows))
    assert torch.equal(projected[0], torch.zeros_like(projected[0]))


@pytest.mark.parametrize("ball", BALLS)
@pytest.mark.parametrize("ndim", [4, 5])
def test_memory_layout_and_values_survive(ball, ndim):
    layout = torch.channels_last if ndim == 4 else torch.channels_last_3d
    raw = torch.rand((2, 3) + (4,) * (ndim - 2), generator=generator())
    grad, far = (torch.randn(raw.shape, generator=generator(s)) for s in (1, 2))
    region = InputSpace().region(raw, ball.eps)
    other = InputSpace().region(raw.to(memory_format=layout), ball.eps)
    assert other.lower.is_contiguous(memory_format=layout)

    start = ball.random_start(raw.to(memory_format=layout), generator(), eps=other.eps)
    assert start.is_contiguous(memory_format=layout)
    zero = torch.zeros_like(raw)
    step = ball.steepest(grad.to(memory_format=layout), zero.to(memory_format=layout), other)
    assert step.is_contiguous(memory_format=layout)
    torch.testing.assert_close(step, ball.steepest(grad, zero, region))

    delta = far.clone().to(memory_format=layout)
    place = delta.data_ptr()
    assert ball.project_(delta, other) is delta
    assert delta.data_ptr() == place
    assert delta.is_contiguous(memory_format=layout)
    torch.testing.assert_close(delta, ball.project_(far.clone(), region))


@pytest.mark.parametrize("ball", BALLS)
def test_random_starts_repeat_with_the_generator_and_leave_the_global_one(ball):
    like = torch.empty(3, 4)
    state = torch.get_rng_state()
    first, same, other = (ball.random_start(like, generator(s)) for s in (0, 0, 1))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("ball", BALLS)
def test_random_start_is_drawn_where_the_generator_lives(ball):
    expected = ball.random_start(torch.empty(4, 3), generator())
    start = ball.random_start(torch.empty(4, 3, device="cuda"), generator())
    torch.testing.assert_close(start.cpu(), expected)


@pytest.mark.parametrize("ball", BALLS)
def test_empty_batches_and_no_radius_at_all(ball):
    nothing = torch.empty(0, 3)
    region = InputSpace().region(nothing, ball.eps)
    assert ball.random_start(nothing, generator(), eps=region.eps).shape == (0, 3)
    assert ball.steepest(nothing, nothing, region).shape == (0, 3)
    assert ball.project_(nothing.clone(), region).shape == (0, 3)

    still = ball.with_eps(0.0)
    raw = torch.rand(2, 3, generator=generator())
    region = InputSpace().region(raw, 0.0)
    assert torch.equal(still.random_start(raw, generator()), torch.zeros(2, 3))
    assert torch.equal(still.project_(torch.zeros(2, 3), region), torch.zeros(2, 3))
    assert torch.equal(still.project_(raw.clone(), region), torch.zeros(2, 3))


@pytest.mark.parametrize("ball", [Linf, L2, L1])
@pytest.mark.parametrize("eps", [-0.1, math.inf, math.nan])
def test_refuses_a_bad_radius(ball, eps):
    with pytest.raises(InputError, match="Expected `eps` to be a finite number ≥ 0, got"):
        ball(eps)
