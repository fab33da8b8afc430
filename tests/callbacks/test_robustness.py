import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch.utils.data import DataLoader

from defend import PGD, DifferentialPrivacy, InputError, InputSpace, Linf, RobustnessEvaluation
from defend import evaluate as evaluate_model
from defend.attacks.attack import Attack
from defend.attacks.result import AttackResult
from tests.helpers import Net, data, flat, loader, trainer

ATTACKS = {"pgd3": PGD(Linf(0.1), steps=3)}


def validation(records=48):
    return DataLoader(data(records, seed=1), batch_size=16)


def fit(evaluation, callbacks=(), val=None, **settings):
    pl.seed_everything(0)
    module = Net()
    run = trainer(callbacks=[evaluation, *callbacks], **settings)
    run.fit(module, loader(), val or validation())
    return module, run


def test_logs_what_evaluate_measures():
    evaluation = RobustnessEvaluation(ATTACKS)
    module, run = fit(evaluation, max_epochs=8)
    expected = evaluate_model(module, validation(), ATTACKS, progress=False)
    assert evaluation.report == expected
    for name, value in expected.metrics().items():
        assert run.callback_metrics[name] == pytest.approx(value)
    assert expected.attack_accuracy["pgd3"] < expected.clean_accuracy


def test_checkpoints_can_monitor_it(tmp_path):
    seen = []

    class Record(pl.Callback):
        def on_validation_end(self, trainer, pl_module):
            if not trainer.sanity_checking:
                metric = trainer.callback_metrics["robust/worst_case_accuracy"]
                seen.append((float(metric), flat(pl_module)))

    checkpoint = ModelCheckpoint(
        tmp_path, monitor="robust/worst_case_accuracy", mode="max", save_weights_only=True
    )
    evaluation = RobustnessEvaluation(ATTACKS)
    fit(evaluation, [checkpoint, Record()], max_epochs=6, enable_checkpointing=True)
    best = max(value for value, _ in seen)
    assert checkpoint.best_model_score == pytest.approx(best)
    weights = next(w for value, w in seen if value == best)
    loaded = Net.load_from_checkpoint(checkpoint.best_model_path, weights_only=True)
    assert torch.equal(flat(loaded), weights)


def evaluated_epochs(evaluation, **settings):
    epochs = []

    class Record(pl.Callback):
        def on_validation_end(self, trainer, pl_module):
            if evaluation._latest.step == trainer.global_step and not trainer.sanity_checking:
                epochs.append(trainer.current_epoch + 1)

    fit(evaluation, [Record()], **settings)
    return epochs


@pytest.mark.parametrize(
    ("every", "settings", "expected"),
    [
        (1, {"max_epochs": 3}, [1, 2, 3]),
        (2, {"max_epochs": 5}, [2, 4, 5]),
        (10, {"max_epochs": 3}, [3]),
        (3, {"max_epochs": -1, "max_steps": 32}, [3, 4]),
    ],
)
def test_every_n_epochs_and_after_the_last(every, settings, expected):
    assert evaluated_epochs(RobustnessEvaluation(ATTACKS, every_n_epochs=every), **settings) == (
        expected
    )


def test_a_run_that_ends_between_two_evaluations_says_so():
    stop = EarlyStopping("val_loss", patience=1, min_delta=100.0)
    with pytest.warns(UserWarning, match="without a robustness evaluation of the final weights"):
        fit(RobustnessEvaluation(ATTACKS, every_n_epochs=3), [stop], max_epochs=9)


def test_the_sanity_check_is_not_an_evaluation():
    calls = []

    def attack(model, x, y, *, generator=None, chunk_size=None):
        calls.append(len(x))
        return x

    fit(RobustnessEvaluation({"none": attack}), num_sanity_val_steps=2)
    assert calls == [16, 16, 16]


def test_max_records():
    evaluation = RobustnessEvaluation(ATTACKS, max_records=20)
    fit(evaluation)
    assert evaluation.report.records == 20


def test_does_not_change_training():
    evaluated, _ = fit(RobustnessEvaluation(ATTACKS), max_epochs=3)
    pl.seed_everything(0)
    plain = Net()
    trainer(max_epochs=3).fit(plain, loader(), validation())
    assert torch.equal(flat(evaluated), flat(plain))


def test_curves_start_clean_and_fall():
    attacks = {**ATTACKS, "pgd5": PGD(Linf(0.2), steps=5)}
    evaluation = RobustnessEvaluation(attacks, curve_records=32)
    module, _ = fit(evaluation, max_epochs=8)
    curve = evaluation.curves["linf"]
    accuracies = list(curve.values())
    assert list(curve) == pytest.approx(
        [0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3]
    )  # the one of 5 steps
    x, y = data(48, seed=1).tensors
    clean = (module(x[:32]).argmax(1) == y[:32]).float().mean().item()
    assert accuracies[0] == pytest.approx(clean)
    assert accuracies[6] <= accuracies[2] < accuracies[0]


def test_no_curve_on_request():
    evaluation = RobustnessEvaluation(ATTACKS, curve_records=0)
    fit(evaluation)
    assert evaluation.curves == {}


def test_under_validate():
    evaluation = RobustnessEvaluation(ATTACKS)
    module = Net()
    trainer(callbacks=[evaluation]).validate(module, validation(), verbose=False)
    assert evaluation.report == evaluate_model(module, validation(), ATTACKS, progress=False)


def test_under_differential_privacy():
    """The attack meets hooked layers, in eval mode, in inference mode."""
    private = DifferentialPrivacy(delta=1e-3, max_grad_norm=1.0, noise_multiplier=1.0)
    evaluation = RobustnessEvaluation(ATTACKS)
    _, run = fit(evaluation, [private], max_epochs=2)
    assert evaluation.report.records == 48
    assert private.steps == run.global_step == 16


def test_mixed_precision():
    evaluation = RobustnessEvaluation(ATTACKS)
    fit(evaluation, precision="bf16-mixed")
    assert evaluation.report.records == 48


def test_needs_validation_data():
    with pytest.raises(InputError, match="validation data and a `validation_step`"):
        trainer(callbacks=[RobustnessEvaluation(ATTACKS)]).fit(Net(), loader())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attacks": {}}, "`attacks` to be a dict"),
        ({"every_n_epochs": 0}, "`every_n_epochs` to be ≥ 1"),
        ({"max_records": 0}, "`max_records` to be ≥ 1 or None"),
        ({"curve_records": -1}, "`curve_records` to be ≥ 0"),
        ({"chunk_size": 0}, "`chunk_size` to be 'auto'"),
        ({"attacks": {"pgd": PGD(Linf(0.1), targeted=True)}}, "to be untargeted"),
    ],
)
def test_refuses_bad_settings(settings, message):
    with pytest.raises(InputError, match=message):
        RobustnessEvaluation(**{"attacks": ATTACKS, **settings})


def test_refuses_data_outside_the_box():
    evaluation = RobustnessEvaluation({"pgd": PGD(Linf(0.1), inputs=InputSpace(0, 0.5))})
    with pytest.raises(InputError, match="inside the box"):
        fit(evaluation)


class Masking(Net):
    """Attacks find no gradient at half of the records of a batch."""

    def forward(self, x):
        if self.training:
            return super().forward(x)
        half = len(x) // 2
        return super().forward(torch.cat([x[:half].detach(), x[half:]]))


def test_gradients_that_lead_nowhere_are_logged():
    evaluation = RobustnessEvaluation({**ATTACKS, "none": lambda model, x, y, **_: x})
    run = trainer(callbacks=[evaluation])
    run.fit(Masking(), loader(), validation())
    assert evaluation.report.zero_gradients == {"pgd3": 0.5}
    assert run.callback_metrics["robust/pgd3_zero_grad_rate"] == 0.5
    assert "robust/none_zero_grad_rate" not in run.callback_metrics
    assert evaluation.results()["zero_gradients"] == {"pgd3": 0.5}


def test_two_processes_count_gradients_together():
    evaluation = RobustnessEvaluation(ATTACKS)
    run = trainer(callbacks=[evaluation], strategy="ddp_fork", devices=2)
    run.validate(Masking(), validation(), verbose=False)
    assert evaluation.report.records == 48
    assert evaluation.report.zero_gradients == {"pgd3": 0.5}


class Sized(Net):
    def __init__(self):
        super().__init__()
        self.attacked = []

    def forward(self, x):
        if x.requires_grad:
            self.attacked.append(len(x))
        return super().forward(x)


@pytest.mark.parametrize(("chunk_size", "most"), [("auto", 16), (5, 4)])
def test_chunks_reach_the_attacks_and_change_nothing(chunk_size, most):
    evaluation = RobustnessEvaluation(ATTACKS, chunk_size=chunk_size, curve_records=16)
    module = Sized()
    trainer(callbacks=[evaluation]).fit(module, loader(), validation())
    assert max(module.attacked) == most
    assert evaluation.report == evaluate_model(module, validation(), ATTACKS, progress=False)


def test_the_card_has_every_attack_in_short():
    told = RobustnessEvaluation(ATTACKS).settings()
    assert told == {"evaluated/pgd3": "PGD(Linf(0.1), steps=3)"}


# --- batches and attacks of any kind --------------------------------------------------------------


class AnyLength(Net):
    """Takes rows of any length of at least 8."""

    def forward(self, x):
        return super().forward(x[:, :8])


def test_the_curve_covers_batches_of_different_shapes():
    x, y = data(48, seed=1).tensors
    wide = torch.cat([x, torch.rand(48, 4)], 1)
    batches = [(x[:16], y[:16]), (wide[16:32], y[16:32]), (x[32:], y[32:])]
    evaluation = RobustnessEvaluation(ATTACKS, curve_records=40)
    module = AnyLength()
    run = trainer(callbacks=[evaluation], max_epochs=4)
    run.fit(module, loader(), DataLoader(batches, batch_size=None))
    curve = evaluation.curves["linf"]
    clean = (module(x[:40]).argmax(1) == y[:40]).float().mean().item()
    assert curve[0.0] == pytest.approx(clean)
    assert curve[0.1] < curve[0.0]


def ascend(model, x, y, *, generator=None, chunk_size=None):
    """A step as others write it: on the module as it is, with a backward through all of it."""
    model.eval()
    x.requires_grad_(True)
    torch.nn.functional.cross_entropy(model(x), y).backward()
    return (x + 0.1 * x.grad.sign()).clamp(0, 1)


def test_attacks_of_others_leave_no_trace_in_training():
    evaluation = RobustnessEvaluation({"own": ascend})
    evaluated, _ = fit(evaluation, max_epochs=3)
    pl.seed_everything(0)
    plain = Net()
    trainer(max_epochs=3).fit(plain, loader(), validation())
    assert torch.equal(flat(evaluated), flat(plain))
    assert evaluation.report.attack_accuracy["own"] < evaluation.report.clean_accuracy


def test_attacks_of_others_run_in_inference_mode():
    module, evaluation = Net(), RobustnessEvaluation({"own": ascend})
    trainer(callbacks=[evaluation], inference_mode=True).validate(
        module, validation(), verbose=False
    )
    assert evaluation.report == evaluate_model(
        module, validation(), {"own": ascend}, progress=False
    )
    assert all(p.grad is None for p in module.parameters())


class Fixed(Attack):
    """Knows its ball, and no other radius."""

    ball, steps = Linf(0.1), 5

    def _perturb(self, model, x, y, **_):
        return AttackResult(x)


def test_there_is_no_curve_of_an_attack_with_one_radius():
    evaluation = RobustnessEvaluation({"fixed": Fixed(), **ATTACKS})
    fit(evaluation)
    assert list(evaluation.curves) == ["linf"]  # of PGD, though it takes fewer steps
    fit(alone := RobustnessEvaluation({"fixed": Fixed()}))
    assert alone.curves == {}
