import copy
import dataclasses
import json
import pickle
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from defend import InputError, PrivacyError
from defend.privacy.accounting import ledger as module
from defend.privacy.accounting.history import Segment, extend
from defend.privacy.accounting.ledger import Anchor, Ledger, read_ledger, spent

from .ledgers import STEP, count, filled


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.jsonl"


# --- what it holds --------------------------------------------------------------------------------


def test_steps_are_counted_by_fit_and_merged_as_the_accounting_does(path):
    rng = random.Random(0)
    expected = {"b": (), "a": (), "idle": ()}
    with Ledger.open(path) as ledger:
        for fit in expected:
            ledger.begin(fit, insecure=False)
        for _ in range(60):
            fit, sigma = rng.choice("ab"), rng.choice([1.0, 1.5])
            ledger.charge(fit, noise_multiplier=sigma, sample_rate=0.1, max_grad_norm=1.0)
            expected[fit] = extend(expected[fit], Segment(sigma, 0.1, 1))
        assert ledger.fits == expected
    assert list(spent(read_ledger(path)).items()) == list(expected.items())
    with Ledger.open(path) as again:
        assert list(again.fits.items()) == list(expected.items())
        assert any(len(history) > 5 for history in again.fits.values())


def test_reopened_and_gone_on_is_the_same_as_in_one_go(path):
    anchor = filled(path)
    for round_ in range(1, 4):
        with Ledger.open(path, anchor=anchor, must_exist=True) as ledger:
            assert ledger.anchor.lines == 5 + 3 * (round_ - 1)
            ledger.begin(f"resumed {round_}", insecure=False)
            ledger.charge("a", **STEP)
            ledger.charge(f"resumed {round_}", **STEP)
            assert ledger.fits["a"] == ((1.1, 0.02, 3 + round_),)
    assert count(path) == 9  # from the first anchor: a rollback refunds nothing


def test_facts_and_what_is_insecure(path):
    filled(path, records=100, sampling="poisson", data_digest=None)
    with Ledger.open(path) as ledger:
        facts = {"insecure": False, "delta": 1e-5, "records": 100, "sampling": "poisson"}
        assert ledger.facts == {"a": {**facts, "data_digest": None}}
        assert not ledger.insecure
        ledger.begin("seeded", insecure=True)
        assert ledger.insecure
        ledger.begin("secret", insecure=False)
    with Ledger.open(path) as ledger:
        assert ledger.insecure
        assert list(ledger.facts) == ["a", "seeded", "secret"]


@settings(max_examples=50, deadline=None)
@given(
    sigma=st.floats(0, 1e300),
    rate=st.floats(0, 1, exclude_min=True),
    norm=st.floats(0, 1e300, exclude_min=True),
)
def test_floats_come_back_exactly(tmp_path_factory, sigma, rate, norm):
    path = tmp_path_factory.mktemp("floats") / "ledger.jsonl"
    with Ledger.open(path) as ledger:
        ledger.begin("a", insecure=False)
        ledger.charge("a", noise_multiplier=sigma, sample_rate=rate, max_grad_norm=norm)
    step = read_ledger(path)[-1]
    assert (step["noise_multiplier"], step["sample_rate"], step["max_grad_norm"]) == (
        sigma,
        rate,
        norm,
    )


def test_an_anchor_goes_through_a_checkpoint(path):
    anchor = filled(path)
    assert Anchor(**json.loads(json.dumps(dataclasses.asdict(anchor)))) == anchor


def test_reading_takes_microseconds_a_line(path, monkeypatch):
    monkeypatch.setattr(module, "_sync", lambda descriptor: None)
    filled(path, steps=20_000)
    start = time.process_time()
    with Ledger.open(path) as ledger:
        assert ledger.fits == {"a": ((1.1, 0.02, 20_000),)}
    assert time.process_time() - start < 1.0  # 0.1 s on a quiet core


# --- bad arguments --------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
@pytest.mark.parametrize("name", list(STEP))
def test_settings_out_of_range_are_refused_and_not_charged(path, name, bad):
    filled(path)
    with Ledger.open(path) as ledger:
        with pytest.raises(InputError, match=f"Expected `{name}` to be"):
            ledger.charge("a", **{**STEP, name: bad})
        if name != "noise_multiplier":
            with pytest.raises(InputError, match=f"Expected `{name}` to be"):
                ledger.charge("a", **{**STEP, name: 0.0})
    assert count(path) == 3


def test_names_and_facts_are_checked(path):
    with Ledger.open(path) as ledger:
        with pytest.raises(InputError, match=r"got 'a'. Call `begin` first"):
            ledger.charge("a", **STEP)
        ledger.begin("a", insecure=False)
        with pytest.raises(InputError, match="a new name for a fit, got 'a' again"):
            ledger.begin("a", insecure=False)
        with pytest.raises(InputError, match=r"under other names, got \['digest', 'kind'\]"):
            ledger.begin("b", insecure=False, kind="step", digest="")
        for fact in (float("nan"), object()):
            with pytest.raises(InputError, match="facts that JSON can hold, got"):
                ledger.begin("b", insecure=False, fact=fact)
        assert list(ledger.fits) == ["a"]
    with pytest.raises(InputError, match="`lines` ≥ 1, got 0"):
        Anchor(0, "0" * 64)


def test_a_closed_ledger_takes_nothing(path):
    filled(path)
    ledger = Ledger.open(path)
    ledger.close()
    ledger.close()
    with pytest.raises(PrivacyError, match=r"an open ledger, got .* closed"):
        ledger.charge("a", **STEP)


def test_a_ledger_has_one_writer_and_no_copies(path):
    with Ledger.open(path) as ledger:
        for duplicate in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(PrivacyError, match=r"one writer of .*, got a copy"):
                duplicate(ledger)
        with pytest.raises(PrivacyError, match=r"no other run has open, got .* locked. Wait"):
            Ledger.open(path)
    Ledger.open(path).close()


def test_a_forgotten_ledger_gives_its_lock_back(path):
    Ledger.open(path)
    Ledger.open(path).close()


def test_a_refused_ledger_is_not_left_locked(path):
    filled(path)
    with pytest.raises(PrivacyError, match="another run"):
        Ledger.open(path, anchor=Anchor(2, "0" * 64))
    assert count(path) == 3
