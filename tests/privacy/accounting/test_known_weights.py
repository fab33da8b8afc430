"""What a ledger knows of weights: which are written, and how they are found again."""

import os

import torch

from defend.privacy import Ledger
from defend.privacy.accounting.fingerprint import DataIdentity
from defend.privacy.accounting.known_weights import (
    data_facts,
    known_to,
    moved_weights,
    weight_digest,
    weight_digests,
)

DATA = DataIdentity("id:1", "sha256:2", ("3",), ("3", "4"))
BEFORE = {"earlier": DataIdentity("size:5", "size:5")}


def test_a_digest_is_of_the_values_wherever_they_lie():
    x = torch.randn(3, 4)
    digests = {weight_digest(t) for t in (x, x.t().contiguous().t(), torch.cat([x, x])[3:])}
    assert len(digests) == 1
    assert len(digests.pop()) == 32
    others = (x.double(), x.reshape(4, 3), x + 1e-7, x.t(), torch.zeros(3, 4), -torch.zeros(3, 4))
    assert len({weight_digest(t) for t in (x, *others)}) == 7
    assert weight_digest(torch.nn.LazyLinear(3).weight) is None
    assert weight_digest(x.to("meta")) is None


def test_what_any_model_may_hold_is_not_known_as_trained():
    start = {"moved": torch.zeros(4), "still": torch.randn(4), "number": torch.tensor(0.5)}
    start |= {"clamped": torch.randn(4), "to a whole number": torch.tensor(0.5)}
    now = {**start, "moved": torch.randn(4), "number": torch.tensor(0.25)}
    now |= {"clamped": torch.ones(4), "to a whole number": torch.tensor(1.0), "new": torch.ones(2)}
    moved = moved_weights(now.items(), weight_digests(start.items()))
    assert set(moved) == {"moved", "number"}
    assert moved["moved"] == weight_digest(now["moved"])


def test_a_ledger_tells_what_was_noted_and_no_more(tmp_path):
    path = tmp_path / "a.jsonl"
    with Ledger.open(path) as ledger:
        ledger.begin("old", insecure=False, data_digest="sha256:0")
        ledger.begin("new", insecure=False, **data_facts(DATA, BEFORE))
        assert known_to(path).weights == {}
        ledger.note_weights("old", {"w": "11"})
        ledger.charge("new", noise_multiplier=1.0, sample_rate=0.1, max_grad_norm=1.0)
        ledger.note_weights("new", {"w": "22", "b": "11"})
        ledger.doubt("new", since=1)
    known = known_to(path)
    assert known.weights == {"11": {"old", "new"}, "22": {"new"}}
    assert known.fits["new"] == {"new": DATA, **BEFORE}
    assert known.fits["old"] == {"old": DataIdentity("sha256:0", "sha256:0")}
    with Ledger.open(path) as ledger:  # the lines are in the chain, and are no steps
        assert {name: len(fit) for name, fit in ledger.fits.items()} == {"old": 0, "new": 1}
        assert ledger.insecure


def test_a_file_that_changes_is_read_again_and_what_is_no_ledger_is_passed_over(tmp_path):
    path = tmp_path / "a.jsonl"
    assert known_to(path) is None
    path.write_text("something else\n")
    assert known_to(path) is None
    path.unlink()
    with Ledger.open(path) as ledger:
        ledger.begin("a", insecure=False)
        for digest in ("11", "22"):
            ledger.note_weights("a", {"w": digest})
            assert digest in known_to(path).weights
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])  # torn, as in a crash
    assert set(known_to(path).weights) == {"11"}
    path.write_bytes(whole.replace(b'{"w": "22"}', b'{"w" 22}'))
    os.utime(path)
    assert set(known_to(path).weights) == {"11"}
