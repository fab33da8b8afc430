"""What the user's code keeps holds other numbers for a moment, and then its own again."""

import contextlib

import numpy as np
import pytest
import torch

from defend.privacy.checks.kept_reads import first_read, other_values


def read_only():
    array = np.ones(3)
    array.flags.writeable = False
    return array


with torch.inference_mode():
    INFERRED = torch.ones(3)

KEPT = {
    "fractions": torch.arange(3.0),
    "whole numbers": torch.arange(3),
    "yes and no": torch.tensor([True, False]),
    "complex": torch.ones(3, dtype=torch.complex64),
    "half": torch.ones(3, dtype=torch.bfloat16),
    "trained": torch.ones(3, requires_grad=True),
    "a view": torch.arange(6.0).view(2, 3)[:, 1],
    "expanded": torch.arange(2.0).expand(3, 2),
    "inferred": INFERRED,
    "empty": torch.ones(0),
    "array": np.arange(3.0),
    "array of bytes": np.arange(3, dtype=np.uint8),
    "array of yes and no": np.array([True, False]),
}
AS_THEY_ARE = {"sparse": torch.eye(3).to_sparse(), "read only": read_only()}


def numbers(value):
    dense = value.to_dense().detach() if isinstance(value, torch.Tensor) else value
    return np.array(dense.tolist())


@pytest.mark.parametrize("name", [*KEPT, *AS_THEY_ARE])
def test_other_numbers_inside_and_its_own_afterwards(name):
    value = {**KEPT, **AS_THEY_ARE}[name]
    before = numbers(value)
    with contextlib.suppress(KeyError), other_values(value):
        inside = numbers(value)
        raise KeyError
    assert np.array_equal(numbers(value), before)
    changes = name in KEPT and before.size > 0
    assert np.array_equal(inside, before) != changes


def test_the_first_one_that_gradients_depend_on():
    used, unused, array = torch.ones(2), torch.ones(2), np.ones(2)
    kept = {(0, "unused"): [unused], (0, "used"): [unused, used], (1, "used"): [array]}

    def gradients():
        return {"weight": used * float(array.sum())}

    def found(*keys):
        return first_read(gradients, {key: kept[key] for key in keys})

    assert found((0, "unused")) is None
    assert found(*kept) == "used"
    assert found((0, "unused"), (1, "used")) == "used"


USES = {
    "order": torch.argsort,
    "largest": lambda v: v.argmax()[None],
    "median": lambda v: v > v.median(),
    "size": lambda v: v,
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("value", [[-1.0, 2.0, 0.5], [-1.0, -1.0, 4.0], [3, 0, 1]])
def test_order_changes_too(use, value):
    value = torch.tensor(value)

    def gradients():
        return {"weight": USES[use](value).double()}

    assert first_read(gradients, {(0, "value"): [value]}) == "value"


def test_a_step_that_fails_with_other_numbers_reads_them():
    index = torch.tensor([1, 1])

    def gradients():
        found = torch.ones(2)
        return {"weight": found[index]} if int(index.max()) < 2 else None

    assert first_read(gradients, {(0, "index"): [index]}) == "index"
    assert first_read(lambda: None, {(0, "index"): [index]}) is None  # it fails anyway


def test_gradients_that_cannot_be_repeated_show_nothing():
    value = torch.ones(2)
    assert first_read(lambda: {"weight": torch.rand(2)}, {(0, "v"): [value]}) is None
