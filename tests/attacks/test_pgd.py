import pytest
import torch
import torch.nn.functional as F
from torch import nn

from defend import L2, PGD, InputError, InputSpace, Linf
from defend.threat import L1
from tests.attacks.cases import BALLS, batch, model_for, seeded
from tests.reference.pgd import reference_pgd


@pytest.mark.parametrize("ball", BALLS, ids=lambda b: b.name)
@pytest.mark.parametrize("normalized", [False, True])
def test_equals_the_slow_reference(ball, normalized):
    shape = (5, 2, 3, 3)
    moments = {"mean": (0.4, 0.2), "std": (0.3, 0.9)} if normalized else {}
    space = InputSpace(**moments)
    x, y = batch(shape, space, torch.float64)
    model = model_for(shape, torch.float64)
    attack = PGD(ball, steps=5, inputs=space)
    adv = attack(model, x, y, generator=seeded(3))
    raw = space.to_raw(x)
    start = ball.random_start(x, seeded(3), eps=ball.eps * ball.start_share)
    start = torch.minimum(torch.maximum(start, -raw), 1 - raw)
    expected = reference_pgd(
        model, x, y, norm=ball.name, eps=ball.eps, steps=5, start=start,
        step_size=2.5 * ball.eps / 5, density=getattr(ball, "density", None),
        **{k: torch.tensor(v, dtype=x.dtype).view(1, 2, 1, 1) for k, v in moments.items()},
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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "`steps` to be an integer ≥ 1, got 0"),
        ({"steps": 1.5}, "`steps` to be an integer ≥ 1, got 1.5"),
        ({"restarts": 0}, "`restarts` to be an integer ≥ 1"),
        ({"step_size": 0.0}, "`step_size` to be > 0 or None"),
        ({"step_size": float("inf")}, "`step_size` to be > 0 or None, got inf"),
        ({"step_size": float("nan")}, "`step_size` to be > 0 or None, got nan"),
        ({"inputs": None}, "`inputs` to be an InputSpace, got None"),
        ({"inputs": {"low": 0.0}}, "`inputs` to be an InputSpace, got {'low': 0.0}"),
        ({"loss": "hinge"}, "`loss` to be one of"),
        ({"restarts": 2, "random_start": False}, "would be the same run"),
        ({"start_radius": 0.0}, "`start_radius` to be > 0 or None, got 0.0"),
        ({"start_radius": float("inf")}, "`start_radius` to be > 0 or None, got inf"),
        ({"iterate": "first"}, "`iterate` to be 'last' or 'best', got 'first'"),
        ({"precision": "int8"}, "`precision` to be None or one of .*, got 'int8'"),
        ({"loss": "kl", "targeted": True}, "another loss than 'kl' with targeted=True"),
        ({"loss": "kl", "random_start": False}, "`random_start=True` with loss='kl'"),
    ],
)
def test_refuses_bad_settings(settings, message):
    with pytest.raises(InputError, match=message):
        PGD(Linf(0.1), **settings)


@pytest.mark.parametrize("ball", [8 / 255, None, "linf"])
def test_refuses_what_is_no_ball(ball):
    with pytest.raises(InputError, match=r"`ball` to be a ball such as Linf\(8 / 255\), got"):
        PGD(ball)


@pytest.mark.parametrize(
    ("eps", "space", "wide"),
    [(8, InputSpace(), 1), (4.1, InputSpace(), 1), (0.5, InputSpace(high=(0.1, 0.1)), 0.1)],
)
def test_refuses_a_radius_in_other_units(eps, space, wide):
    message = f"units of the input box, {wide:g} wide, got {eps:g}.*give 8 / 255, not 8"
    with pytest.raises(InputError, match=message):
        PGD(Linf(eps), inputs=space)


def test_a_radius_that_is_wide_for_its_norm_or_box_is_taken():
    assert PGD(Linf(8), inputs=InputSpace(high=255.0)).ball.eps == 8
    assert PGD(Linf(8), inputs=InputSpace(high=(1.0, 255.0))).ball.eps == 8
    assert PGD(Linf(8), inputs=InputSpace(low=float("-inf"), high=float("inf"))).ball.eps == 8
    assert PGD(Linf(4.0)).ball.eps == 4
    assert [PGD(ball(8.0)).ball.eps for ball in (L1, L2)] == [8, 8]


@pytest.mark.parametrize("loss", ["ce", "kl"])
@pytest.mark.parametrize("y", [None, [0, 1, 2], {"label": torch.zeros(3)}], ids=str)
def test_refuses_targets_that_are_no_tensor(loss, y):
    with pytest.raises(InputError, match=f"tensors, got Tensor and {type(y).__name__}. Give one"):
        PGD(Linf(0.1), loss=loss)(model_for((1, 2)), torch.rand(3, 2), y)
    with pytest.raises(InputError, match="tensors, got list and Tensor"):
        PGD(Linf(0.1))(model_for((1, 2)), [[0.1, 0.2]], torch.zeros(1).long())


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


@pytest.mark.cuda
def test_contract_on_cuda():
    x, y = batch((6, 2, 5, 5), InputSpace())
    model = model_for(x.shape).cuda()
    state = torch.cuda.get_rng_state()
    adv = PGD(Linf(0.1))(model, x.cuda(), y.cuda(), generator=seeded())
    assert adv.is_cuda
    assert (adv.cpu() - x).abs().max() <= 0.1 + 1e-6
    assert torch.equal(torch.cuda.get_rng_state(), state)
