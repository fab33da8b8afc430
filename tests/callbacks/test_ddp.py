"""Several processes on CPU (gloo) give what one process gives, however they were started.

Two under `torch.distributed.run`, three under Lightning's own launcher, and copies of this process
(ddp_spawn, ddp_fork). The cases are in `tests.training.programs`.
"""

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

from defend import PGD, DifferentialPrivacy, Linf, RobustnessEvaluation
from tests.helpers import Net, data, trainer
from tests.training.programs import SIGMA, alone, reports
from tests.training.test_processes import C, assert_deviation, count_steps, noise_in

ATTACK = PGD(Linf(0.1), steps=2, random_start=False)


@pytest.mark.parametrize(
    "case",
    [
        "lightning exact",
        "lightning robust",
        "lightning both",
        "lightning record",
        "lightning objectives",
        "lightning empty ranks",
        "lightning adaptive",
        "three",
        "three objectives",
        "three empty ranks",
    ],
)
def test_several_processes_equal_one(case):
    """Without noise and with; in chunks of 3 against one chunk; with ranks without a record."""
    one, several = alone(case), reports(case)
    for report in several:
        assert torch.equal(report["weights"], several[0]["weights"])  # ranks do not drift apart
        torch.testing.assert_close(report["weights"], one["weights"], rtol=0, atol=1e-6)
        assert report["steps"] == one["steps"]
        assert report["metrics"] == pytest.approx(one["metrics"], abs=1e-6)


def test_robustness_was_measured_in_the_cases_that_say_so():
    for case in ("lightning robust", "lightning both", "three"):
        assert "robust/pgd_accuracy" in alone(case)["metrics"]


def test_a_learned_clipping_norm_is_the_same_everywhere():
    first, second = reports("lightning adaptive")
    assert first["max_grad_norm"] == second["max_grad_norm"]
    assert first["max_grad_norm"] == pytest.approx(alone("lightning adaptive")["max_grad_norm"])
    assert first["max_grad_norm"] > 1.5 * C  # it did move


def test_without_a_seed_all_share_one_mask_and_one_noise():
    first, second = reports("lightning no seed")
    assert torch.equal(first["weights"], second["weights"])
    assert not torch.equal(first["weights"], alone("lightning no seed")["weights"])
    place = {float(x): i for i, x in enumerate(data(64).tensors[0][:, 0])}
    for mine, others in zip(first["rows"], second["rows"], strict=True):
        even, odd = [place[float(x)] for x in mine], [place[float(x)] for x in others]
        whole = sorted(even + odd)
        assert len(set(whole)) == len(whole)  # no record on both
        assert (whole[::2], whole[1::2]) == (even, odd)  # one mask, cut into slices


@pytest.mark.parametrize("rank", [0, 1])
def test_the_noise_is_added_once(rank):
    assert_deviation(noise_in("lightning noise", "lightning silence", rank), SIGMA * C)


def test_noise_on_every_rank_would_be_noticed():
    noise = noise_in("lightning noise on every rank", "lightning silence", 0)
    with pytest.raises(AssertionError):
        assert_deviation(noise, SIGMA * C)
    assert_deviation(noise, SIGMA * C * 2**0.5)


@pytest.mark.parametrize("case", ["lightning exact", "three"])
def test_rank_0_keeps_the_only_ledger(case):
    first, *others = reports(case)
    assert first["writes"]
    for report in others:
        assert not report["writes"]
        assert report["ledger"] == first["ledger"]
        assert report["charged"] == first["charged"]
    assert count_steps(first["ledger"]) == first["charged"] == first["steps"] == 8


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("lightning sum", "the loss is not the plain mean"),
        ("lightning no ledger", "Expected a privacy ledger"),
        (
            "lightning full disk",
            ["Expected to write the step", "account for the step, got an error on another"],
        ),
    ],
)
def test_an_error_is_raised_on_all_ranks(case, message):
    for report in reports(case):
        assert report.get("error") == "PrivacyError"
        messages = [message] if isinstance(message, str) else message
        assert any(m in report["message"] for m in messages)


# --- copies of this process -------------------------------------------------------------------


class Weights(Callback):
    """What each rank ended with."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_end(self, trainer, pl_module):
        torch.save(pl_module.state_dict(), Path(self.folder, f"{trainer.global_rank}.pt"))


class Failing(Net):
    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == 3:
            raise RuntimeError("out of luck")
        return super().training_step(batch, batch_idx)


def test_what_spawned_copies_spent_and_measured_is_known(tmp_path):
    callback = DifferentialPrivacy(delta=1e-3, max_grad_norm=0.5, noise_multiplier=1.0)
    evaluation = RobustnessEvaluation({"pgd": ATTACK})
    run = trainer(
        callbacks=[callback, evaluation, Weights(str(tmp_path))],
        default_root_dir=tmp_path,
        max_epochs=2,
        strategy="ddp_spawn",
        devices=2,
    )
    validation = DataLoader(data(32, seed=1), batch_size=8)
    run.fit(Net(), DataLoader(data(64), batch_size=8), validation)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (callback.steps, callback.sample_rate, callback.noise_multiplier) == (8, 0.25, 1.0)
    assert callback.epsilon > 0
    (ledger,) = tmp_path.glob("privacy_ledgers/*")
    assert count_steps(ledger) == 8
    assert evaluation.report.records == 32
    assert len(evaluation.curves["linf"]) == 7
    assert not Path(callback._state_file).exists()


def test_what_a_failed_fit_of_copies_spent_is_known_and_adds_up(tmp_path):
    callback = DifferentialPrivacy(delta=1e-3, max_grad_norm=0.5, noise_multiplier=1.0)
    settings = {"strategy": "ddp_fork", "devices": 2, "default_root_dir": tmp_path}
    run = trainer(callbacks=[callback], **settings)
    with pytest.raises(Exception, match="out of luck"):
        run.fit(Failing(), DataLoader(data(64), batch_size=8))
    assert callback.steps == 3
    assert callback.state_dict()["fits"]
    run = trainer(callbacks=[callback], **settings)
    run.fit(Net(), DataLoader(data(64), batch_size=8))
    (ledger,) = tmp_path.glob("privacy_ledgers/*")  # the second fit found that of the first
    assert callback.steps == count_steps(ledger) == 3 + 4
    assert not Path(callback._state_file).exists()


def test_where_copies_kept_their_ledger_is_known(tmp_path):
    callback = DifferentialPrivacy(delta=1e-3, max_grad_norm=0.5, noise_multiplier=1.0)
    run = trainer(callbacks=[callback], strategy="ddp_fork", devices=2, default_root_dir=tmp_path)
    run.fit(Net(), DataLoader(data(64), batch_size=8))
    assert [callback.ledger_path] == list(tmp_path.glob("privacy_ledgers/*"))


def test_a_validation_in_copies_reports_too():
    evaluation = RobustnessEvaluation({"pgd": ATTACK})
    run = trainer(callbacks=[evaluation], strategy="ddp_fork", devices=2)
    run.validate(Net(), DataLoader(data(32, seed=1), batch_size=8), verbose=False)
    assert evaluation.report.records == 32
