"""Two processes on CPU (gloo) give what one process gives."""

import json
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

from defend import PGD, AdversarialTraining, DifferentialPrivacy, Linf, RobustnessEvaluation
from tests.helpers import Net, data, flat, trainer

ATTACK = PGD(Linf(0.1), steps=2, random_start=False)


class Report(Callback):
    """Writes what each rank ended with."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_end(self, trainer, pl_module):
        report = {
            "weights": flat(pl_module).tolist(),
            "steps": trainer.global_step,
            "metrics": {k: float(v) for k, v in trainer.callback_metrics.items() if "robust" in k},
        }
        Path(self.folder, f"{trainer.global_rank}.json").write_text(json.dumps(report))


def fit(folder, callbacks, world, batch_size, records=64):
    """Fit two epochs on `world` processes; the batch of all processes together is the same."""
    folder.mkdir()
    pl.seed_everything(0)
    settings = {"strategy": "ddp_spawn", "devices": world} if world > 1 else {}
    run = trainer(callbacks=[*callbacks, Report(str(folder))], max_epochs=2, **settings)
    batches = DataLoader(data(records), batch_size=batch_size // world)
    validation = DataLoader(data(32, seed=1), batch_size=8)
    run.fit(Net(), batches, validation)
    return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(world)]


def weights(report):
    return torch.tensor(report["weights"])


def private(sigma, chunk_size=None):
    return DifferentialPrivacy(
        delta=1e-3,
        max_grad_norm=0.5,
        noise_multiplier=sigma,
        insecure_seed=3,
        chunk_size=chunk_size,
    )


@pytest.mark.parametrize("case", ["robust", "private", "both", "empty ranks"])
def test_two_processes_equal_one(tmp_path, case):
    # Without Poisson sampling Lightning shuffles over ranks: one step an epoch sees all records.
    sizes = {"robust": (64, 64), "empty ranks": (12, 2)}
    records, batch_size = sizes.get(case, (64, 16))

    def callbacks(world):
        made = [RobustnessEvaluation({"pgd": ATTACK}, curve_records=0)]
        if case in ("robust", "both"):
            made.append(AdversarialTraining(ATTACK))
        if case != "robust":
            made.append(private(0.8, chunk_size=3 if world > 1 else None))
        return made

    (one,) = fit(tmp_path / "one", callbacks(1), 1, batch_size, records)
    first, second = fit(tmp_path / "two", callbacks(2), 2, batch_size, records)
    assert first["weights"] == second["weights"]  # ranks do not drift apart
    assert one["steps"] == first["steps"]
    torch.testing.assert_close(weights(first), weights(one), rtol=0, atol=1e-6)
    assert first["metrics"] == second["metrics"] == pytest.approx(one["metrics"], abs=1e-6)
    assert first["metrics"]


def test_without_a_seed_ranks_share_one_mask_and_one_noise(tmp_path):
    """And what the copies spent and measured reaches the callbacks that the user holds."""
    callback = DifferentialPrivacy(delta=1e-3, max_grad_norm=0.5, noise_multiplier=1.0)
    evaluation = RobustnessEvaluation({"pgd": ATTACK})
    first, second = fit(tmp_path / "two", [callback, evaluation], 2, 16)
    assert first["weights"] == second["weights"]
    assert (callback.steps, callback.sample_rate, callback.noise_multiplier) == (8, 0.25, 1.0)
    assert callback.epsilon > 0
    assert evaluation.report.attack_accuracy["pgd"] == pytest.approx(
        first["metrics"]["robust/pgd_accuracy"]
    )
    assert len(evaluation.curves["linf"]) == 7
    (tmp_path / "again").mkdir()
    fit(tmp_path / "again" / "two", [callback], 2, 16)
    assert callback.steps == 16
    assert not Path(callback._mailbox).exists()


class Failing(Net):
    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == 3:
            raise RuntimeError("out of luck")
        return super().training_step(batch, batch_idx)


def test_what_a_failed_spawned_fit_spent_is_known(tmp_path):
    callback = DifferentialPrivacy(delta=1e-3, max_grad_norm=0.5, noise_multiplier=1.0)
    run = trainer(callbacks=[callback], strategy="ddp_spawn", devices=2)
    with pytest.raises(Exception, match="out of luck"):
        run.fit(Failing(), DataLoader(data(64), batch_size=8))
    assert callback.steps == 3
    assert callback.state_dict()["fits"]


def test_a_spawned_validation_reports_too():
    evaluation = RobustnessEvaluation({"pgd": ATTACK})
    run = trainer(callbacks=[evaluation], strategy="ddp_spawn", devices=2)
    run.validate(Net(), DataLoader(data(32, seed=1), batch_size=8), verbose=False)
    assert evaluation.report.records == 32
