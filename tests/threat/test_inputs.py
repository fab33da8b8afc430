import pytest
import torch

from defend import InputError, InputSpace

NORMALIZED = InputSpace(mean=(0.5, 0.4), std=(0.2, 0.1))


def test_model_and_raw_units_are_inverse():
    raw = torch.rand(3, 2, 4, 4)
    x = NORMALIZED.to_model(raw)
    torch.testing.assert_close(x[:, 1], (raw[:, 1] - 0.4) / 0.1)
    torch.testing.assert_close(NORMALIZED.to_raw(x), raw)


def test_without_moments_units_are_the_same():
    x = torch.rand(2, 3)
    assert InputSpace().to_model(x) is x
    assert InputSpace().to_raw(x) is x


def test_lists_are_taken_as_tuples():
    assert hash(InputSpace(mean=[0.5], std=[0.2])) == hash(InputSpace(mean=(0.5,), std=(0.2,)))


def test_data_outside_the_box_is_an_error_that_says_so():
    x = torch.tensor([[0.0, 2.5]])
    with pytest.raises(InputError, match=r"inside the box \[0.0, 1.0\], got values from 0 to 2.5"):
        InputSpace().check(x, x.dtype)


def test_nan_is_outside_the_box():
    with pytest.raises(InputError, match="inside the box"):
        InputSpace().check(torch.tensor([[float("nan")]]), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rounding_by_normalization_is_forgiven(dtype):
    corners = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 2, 1, 1)
    x = NORMALIZED.to_model(corners.to(dtype))
    NORMALIZED.check(NORMALIZED.to_raw(x.float()), dtype)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"low": 1.0, "high": 0.0}, "Expected `low` < `high`"),
        ({"mean": (0.5,)}, "got only mean"),
        ({"std": (0.5,)}, "got only std"),
        ({"mean": (0.5,), "std": (0.1, 0.2)}, "same length, got 1 and 2"),
        ({"mean": (0.5,), "std": (0.0,)}, "every `std` to be > 0"),
    ],
)
def test_refuses_settings_that_make_no_box(settings, message):
    with pytest.raises(InputError, match=message):
        InputSpace(**settings)


def test_refuses_the_wrong_number_of_channels():
    with pytest.raises(InputError, match="each of the 3 channels"):
        NORMALIZED.to_raw(torch.rand(1, 3, 2, 2))
