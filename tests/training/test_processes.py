"""`make_private` under `torch.distributed.run`: two processes give what one gives."""

import json
import pickle
from pathlib import Path

import pytest
import torch

from defend.errors import PrivacyError
from defend.training.processes import Processes
from tests.helpers import data
from tests.training.programs import SIGMA, alone, reports

C = 0.5


@pytest.mark.parametrize(
    "case", ["plain exact", "plain empty ranks", "plain shards", "plain adaptive", "plain record"]
)
def test_two_processes_equal_one(case):
    """Without noise; in chunks of 3 against one chunk; with ranks that have no record.

    With the loader of one process on each, or with one that is sharded already; with an attack.
    """
    first, second = reports(case)
    one = alone(case)
    assert torch.equal(first["weights"], second["weights"])  # ranks do not drift apart
    torch.testing.assert_close(first["weights"], one["weights"], rtol=0, atol=1e-6)
    assert first["steps"] == second["steps"] == one["steps"]


def test_a_learned_clipping_norm_is_the_same_everywhere():
    first, second = reports("plain adaptive")
    assert first["max_grad_norm"] == second["max_grad_norm"]
    assert first["max_grad_norm"] == pytest.approx(alone("plain adaptive")["max_grad_norm"])
    assert first["max_grad_norm"] > 1.5 * C  # it did move


def test_some_ranks_of_the_case_were_empty():
    first, second = reports("plain empty ranks")
    sizes = [len(mask[1::2]) for mask in second["masks"]]
    assert 0 in sizes  # second rank
    assert any(not mask for mask in first["masks"])  # and the whole batch


def test_all_share_one_mask_that_is_cut_into_slices():
    first, second = reports("plain no seed")
    x = data(64).tensors[0][:, 0]
    assert first["masks"] == second["masks"]
    for rank, report in enumerate((first, second)):
        for mask, rows in zip(report["masks"], report["rows"], strict=True):
            assert torch.equal(rows, x[mask[rank::2]])
    assert torch.equal(first["weights"], second["weights"])
    assert first["masks"] != alone("plain no seed")["masks"]  # drawn anew each time


def test_a_second_training_goes_on_with_the_account_on_every_rank():
    once, twice = reports("plain no seed"), reports("plain twice")
    assert [report["steps"] for report in (*once, *twice)] == [8, 8, 16, 16]
    assert twice[0]["epsilon"] == twice[1]["epsilon"] > once[0]["epsilon"]
    assert twice[0]["ledger"] == twice[1]["ledger"]


def noise_in(case, silence, rank):
    """What was added to each coordinate of each step's sum, in the weights' own order."""
    noise = torch.stack(reports(case)[rank]["released"]) - torch.stack(
        reports(silence)[rank]["released"]
    )
    return noise.double() * 16  # undo ÷ expected batch


def assert_deviation(noise, deviation):
    """Within 4 standard errors; with 24 steps of 195 numbers that is 4%."""
    error = deviation / (2 * noise.numel()) ** 0.5
    assert abs(noise.std() - deviation) < 4 * error
    assert abs(noise.mean()) < 4 * deviation / noise.numel() ** 0.5


@pytest.mark.parametrize("rank", [0, 1])
def test_the_noise_is_added_once(rank):
    assert_deviation(noise_in("plain noise", "plain silence", rank), SIGMA * C)


def test_noise_on_every_rank_would_be_noticed():
    noise = noise_in("plain noise on every rank", "plain silence", 0)
    with pytest.raises(AssertionError):
        assert_deviation(noise, SIGMA * C)
    assert_deviation(noise, SIGMA * C * 2**0.5)


def test_rank_0_keeps_the_only_ledger():
    first, second = reports("plain exact")
    assert (first["writes"], second["writes"]) == (True, False)
    assert first["ledger"] == second["ledger"]
    assert count_steps(first["ledger"]) == first["steps"] == 8


def count_steps(ledger):
    lines = [json.loads(line) for line in Path(ledger).read_text().splitlines()]
    assert [line["kind"] for line in lines[:2]] == ["ledger", "fit"]
    return sum(line["kind"] == "step" for line in lines)


@pytest.mark.parametrize(
    ("case", "error", "message"),
    [
        ("plain sum", "PrivacyError", "the loss is not the plain mean"),
        ("plain no ledger", "PrivacyError", "Expected a privacy ledger"),
        ("plain not wrapped", "InputError", "a model in DistributedDataParallel"),
        (
            "plain full disk",
            "PrivacyError",
            ["Expected to write the step", "account for the step, got an error on another"],
        ),
    ],
)
def test_an_error_is_raised_on_all_ranks(case, error, message):
    for report in reports(case):
        assert report.get("error") == error
        messages = [message] if isinstance(message, str) else message
        assert any(m in report["message"] for m in messages)


# --- Processes --------------------------------------------------------------------------------


class Telephone:
    """Two processes in one: rank 0 speaks first, rank 1 listens."""

    def __init__(self):
        self.line = b""

    def speak(self, value):
        self.line = pickle.dumps(value)
        return value

    def listen(self, _):
        return pickle.loads(self.line)

    def both(self, compute):
        outcomes = []
        for rank, broadcast in enumerate((self.speak, self.listen)):
            try:
                outcomes.append(Processes(rank, 2, broadcast).from_first(compute))
            except Exception as error:
                outcomes.append(error)
        return outcomes


def test_rank_0_computes_for_all():
    calls = []

    def compute():
        calls.append(1)
        return {"steps": 3}

    assert Telephone().both(compute) == [{"steps": 3}, {"steps": 3}]
    assert len(calls) == 1


def test_an_error_of_rank_0_is_everybodys():
    def compute():
        raise PrivacyError("out of luck")

    first, second = Telephone().both(compute)
    assert type(first) is type(second) is PrivacyError
    assert str(second) == "out of luck"


class TwoArgumentsError(Exception):
    """Can be pickled, but not back."""

    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


def test_an_error_that_cannot_travel_is_told_in_words():
    def compute():
        raise TwoArgumentsError("one", "two")

    first, second = Telephone().both(compute)
    assert type(first) is TwoArgumentsError  # its own, with its traceback
    assert type(second) is PrivacyError
    assert str(second) == "Expected rank 0 to succeed, got TwoArgumentsError: one and two"


def test_alone_without_torch_distributed():
    assert Processes.current() == Processes(0, 1)
    assert Processes().from_first(lambda: 5) == 5
    with pytest.raises(ZeroDivisionError):
        Processes().from_first(lambda: 1 / 0)
