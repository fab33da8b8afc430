import pytest
import torch
import torch.nn.functional as F
from torch import nn

from defend import L2, PGD, InputError, InputSpace, Linf
from tests.reference.pgd import reference_pgd

BALLS = [Linf(0.1), L2(0.5)]
SPACES = {"raw": InputSpace(), "normalized": InputSpace(mean=(0.5, 0.3), std=(0.25, 0.2))}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def model_for(shape, dtype=torch.float32):
    torch.manual_seed(1)
    width = torch.Size(shape[1:]).numel()
    return nn.Sequential(nn.Flatten(), nn.Linear(width, 16), nn.Tanh(), nn.Linear(16, 3)).to(dtype)


def batch(shape, space, dtype=torch.float32):
    generator = seeded(2)
    raw = torch.rand(shape, generator=generator)
    raw[0] = raw[0].round()  # a record in the corner of the box
    y = torch.randint(0, 3, shape[:1], generator=generator)
    return space.to_model(raw).to(dtype), y


@pytest.mark.parametrize("ball", BALLS, ids=lambda b: b.name)
@pytest.mark.parametrize("layout", ["2d", "4d", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
@pytest.mark.parametrize("restarts", [1, 3])
def test_contract(ball, layout, dtype, space, restarts):
    """Inside ball and box to float precision; same shape, dtype, device and layout."""
    shape = (6, 2) if layout == "2d" else (6, 2, 5, 5)
    x, y = batch(shape, space, dtype)
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    before = x.clone()
    attack = PGD(ball, steps=5, inputs=space, restarts=restarts)
    adv = attack(model_for(shape, dtype), x, y, generator=seeded())

    assert torch.equal(x, before)
    assert (adv.shape, adv.dtype, adv.device) == (x.shape, x.dtype, x.device)
    assert adv.stride() == x.stride()
    assert not adv.requires_grad
    raw, clean = space.to_raw(adv.double()), space.to_raw(x.double())
    # Rounding of x_adv itself: half a unit in the last place of the largest value, in raw units.
    largest, widest = adv.double().abs().max().item(), max(space.std or (1.0,))
    rounding = torch.finfo(dtype).eps * (largest * widest + 1)
    if ball.name == "l2":
        rounding *= x[0].numel() ** 0.5
    assert ball.norm(raw - clean).max() <= ball.eps + rounding
    assert raw.min() >= -rounding
    assert raw.max() <= 1 + rounding
    # Not vacuous: the attack goes to the edge of the ball.
    assert ball.norm(raw - clean).max() >= 0.6 * ball.eps


@pytest.mark.parametrize("ball", BALLS, ids=lambda b: b.name)
@pytest.mark.parametrize("normalized", [False, True])
def test_equals_the_slow_reference(ball, normalized):
    shape = (5, 1, 3, 3)
    moments = {"mean": (0.4,), "std": (0.3,)} if normalized else {}
    space = InputSpace(**moments)
    x, y = batch(shape, space, torch.float64)
    model = model_for(shape, torch.float64)
    attack = PGD(ball, steps=7, inputs=space)
    adv = attack(model, x, y, generator=seeded(3))
    raw = space.to_raw(x)
    start = ball.random_start(x, seeded(3))
    start = torch.minimum(torch.maximum(start, -raw), 1 - raw)
    expected = reference_pgd(
        model, x, y, norm=ball.name, eps=ball.eps, steps=7, start=start,
        step_size=2.5 * ball.eps / 7,
        mean=moments.get("mean", (0.0,))[0], std=moments.get("std", (1.0,))[0],
    )  # fmt: skip
    torch.testing.assert_close(adv, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("ball", BALLS, ids=lambda b: b.name)
def test_loss_beats_the_best_of_many_random_perturbations(ball):
    shape = (16, 2, 4, 4)
    x, y = batch(shape, InputSpace())
    model = model_for(shape)

    def losses(inputs):
        return F.cross_entropy(model(inputs), y, reduction="none")

    adv = PGD(ball, steps=10)(model, x, y, generator=seeded())
    noise = torch.stack(
        [losses((x + ball.random_start(x, seeded(i))).clamp(0, 1)) for i in range(100)]
    )
    assert (losses(adv) > noise.amax(0)).all()


@pytest.mark.parametrize("ball", BALLS, ids=lambda b: b.name)
@pytest.mark.parametrize("chunk_size", [1, 3, 100])
def test_the_result_does_not_depend_on_chunks(ball, chunk_size):
    x, y = batch((7, 2, 4, 4), InputSpace())
    model = model_for(x.shape)
    attack = PGD(ball, restarts=2)
    whole = attack(model, x, y, generator=seeded())
    chunked = attack(model, x, y, generator=seeded(), chunk_size=chunk_size)
    torch.testing.assert_close(chunked, whole, rtol=0, atol=1e-6)


def test_a_record_does_not_depend_on_the_others():
    x, y = batch((6, 2, 5, 5), InputSpace())
    model = nn.Sequential(nn.BatchNorm2d(2), model_for(x.shape)).train()
    attack = PGD(Linf(0.1), random_start=False)
    full = attack(model, x, y)
    changed = x.clone()
    changed[3] = 1 - changed[3]
    other = attack(model, changed, y)
    keep = [0, 1, 2, 4, 5]
    assert torch.equal(full[keep], other[keep])
    assert not torch.equal(full[3], other[3])


def test_more_restarts_never_help_the_model():
    x, y = batch((40, 2, 4, 4), InputSpace())
    model = model_for(x.shape)

    def right(restarts):
        adv = PGD(Linf(0.1), steps=2, restarts=restarts)(model, x, y, generator=seeded())
        return model(adv).argmax(1) == y

    # The same first run: whatever it fooled stays fooled.
    assert not (right(5) & ~right(1)).any()


def test_the_same_generator_gives_the_same_result_and_no_generator_does_not():
    x, y = batch((4, 2, 4, 4), InputSpace())
    model = model_for(x.shape)
    attack = PGD(Linf(0.1), steps=1, step_size=0.01)
    assert torch.equal(
        attack(model, x, y, generator=seeded(5)), attack(model, x, y, generator=seeded(5))
    )
    assert not torch.equal(attack(model, x, y), attack(model, x, y))


def test_no_random_start_begins_at_the_clean_input():
    x = torch.full((1, 2), 0.5)
    adv = PGD(Linf(0.2), steps=1, step_size=0.05, random_start=False)(
        lambda v: torch.cat([v.sum(1, keepdim=True), torch.zeros(1, 1)], 1), x, torch.tensor([0])
    )
    torch.testing.assert_close(adv, torch.full((1, 2), 0.45))


def test_default_step_is_the_two_255ths_of_madry():
    assert PGD(Linf(8 / 255), steps=10).effective_step_size == pytest.approx(2 / 255)


def test_with_eps_scales_the_step_along():
    attack = PGD(Linf(0.2), step_size=0.05).with_eps(0.1)
    assert (attack.ball.eps, attack.effective_step_size) == (0.1, pytest.approx(0.025))
    x, y = batch((3, 2), InputSpace())
    assert torch.equal(attack.with_eps(0.0)(model_for(x.shape), x, y), x)


def test_a_loss_of_ones_own():
    x, y = batch((5, 2, 4, 4), InputSpace())
    model = model_for(x.shape)

    def margin(logits, y):
        others = logits.scatter(1, y[:, None], float("-inf")).amax(1)
        return others - logits.gather(1, y[:, None]).squeeze(1)

    adv = PGD(L2(0.5), loss=margin)(model, x, y, generator=seeded())
    assert (margin(model(adv), y) > margin(model(x), y)).all()


def test_outputs_with_logits_are_understood():
    x, y = batch((3, 2), InputSpace())
    model = model_for(x.shape)
    expected = PGD(Linf(0.1))(model, x, y, generator=seeded())
    got = PGD(Linf(0.1))(lambda v: {"logits": model(v)}, x, y, generator=seeded())
    assert torch.equal(got, expected)
    with pytest.raises(TypeError, match="return a tensor of logits"):
        PGD(Linf(0.1))(lambda v: (model(v),), x, y)


def test_an_empty_batch_stays_empty():
    x = torch.rand(0, 2)
    assert PGD(Linf(0.1))(model_for((1, 2)), x, torch.zeros(0).long()).shape == (0, 2)


def test_keeps_delta_in_float32_under_autocast():
    """bfloat16 cannot hold x + 1e-4 steps; the result must still use the whole ball."""
    x, y = batch((4, 2, 4, 4), InputSpace())
    model = model_for(x.shape)
    with torch.autocast("cpu", torch.bfloat16):
        adv = PGD(Linf(1e-3), steps=20)(model, x, y, generator=seeded())
    assert adv.dtype == torch.float32
    inner = (x > 0.01) & (x < 0.99)
    assert ((adv - x).abs()[inner] > 0.9e-3).float().mean() > 0.9


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "`steps` to be an integer ≥ 1, got 0"),
        ({"steps": 1.5}, "`steps` to be an integer ≥ 1, got 1.5"),
        ({"restarts": 0}, "`restarts` to be an integer ≥ 1"),
        ({"step_size": 0.0}, "`step_size` to be > 0 or None"),
        ({"loss": "hinge"}, "`loss` to be one of"),
        ({"restarts": 2, "random_start": False}, "would be the same run"),
    ],
)
def test_refuses_bad_settings(settings, message):
    with pytest.raises(InputError, match=message):
        PGD(Linf(0.1), **settings)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.ones(2, 2, dtype=torch.uint8), torch.zeros(2).long(), "floating point inputs"),
        (torch.rand(3), torch.zeros(3).long(), "one record a row"),
        (torch.rand(3, 2), torch.zeros(2).long(), "3 inputs, 2 targets"),
        (torch.rand(3, 2) + 5, torch.zeros(3).long(), "inside the box"),
    ],
)
def test_refuses_bad_batches(x, y, message):
    with pytest.raises(InputError, match=message):
        PGD(Linf(0.1))(model_for((1, 2)), x, y)


def test_refuses_a_reduced_loss():
    with pytest.raises(InputError, match="reduction='none'"):
        PGD(Linf(0.1), loss=F.cross_entropy)(
            model_for((1, 2)), torch.rand(3, 2), torch.zeros(3).long()
        )


def test_is_as_strong_as_torchattacks():
    """Robust accuracy within one point of torchattacks' PGD on a trained model."""
    import torchattacks
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    y = torch.tensor(digits.target)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    model.eval()

    def accuracy(adv):
        return (model(adv).argmax(1) == y).float().mean().item()

    for eps in (0.05, 0.1):
        ours = PGD(Linf(eps), steps=20)(model, x, y, generator=seeded())
        theirs = torchattacks.PGD(model, eps=eps, alpha=2.5 * eps / 20, steps=20)(x, y)
        assert abs(accuracy(ours) - accuracy(theirs)) <= 0.01
        assert accuracy(ours) < accuracy(x) - 0.1


@pytest.mark.cuda
def test_contract_on_cuda():
    x, y = batch((6, 2, 5, 5), InputSpace())
    model = model_for(x.shape).cuda()
    state = torch.cuda.get_rng_state()
    adv = PGD(Linf(0.1))(model, x.cuda(), y.cuda(), generator=seeded())
    assert adv.is_cuda
    assert (adv.cpu() - x).abs().max() <= 0.1 + 1e-6
    assert torch.equal(torch.cuda.get_rng_state(), state)
