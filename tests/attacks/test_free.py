import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from defend import L2, PGD, InputError, InputSpace, Linf
from defend.attacks.free import Free
from defend.attacks.result import GradientCounts
from defend.threat.l1 import L1

BOXLESS = InputSpace(low=-math.inf, high=math.inf)
NORMALIZED = InputSpace(mean=(0.5, 0.3), std=(0.25, 0.2))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def net(width=32):
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(width, 16), nn.Tanh(), nn.Linear(16, 3)).double()


def perturbed(perturbation, x, eps=None):
    return perturbation.perturb(None, x, None, eps=eps).x_adv


def batches(space=BOXLESS, sizes=(6, 6, 4, 6)):
    generator = seeded(2)
    found = []
    for size in sizes:
        raw = torch.rand(size, 2, 4, 4, generator=generator, dtype=torch.float64)
        raw[0] = raw[0].round()  # in the corner of the box
        found.append((space.to_model(raw), torch.arange(size) % 3))
    return found


def by_hand(model, data, *, norm, eps, step, replays, space, lr=0.1):
    """The paper's algorithm, with a dict of one δ a position; weights move by plain SGD."""
    deltas, seen = {}, []
    low, high = (0, 1) if space.low == 0 else (-math.inf, math.inf)
    for x, y in data:
        clean = space.to_raw(x)
        for _ in range(replays):
            for i in range(len(x)):
                delta = deltas.setdefault(i, torch.zeros_like(clean[i]))
                deltas[i] = (clean[i] + delta).clamp(low, high) - clean[i]
            delta = torch.stack([deltas[i] for i in range(len(x))]).requires_grad_()
            adv = space.to_model(clean + delta)
            seen.append(adv.detach())
            loss = F.cross_entropy(model(adv), y)
            weights = list(model.parameters())
            *slopes, grad = torch.autograd.grad(loss, [*weights, delta])
            with torch.no_grad():
                for weight, slope in zip(weights, slopes, strict=True):
                    weight -= lr * slope
            for i in range(len(x)):
                if norm == "linf":
                    moved = (deltas[i] + step * grad[i].sign()).clamp(-eps, eps)
                else:
                    moved = deltas[i] + step * grad[i] / grad[i].norm()
                    moved = moved * min(1.0, eps / moved.norm())
                deltas[i] = (clean[i] + moved).clamp(low, high) - clean[i]
    return seen


def trained(model, data, free, *, scale=1.0, lr=0.1):
    """An ordinary loop around `perturb` and `absorb`."""
    optimizer = torch.optim.SGD(model.parameters(), lr)
    perturbation, seen = free.begin(), []
    for x, y in data:
        for _ in range(free.replays):
            adv = perturbed(perturbation, x)
            seen.append(adv.detach().clone())
            optimizer.zero_grad()
            (F.cross_entropy(model(adv), y) * scale).backward()
            for p in model.parameters():
                p.grad /= scale
            optimizer.step()
            perturbation.absorb()
    return seen


@pytest.mark.parametrize("space", [BOXLESS, InputSpace(), NORMALIZED], ids=["boxless", "box", "n"])
@pytest.mark.parametrize("ball", [Linf(0.1), L2(0.5)], ids=lambda b: b.name)
@pytest.mark.parametrize("step", [None, 0.04])
def test_equals_the_slow_reference(space, ball, step):
    data, model = batches(space), net()
    reference = copy.deepcopy(model)
    free = Free(ball, replays=3, step_size=step, inputs=space)
    seen = trained(model, data, free)
    expected = by_hand(
        reference, data, norm=ball.name, eps=ball.eps, step=step or ball.eps, replays=3, space=space
    )
    for found, wanted in zip(seen, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
    for found, wanted in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
    assert torch.equal(seen[0], data[0][0])  # zero at first
    assert not torch.equal(seen[3], data[1][0])  # kept from batch to batch


def test_the_scale_of_the_loss_does_not_matter():
    plain = trained(net(), batches(), Free(L2(0.5), replays=2))
    scaled = trained(net(), batches(), Free(L2(0.5), replays=2), scale=2.0**16)
    torch.testing.assert_close(scaled, plain, rtol=0, atol=1e-10)


@pytest.mark.parametrize("ball", [Linf(0.1), L2(0.5), L1(2.0)], ids=lambda b: b.name)
@pytest.mark.parametrize("space", [InputSpace(), NORMALIZED], ids=["raw", "normalized"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_contract(ball, space, dtype, layout):
    """In ball and box; a leaf of the same shape, dtype and layout; the batch untouched."""
    perturbation, model = Free(ball, inputs=space).begin(), net().to(dtype)
    for i, (x, y) in enumerate(batches(space)):
        x = x.to(dtype).contiguous(memory_format=layout if i else torch.contiguous_format)
        before = x.clone()
        for _ in range(4):
            adv = perturbed(perturbation, x)
            assert perturbation.pending
            assert adv.is_leaf
            assert adv.requires_grad
            assert (adv.shape, adv.dtype, adv.stride()) == (x.shape, x.dtype, x.stride())
            F.cross_entropy(model(adv), y).backward()
            perturbation.absorb()
            assert not perturbation.pending
        assert torch.equal(x, before)
        raw, clean = (space.to_raw(t.detach().double()) for t in (adv, x))
        largest, widest = adv.detach().double().abs().max().item(), max(space.std or (1.0,))
        # The float32 of δ itself; then the dtype's, one unit a coordinate, in each norm.
        rounding = (torch.finfo(dtype).eps + 1e-6) * (largest * widest + 1)
        count = {"linf": 1, "l2": x[0].numel() ** 0.5, "l1": x[0].numel()}[ball.name]
        assert (ball.norm(raw - clean) <= ball.eps + rounding * count).all()
        assert raw.min() >= -rounding
        assert raw.max() <= 1 + rounding
        assert ball.norm(raw - clean).max() >= 0.5 * ball.eps  # not vacuous


def absorbed(perturbation, x, weights):
    """One round with the loss Σ w·x."""
    adv = perturbed(perturbation, x)
    (adv * weights).sum().backward()
    perturbation.absorb()
    return adv.detach()


def test_positions_are_kept_when_batches_shrink_and_grow():
    perturbation = Free(Linf(0.1), inputs=BOXLESS).begin()
    x, w = torch.zeros(3, 2), torch.tensor([[1.0, -1.0]])
    absorbed(perturbation, x, w)
    absorbed(perturbation, x[:1], -w)
    assert perturbation.delta.shape == (3, 2)
    adv = perturbed(perturbation, torch.zeros(5, 2))
    expected = torch.tensor([[0.0, 0.0], [0.1, -0.1], [0.1, -0.1], [0.0, 0.0], [0.0, 0.0]])
    torch.testing.assert_close(adv.detach(), expected)


def test_another_shape_starts_anew_and_another_dtype_goes_on():
    perturbation = Free(Linf(0.1), inputs=BOXLESS).begin()
    absorbed(perturbation, torch.zeros(3, 2), 1.0)
    assert (perturbed(perturbation, torch.zeros(3, 2, dtype=torch.float64)) > 0.09).all()
    assert perturbation.delta.dtype == torch.float64
    assert (perturbed(perturbation, torch.zeros(3, 2, dtype=torch.bfloat16)) > 0.09).all()
    assert perturbation.delta.dtype == torch.float32
    assert (perturbed(perturbation, torch.zeros(3, 4)) == 0).all()


def test_the_box_is_that_of_the_batch_at_hand():
    perturbation = Free(Linf(0.1)).begin()
    absorbed(perturbation, torch.full((1, 2), 0.5), torch.tensor([[1.0, -1.0]]))
    adv = perturbed(perturbation, torch.tensor([[0.95, 0.05]]))
    torch.testing.assert_close(adv.detach(), torch.tensor([[1.0, 0.0]]))


def test_eps_may_grow_and_shrink_and_the_step_with_it():
    perturbation = Free(Linf(0.1), step_size=0.04, inputs=BOXLESS).begin()
    x = torch.zeros(1, 2)
    for eps, largest in [(0.05, 0.02), (0.05, 0.04), (0.1, 0.08), (0.05, 0.05)]:
        adv = perturbed(perturbation, x, eps=eps)
        adv.sum().backward()
        perturbation.absorb()
        assert perturbation.delta.max().item() == pytest.approx(largest)
    assert perturbed(perturbation, x, eps=0.01).max().item() == pytest.approx(0.01)


def test_immutable_columns_stay_and_take_no_part_of_the_step():
    space = InputSpace(immutable=(1,))
    perturbation = Free(L2(0.3), step_size=0.1, inputs=space).begin()
    x = torch.tensor([[0.5, 7.0, 0.5]])
    absorbed(perturbation, x, torch.tensor([[0.0, 100.0, 1.0]]))
    adv = perturbed(perturbation, x).detach()
    torch.testing.assert_close(adv, torch.tensor([[0.5, 7.0, 0.6]]))
    x[0, 1] = float("nan")
    adv = perturbed(perturbation, x).detach()
    torch.testing.assert_close(adv, torch.tensor([[0.5, float("nan"), 0.6]]), equal_nan=True)


def test_zero_and_nonfinite_gradients_move_nothing_and_are_counted():
    perturbation = Free(Linf(0.1), inputs=BOXLESS).begin()
    assert perturbation.after_backward().to_ints() == (0, 0, 0)
    weights = torch.tensor([[1.0, 1.0], [0.0, 0.0], [float("nan"), 1.0], [float("inf"), 0.0]])
    counts = GradientCounts()
    for _ in range(2):
        (perturbed(perturbation, torch.zeros(4, 2)) * weights).sum().backward()
        counts += perturbation.after_backward()
    assert torch.equal(perturbation.delta[1], torch.zeros(2))
    assert perturbation.delta.isfinite().all()
    assert counts.to_ints() == (8, 2, 4)
    assert perturbation.after_backward().to_ints() == (0, 0, 0)


def test_a_training_that_is_resumed_goes_on_alike():
    data, free = batches(InputSpace()), Free(Linf(0.1))
    whole, first = free.begin(), free.begin()
    weights = torch.randn(1, 2, 4, 4, dtype=torch.float64, generator=seeded())
    for perturbation in (whole, first):
        absorbed(perturbation, data[0][0], weights)
    state = first.state_dict()
    absorbed(first, data[0][0], -weights)  # a state is a copy
    second = free.begin()
    second.load_state_dict(state)
    absorbed(second, data[1][0], weights)
    assert not torch.equal(second.delta, state["delta"])  # so is what was loaded
    absorbed(whole, data[1][0], weights)
    assert torch.equal(second.delta, whole.delta)
    fresh = free.begin()
    fresh.load_state_dict(free.begin().state_dict())
    assert fresh.delta is None


@torch.inference_mode()
def test_inputs_made_in_inference_mode_can_be_trained_on():
    x = torch.rand(2, 3)
    with torch.inference_mode(False):
        perturbation = Free(Linf(0.1)).begin()
        assert not absorbed(perturbation, x, 1.0).is_inference()
        assert not perturbation.delta.is_inference()


def test_training_becomes_more_robust_than_plain_training():
    """The same number of backwards; the accuracy under PGD is what it buys."""
    generator = seeded(5)
    x = torch.rand(512, 2, 4, 4, generator=generator, dtype=torch.float64)
    weights = torch.randn(32, 3, generator=generator, dtype=torch.float64)
    y = ((x - 0.5).flatten(1) @ weights).argmax(1)
    data = list(zip(x.split(64), y.split(64), strict=True))

    def robust_after(free, epochs):
        model = net()
        for _ in range(epochs):
            trained(model, data, free, lr=0.5)
        adv = PGD(Linf(0.05))(model, x, y, generator=seeded())
        return (model(adv).argmax(1) == y).double().mean()

    plain = robust_after(Free(Linf(1e-9), replays=1), 24)
    free = robust_after(Free(Linf(0.05), replays=4), 6)
    assert free > plain + 0.05


def test_a_step_that_does_not_use_its_inputs_is_refused():
    perturbation = Free(Linf(0.1)).begin()
    x = torch.rand(2, 3)
    perturbed(perturbation, x)
    (x.sum() * torch.ones((), requires_grad=True)).backward()
    with pytest.raises(InputError, match="Expected the training step's backward to reach its inp"):
        perturbation.absorb()


def test_absorb_needs_perturb():
    perturbation = Free(Linf(0.1)).begin()
    with pytest.raises(InputError, match="Expected `perturb` before every `absorb`"):
        perturbation.absorb()
    absorbed(perturbation, torch.rand(2, 3), 1.0)
    with pytest.raises(InputError, match="Expected `perturb` before every `absorb`"):
        perturbation.absorb()


def test_inputs_outside_the_box_or_not_floating_point_are_refused():
    perturbation = Free(Linf(0.1)).begin()
    with pytest.raises(InputError, match="Expected inputs inside the box"):
        perturbed(perturbation, torch.full((2, 3), 2.0))
    for x in (torch.zeros(2, 3, dtype=torch.uint8), torch.zeros(3)):
        with pytest.raises(InputError, match="Expected floating point inputs of shape"):
            perturbed(perturbation, x)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"replays": 0}, "Expected `replays` to be an integer ≥ 1"),
        ({"replays": 2.0}, "Expected `replays` to be an integer ≥ 1"),
        ({"replays": True}, "Expected `replays` to be an integer ≥ 1"),
        ({"step_size": 0.0}, "Expected `step_size` to be > 0 or None"),
        ({"step_size": float("inf")}, "Expected `step_size` to be > 0 or None"),
        ({"ball": 0.1}, "Expected `ball` to be a ball"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        Free(**{"ball": Linf(0.1), **settings})


def test_free_is_no_attack_but_its_step_is():
    free = Free(Linf(0.1), step_size=0.07, inputs=NORMALIZED)
    assert not callable(free)
    step = free.single_step()
    assert step == PGD(Linf(0.1), steps=1, step_size=0.07, random_start=False, inputs=NORMALIZED)
    assert Free(L2(0.5)).single_step().step_size == 0.5
