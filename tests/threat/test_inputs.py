import math

import pytest
import torch

from defend import InputError, InputSpace

NORMALIZED = InputSpace(mean=(0.5, 0.4), std=(0.2, 0.1))
COLUMNS = InputSpace(low=(0.0, -1.0, 0.0), high=(1.0, 1.0, 100.0))


def test_model_and_raw_units_are_inverse():
    raw = torch.rand(3, 2, 4, 4)
    x = NORMALIZED.to_model(raw)
    torch.testing.assert_close(x[:, 1], (raw[:, 1] - 0.4) / 0.1)
    torch.testing.assert_close(NORMALIZED.to_raw(x), raw)


def test_without_moments_units_are_the_same():
    x = torch.rand(2, 3)
    assert InputSpace().to_model(x) is x
    assert InputSpace().to_raw(x) is x


@pytest.mark.parametrize("name", ["low", "mean", "std", "immutable"])
def test_lists_are_taken_as_tuples(name):
    settings = {"low": [0, 0.5], "mean": [0.5, 0.5], "std": [0.2, 0.3], "immutable": [1]}
    tuples = {key: tuple(value) for key, value in settings.items()}
    assert hash(InputSpace(**settings)) == hash(InputSpace(**tuples))
    assert isinstance(getattr(InputSpace(**settings), name), tuple)


def test_one_mean_and_std_are_those_of_one_channel():
    space = InputSpace(mean=0.5, std=2)
    assert space == InputSpace(mean=(0.5,), std=(2.0,))
    torch.testing.assert_close(space.to_model(torch.ones(2, 1, 3)), torch.full((2, 1, 3), 0.25))


def test_data_outside_the_box_is_an_error_that_says_so():
    x = torch.tensor([[0.0, 2.5]])
    with pytest.raises(InputError, match=r"inside the box \[0.0, 1.0\], got values from 0 to 2.5"):
        InputSpace().check(x, x.dtype)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("space", [InputSpace(), InputSpace(low=-math.inf, high=math.inf)])
def test_values_that_are_not_finite_are_outside_every_box(space, value):
    with pytest.raises(InputError, match="inside the box"):
        space.check(torch.tensor([[0.5, value]]), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rounding_by_normalization_is_forgiven(dtype):
    corners = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 2, 1, 1)
    x = NORMALIZED.to_model(corners.to(dtype))
    NORMALIZED.check(NORMALIZED.to_raw(x.float()), dtype)


@pytest.mark.parametrize(
    ("dtype", "share"),
    [(torch.float16, 4e-3), (torch.bfloat16, 3e-2), (torch.float32, 1e-5), (torch.float64, 1e-5)],
)
def test_no_more_than_rounding_is_forgiven(dtype, share):
    """A tenth more is data in other units; one unit in the last place of 1 is far less."""
    assert torch.finfo(dtype).eps < 10 * share
    for value in (-0.9 * share, 1 + 0.9 * share):
        InputSpace().check(torch.tensor([[0.5, value]], dtype=torch.float64), dtype)
    for value in (-1.1 * share, 1 + 1.1 * share):
        with pytest.raises(InputError, match="inside the box"):
            InputSpace().check(torch.tensor([[0.5, value]], dtype=torch.float64), dtype)


def test_rounding_is_relative_to_the_numbers_of_the_box():
    space = InputSpace(low=1000.0, high=1001.0)
    space.check(torch.tensor([[1001.005]]), torch.float32)
    with pytest.raises(InputError, match="inside the box"):
        space.check(torch.tensor([[1001.05]]), torch.float32)


def test_each_channel_has_its_own_box():
    COLUMNS.check(torch.tensor([[0.0, -1.0, 100.0], [1.0, 1.0, 0.0]]), torch.float32)
    message = r"inside the box \[0.0, 1.0\] in channel 0, got values from -0.5 to 0.5"
    with pytest.raises(InputError, match=message):
        COLUMNS.check(torch.tensor([[0.5, -0.5, 50.0], [-0.5, 0.5, 50.0]]), torch.float32)
    images = torch.rand(2, 3, 4, 4)
    images[1, 2, 3, 3] = 101
    with pytest.raises(InputError, match=r"\[0.0, 100.0\] in channel 2, got values from .* to 101"):
        COLUMNS.check(images, torch.float32)


def test_a_limit_on_one_side_only():
    space = InputSpace(low=0.0, high=math.inf)
    space.check(torch.tensor([[0.0, 1e30]]), torch.float32)
    with pytest.raises(InputError, match=r"inside the box \[0.0, inf\], got values from -1 to 1"):
        space.check(torch.tensor([[-1.0, 1.0]]), torch.float32)


def test_immutable_channels_may_hold_anything():
    raw = torch.tensor([[0.5, 7.0, math.nan]])
    InputSpace(immutable=(1, 2)).check(raw, torch.float32)
    with pytest.raises(InputError, match="in channel 1, got values from 7 to 7"):
        InputSpace(immutable=(2,)).check(raw, torch.float32)
    with pytest.raises(InputError, match="in channel 0"):
        InputSpace(immutable=(1, 2)).check(raw + 1, torch.float32)


def test_bounds_have_no_limit_in_immutable_channels():
    low, high = InputSpace(low=-1.0, immutable=(1,)).bounds(torch.rand(4, 3, 2, 2))
    assert low.shape == high.shape == (1, 3, 1, 1)
    assert low.flatten().tolist() == [-1.0, -math.inf, -1.0]
    assert high.flatten().tolist() == [1.0, math.inf, 1.0]
    low, high = COLUMNS.bounds(torch.rand(4, 3))
    assert (low.tolist(), high.tolist()) == ([[0.0, -1.0, 0.0]], [[1.0, 1.0, 100.0]])


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 2), (4, 3, 2, 2), (4, 3, 2, 2, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_region_is_box_and_ball_of_each_value(shape, dtype):
    unit = torch.rand(shape, dtype=dtype, generator=torch.Generator().manual_seed(0))
    low, high = COLUMNS.bounds(unit)
    raw = low + unit * (high - low)
    eps = torch.tensor([0.0, 0.1, 0.4, 2.0], dtype=dtype)
    region = COLUMNS.region(raw, eps)
    assert region.lower.dtype == region.upper.dtype == region.eps.dtype == dtype
    assert region.eps.shape == (4,) + (1,) * (len(shape) - 1)
    for i in range(4):
        for c, (bottom, top) in enumerate([(0, 1), (-1, 1), (0, 100)]):
            for value, lower, upper in zip(
                *(t[i, c].flatten().tolist() for t in (raw, region.lower, region.upper)),
                strict=True,
            ):
                assert lower == pytest.approx(max(bottom - value, -eps[i].item()), abs=1e-5)
                assert upper == pytest.approx(min(top - value, eps[i].item()), abs=1e-5)
    assert (region.lower <= 0).all()
    assert (region.upper >= 0).all()


def test_a_value_a_hair_outside_may_stay_or_go_inwards():
    region = InputSpace().region(torch.tensor([[-1e-6, 1 + 1e-6]]), 0.1)
    assert torch.equal(region.lower, torch.tensor([[0.0, -0.1]]))
    assert torch.equal(region.upper, torch.tensor([[0.1, 0.0]]))


def test_region_of_one_radius():
    raw = torch.rand(2, 3)
    for eps in (0.25, torch.tensor(0.25), torch.tensor(0.25, dtype=torch.float64)):
        region = InputSpace().region(raw, eps)
        assert region.eps.ndim == 0
        assert region.eps.dtype == torch.float32
        assert region.free is None


MASKS = {
    "pixels": torch.tensor([[1, 0], [0, 1]]),
    "channel": torch.tensor([True, False, True]).view(3, 1, 1),
    "records": torch.tensor([0.0, 1.0]).view(2, 1, 1, 1),
    "values": torch.arange(24).view(2, 3, 2, 2) % 3 > 0,
    "all": torch.tensor(True),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("immutable", [(), (1,)])
def test_nothing_moves_where_the_mask_forbids_it(mask, immutable):
    raw = 0.5 + 0.1 * torch.rand(2, 3, 2, 2)
    region = InputSpace(immutable=immutable).region(raw, 0.1, mask)
    expected = mask.bool().expand(raw.shape).clone()
    expected[:, list(immutable)] = False
    assert torch.equal(region.free.expand(raw.shape), expected)
    assert torch.equal(region.lower, torch.where(expected, -0.1, 0.0))
    assert torch.equal(region.upper, torch.where(expected, 0.1, 0.0))
    for rows in (slice(1, 2), torch.tensor([1])):
        cut = region.rows(rows)
        assert torch.equal(cut.free.expand(1, 3, 2, 2), expected[1:])
        assert torch.equal(cut.hold(torch.ones(1, 3, 2, 2)), expected[1:].float())


def test_immutable_nan_leaves_the_region_finite():
    region = InputSpace(immutable=(1,)).region(torch.tensor([[0.5, math.nan]]), 0.1)
    assert torch.equal(region.lower, torch.tensor([[-0.1, 0.0]]))
    assert torch.equal(region.upper, torch.tensor([[0.1, 0.0]]))


@pytest.mark.parametrize("shape", [(3,), (3, 1), (2, 2), (2, 3, 1), (5, 2, 3)])
def test_refuses_a_mask_that_does_not_broadcast(shape):
    message = (
        r"`mask` to broadcast to inputs of shape \(2, 4\), got shape .*needs the shape \(2, 1\)"
    )
    with pytest.raises(InputError, match=message):
        InputSpace().region(torch.rand(2, 4), 0.1, torch.ones(shape))


@pytest.mark.parametrize("eps", [-0.1, math.nan, math.inf, torch.tensor([0.1, -0.1])])
def test_refuses_a_radius_that_is_none(eps):
    with pytest.raises(InputError, match="Expected `eps` to be finite and ≥ 0, got"):
        InputSpace().region(torch.rand(2, 3), eps)


@pytest.mark.parametrize("shape", [(3,), (1, 3), (2, 3), (1,)])
def test_refuses_radii_that_are_not_one_a_record(shape):
    with pytest.raises(InputError, match=r"one number for each of the 2 records, got shape"):
        InputSpace().region(torch.rand(2, 3), torch.ones(shape))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"low": 1.0, "high": 0.0}, "Expected `low` < `high`"),
        ({"low": (0.0, 1.0), "high": (1.0, 1.0)}, "Expected `low` < `high`"),
        ({"low": (0.0, 2.0)}, "Expected `low` < `high`"),
        ({"low": math.nan}, "Expected `low` < `high`"),
        ({"low": (0.0, 0.0), "high": (1.0, 1.0, 1.0)}, "`low` and `high` of the same length"),
        ({"low": (0.0, 0.0), **dict.fromkeys(("mean", "std"), (0.5,) * 3)}, "`low` and `mean` of"),
        ({"high": (1.0, 1.0), **dict.fromkeys(("mean", "std"), (0.5,) * 3)}, "`high` and `mean`"),
        ({"mean": (0.5,)}, "got only mean"),
        ({"std": (0.5,)}, "got only std"),
        ({"mean": (0.5,), "std": (0.1, 0.2)}, "same length, got 1 and 2"),
        ({"mean": (), "std": ()}, "Expected `mean` to be one number for each channel, got none"),
        ({"low": ()}, "Expected `low` to be one number for each channel, got none"),
        ({"mean": (0.5,), "std": (0.0,)}, "every `std` to be > 0"),
        ({"mean": (0.5,), "std": (math.inf,)}, "every `std` to be > 0 and finite, got"),
        ({"mean": (0.5,), "std": (math.nan,)}, "every `std` to be > 0 and finite, got"),
        ({"mean": (math.nan,), "std": (1.0,)}, "every `mean` to be finite, got"),
        ({"mean": (0.5, -math.inf), "std": (1.0, 1.0)}, "every `mean` to be finite, got"),
        ({"immutable": (0, -1)}, "every `immutable` channel to be ≥ 0, got"),
        ({"immutable": 1}, r"`immutable` to be indices of channels such as \(0, 3\), got 1"),
        ({"immutable": [True, False]}, r"indices of channels .*, got \[True, False\]"),
        ({"immutable": (1.7,)}, r"indices of channels .*, got \(1.7,\)"),
        ({"immutable": "01"}, "indices of channels .*, got '01'"),
    ],
)
def test_refuses_settings_that_make_no_box(settings, message):
    with pytest.raises(InputError, match=message):
        InputSpace(**settings)


def test_refuses_the_wrong_number_of_channels():
    with pytest.raises(InputError, match="one mean and std for each of the 3 channels"):
        NORMALIZED.to_raw(torch.rand(1, 3, 2, 2))
    for method in (COLUMNS.bounds, lambda x: COLUMNS.check(x, x.dtype)):
        with pytest.raises(InputError, match="one low for each of the 2 channels"):
            method(torch.rand(1, 2))
    with pytest.raises(InputError, match="one high for each of the 2 channels"):
        InputSpace(high=(1.0, 2.0, 3.0)).region(torch.rand(1, 2), 0.1)
    with pytest.raises(InputError, match=r"`immutable` channels below 2, for inputs of shape"):
        InputSpace(immutable=(0, 2)).check(torch.rand(0, 2), torch.float32)
