"""A run that is killed and resumed spends what the uninterrupted run spends."""

import itertools
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from defend import PGD, AdversarialTraining, DifferentialPrivacy, Linf, PrivacyError
from defend.privacy import epsilon
from tests.helpers import Net, flat, loader, trainer
from tests.processes import NOISE

ROOT = Path(__file__).parents[2]


SEEDS = ("none", "11")


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """For each seed its folder, and how three runs ended: straight, killed and resumed."""
    folders, runs = {}, []
    for seed in SEEDS:
        folder = folders[seed] = tmp_path_factory.mktemp(f"seed-{seed}")
        checkpoint = folder / "killed" / "step=12.ckpt"
        for name, kill_at, resume, ledger in (
            ("straight", 0, "none", "own"),
            ("killed", 13, "none", "shared"),
            ("resumed", 0, checkpoint, "shared"),
        ):
            (folder / name).mkdir()
            runs.append(f"{folder / name},{seed},{kill_at},{resume},{ledger}")
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.processes", "train_in_turn", *runs],
        cwd=ROOT, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    lines = [line for line in process.stdout.splitlines() if re.fullmatch(r"-?\d+|{.*}", line)]
    found = iter(map(json.loads, lines))
    return {seed: (folders[seed], list(itertools.islice(found, 5))) for seed in SEEDS}


@pytest.mark.parametrize("seed", SEEDS)
def test_kill_and_resume_in_mid_epoch(ended, seed):
    folder, (straight, well, killed, resumed, too) = ended[seed]
    assert (well, killed, too) == (0, -signal.SIGKILL, 0)
    assert (folder / "killed" / "step=12.ckpt").exists()

    # 12 steps to the checkpoint, one more that was lost but not refunded, and 20 after it.
    assert sum(steps for *_, steps in straight["history"]) == 32
    assert sum(steps for *_, steps in resumed["history"]) == 33
    if seed == "none":
        assert 3.8 < resumed["epsilon"] <= 4.0  # the target holds all the same
    else:
        assert resumed["epsilon"] > straight["epsilon"]
    weights = [torch.tensor(r["weights"]) for r in (straight, resumed)]
    if seed == "none":
        # Fresh entropy: neither the same run again, nor the same noise after a resume.
        assert not torch.allclose(*weights)
        lines = [
            json.loads(line)
            for name in ("killed", "resumed")
            for line in (folder / name / NOISE).read_text().splitlines()
        ]
        replayed = [first for step, first in lines if step == 12]
        assert len(replayed) == 2
        assert replayed[0] != replayed[1]
    else:
        torch.testing.assert_close(*weights, rtol=0, atol=1e-7)


def fit(callback, ckpt=None, **settings):
    pl.seed_everything(0)
    module = Net()
    program = trainer(callbacks=[callback], **settings)
    program.fit(module, loader(256, 32), ckpt_path=ckpt)
    return module, program


def private(**settings):
    return DifferentialPrivacy(**{"delta": 1e-3, "max_grad_norm": 0.5, **settings})


def test_a_longer_plan_after_a_resume_still_meets_the_target(tmp_path):
    first = private(target_epsilon=4.0, accountant="rdp")
    _, program = fit(first, max_epochs=4, limit_train_batches=4)
    program.save_checkpoint(tmp_path / "a.ckpt")
    second = private(target_epsilon=6.0, accountant="rdp")
    fit(second, tmp_path / "a.ckpt", max_epochs=8, limit_train_batches=4)
    assert second.steps == 32
    assert len(second.history) == 2
    assert 5.8 < second.epsilon <= 6.0
    assert second.epsilon == epsilon(second.history, 1e-3, "rdp")


def test_changed_noise_and_batch_size_are_accounted_as_they_were(tmp_path):
    _, program = fit(private(noise_multiplier=1.0))
    program.save_checkpoint(tmp_path / "a.ckpt")
    second = private(noise_multiplier=2.0)
    pl.seed_everything(0)
    trainer(callbacks=[second], max_epochs=3).fit(
        Net(), loader(256, 64), ckpt_path=tmp_path / "a.ckpt"
    )
    assert [segment[:2] for segment in second.history] == [(1.0, 1 / 8), (2.0, 1 / 4)]


def test_an_exhausted_budget_stays_exhausted(tmp_path):
    first = private(target_epsilon=2.0, noise_multiplier=1.0)
    module, program = fit(first, max_epochs=20)
    program.save_checkpoint(tmp_path / "a.ckpt")
    second = private(target_epsilon=2.0, noise_multiplier=1.0)
    resumed, _ = fit(second, tmp_path / "a.ckpt", max_epochs=20)
    assert second.history == first.history
    assert torch.equal(flat(resumed), flat(module))


def test_a_checkpoint_without_a_privacy_record_is_refused(tmp_path):
    program = trainer()
    program.fit(Net(), loader(256, 32))
    program.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(PrivacyError, match="a checkpoint of a private run, got one without"):
        fit(private(noise_multiplier=1.0), tmp_path / "plain.ckpt", max_epochs=2)


def test_checkpoints_hold_no_secret_and_load_as_weights_only(tmp_path):
    callback = private(noise_multiplier=1.0)
    roots = []

    class Peek(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            roots.append(callback.data.randomness.root)

    module = Net()
    program = trainer(callbacks=[callback, Peek()])
    program.fit(module, loader(256, 32))
    program.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert str(roots[0]) not in str(checkpoint)
    (state,) = [v for k, v in checkpoint["callbacks"].items() if "DifferentialPrivacy" in k]
    assert set(state) == {"fits", "plan", "insecure", "max_grad_norm", "ledger", "anchor"}


PLAIN = """
import sys
sys.modules["defend"] = sys.modules["opacus"] = None  # an import of either would raise
import torch
from tests.helpers import Net, flat
module = Net.load_from_checkpoint(sys.argv[1], weights_only=True)
assert type(module) is Net and not any(vars(p) for p in module.parameters())
print(flat(module).tolist())
"""


def test_the_checkpoint_loads_into_the_plain_module_without_defend(tmp_path):
    module, program = fit(private(noise_multiplier=1.0))
    program.save_checkpoint(tmp_path / "a.ckpt")
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PLAIN, tmp_path / "a.ckpt"],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout.splitlines()[-1]) == flat(module).tolist()


def test_both_callbacks_keep_their_states_apart():
    robust = AdversarialTraining(PGD(Linf(0.1)))
    assert private(noise_multiplier=1.0).state_key != robust.state_key


@pytest.mark.parametrize("job", ["test", "validate", "predict"])
def test_other_jobs_do_not_refund_what_was_spent(tmp_path, job):
    callback = private(noise_multiplier=1.0)

    class Full(Net):
        def test_step(self, batch, batch_idx):
            pass

        def predict_step(self, batch, batch_idx):
            pass

    pl.seed_everything(0)
    program = trainer(callbacks=[callback], max_steps=3, max_epochs=None)
    module = Full()
    program.fit(module, loader(256, 32))
    program.save_checkpoint(tmp_path / "a.ckpt")
    program = trainer(callbacks=[callback])
    program.fit(module, loader(256, 32))
    assert callback.steps == 11
    settings = {} if job == "predict" else {"verbose": False}
    getattr(program, job)(module, loader(16, 16), ckpt_path=tmp_path / "a.ckpt", **settings)
    assert callback.steps == 11


def test_a_rollback_does_not_refund(tmp_path):
    callback = private(noise_multiplier=1.0)
    _, program = fit(callback, max_steps=5)
    program.save_checkpoint(tmp_path / "a.ckpt")
    _, far = fit(callback, tmp_path / "a.ckpt", max_epochs=3)
    assert callback.steps == far.global_step == 21
    # Back to step 5 and on from there: those steps come on top of the 21.
    _, again = fit(callback, tmp_path / "a.ckpt", max_epochs=2)
    assert callback.steps == 21 + again.global_step - 5 > 21


def test_steps_of_two_runs_add_up(tmp_path):
    _, program = fit(private(noise_multiplier=1.0), max_steps=5)
    program.save_checkpoint(tmp_path / "a.ckpt")
    other = private(noise_multiplier=1.0)
    fit(other, max_steps=4)
    _, last = fit(other, tmp_path / "a.ckpt", max_epochs=2)
    assert other.steps == 4 + last.global_step > 9


def test_a_fixed_seed_is_remembered_after_a_resume(tmp_path):
    first = private(noise_multiplier=1.0, insecure_seed=0)
    _, program = fit(first, max_steps=3)
    program.save_checkpoint(tmp_path / "a.ckpt")
    second = private(noise_multiplier=1.0)
    assert second.private
    fit(second, tmp_path / "a.ckpt")
    assert not first.private
    assert not second.private


def test_a_finished_run_keeps_its_noise(tmp_path):
    first = private(target_epsilon=4.0, accountant="rdp")
    _, program = fit(first)
    program.save_checkpoint(tmp_path / "a.ckpt")
    second = private(target_epsilon=4.0, accountant="rdp")
    fit(second, tmp_path / "a.ckpt")
    assert second.noise_multiplier == first.noise_multiplier
    assert second.history == first.history


def test_a_private_fit_after_a_plain_one_on_the_same_trainer_is_refused():
    program = trainer()
    module = Net()
    program.fit(module, loader(256, 32))
    program.callbacks.append(private(noise_multiplier=1.0))
    program.fit_loop.max_epochs = 2
    with pytest.raises(PrivacyError, match="got 8 steps of which 0 were"):
        program.fit(module, loader(256, 32))


def test_a_checkpoint_without_callback_states_is_refused(tmp_path):
    program = trainer()
    program.fit(Net(), loader(256, 32))
    program.save_checkpoint(tmp_path / "plain.ckpt")
    checkpoint = torch.load(tmp_path / "plain.ckpt", weights_only=True)
    del checkpoint["callbacks"]
    torch.save(checkpoint, tmp_path / "bare.ckpt")
    with pytest.raises(PrivacyError, match="a checkpoint with callback states, got one without"):
        fit(private(noise_multiplier=1.0), tmp_path / "bare.ckpt", max_epochs=2)


def test_what_a_checkpoint_spent_can_be_asked():
    first = private(noise_multiplier=1.0)
    fit(first)
    second = private(noise_multiplier=1.0)
    second.load_state_dict(first.state_dict())
    assert second.epsilon == first.epsilon > 0
