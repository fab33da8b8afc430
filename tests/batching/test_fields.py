import collections
import dataclasses

import pytest

from defend import InputError
from defend.batching.fields import get_field, with_field

Pair = collections.namedtuple("Pair", "x y")


@dataclasses.dataclass(frozen=True)
class Record:
    x: str
    y: str


class Encoding(dict):
    pass


CASES = [
    (["x", "y"], 0),
    (("x", "y"), 0),
    (("x", "y"), -2),
    ({"x": "x", "y": "y"}, "x"),
    (Encoding(x="x", y="y"), "x"),
    (Pair("x", "y"), 0),
    (Pair("x", "y"), "x"),
    (Record("x", "y"), 0),
    (Record("x", "y"), "x"),
]


@pytest.mark.parametrize(("batch", "key"), CASES)
def test_reads_and_replaces_in_a_copy(batch, key):
    assert get_field(batch, key) == "x"
    changed = with_field(batch, key, "new")
    assert type(changed) is type(batch)
    assert get_field(changed, key) == "new"
    assert get_field(batch, key) == "x"
    other = {0: 1, -2: 1, "x": "y"}[key]
    assert get_field(changed, other) == "y"


@pytest.mark.parametrize(
    ("batch", "key", "message"),
    [
        ({"image": 1}, 0, r"field 0, got a dict, one with the fields \['image'\]"),
        ([1], 3, "field 3, got a list, one of 1 fields"),
        (Pair(1, 2), "z", r"field 'z', got a Pair, one with the fields \['x', 'y'\]"),
        (Record("x", "y"), 5, "field 5, got a Record"),
        (object(), 0, "neither a list, tuple, dict, namedtuple nor dataclass"),
    ],
)
def test_a_missing_field_is_an_error_that_names_those_there_are(batch, key, message):
    with pytest.raises(InputError, match=message):
        get_field(batch, key)
    with pytest.raises(InputError, match=message):
        with_field(batch, key, "new")
