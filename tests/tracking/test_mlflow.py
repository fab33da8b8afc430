"""What a run leaves in MLflow, and that other loggers, or none, train just as well."""

import json
import math
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger

from defend import PGD, AdversarialTraining, DifferentialPrivacy, Linf, RobustnessEvaluation
from tests.helpers import Net, flat, loader, trainer


def callbacks():
    return [
        AdversarialTraining(PGD(Linf(0.1), steps=2)),
        DifferentialPrivacy(
            delta=1e-3,
            max_grad_norm=0.5,
            noise_multiplier=1.0,
            target_epsilon=9.0,
            accountant="rdp",
        ),
        RobustnessEvaluation({"pgd4": PGD(Linf(0.1), steps=4)}),
    ]


def fit(logger, chosen=None, seed=0, **settings):
    pl.seed_everything(seed)
    module = Net()
    made = callbacks() if chosen is None else chosen
    run = trainer(
        callbacks=made, logger=logger, **{"max_epochs": 3, "log_every_n_steps": 1, **settings}
    )
    run.fit(module, loader(256, 32), loader(32, 32, seed=1))
    return made, module


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """One database for all: to make one takes MLflow seconds. Each test has a run of its own."""
    folder = tmp_path_factory.mktemp("mlflow")
    return {
        "tracking_uri": f"sqlite:///{folder}/mlflow.db",
        "artifact_location": str(folder / "artifacts"),
    }


@pytest.fixture(scope="module")
def tracked(store):
    logger = MLFlowLogger("defend", **store)
    made, _ = fit(logger)
    return made, logger.experiment, logger.run_id


def test_params_and_tags(tracked):
    (_, private, _), client, run_id = tracked
    data = client.get_run(run_id).data
    expected = {
        "defend/attack": "PGD",
        "defend/ball": "linf",
        "defend/eps": "0.1",
        "defend/attack_steps": "2",
        "defend/noise_multiplier": "1.0",
        "defend/max_grad_norm": "0.5",
        "defend/sample_rate": "0.125",
        "defend/delta": "0.001",
        "defend/target_epsilon": "9.0",
        "defend/accountant": "rdp",
        "defend/adjacency": "add or remove one record",
        "defend/sampling": "Poisson",
        "defend/private": "True",
    }
    assert expected.items() <= data.params.items()
    assert data.tags["defend.private"] == "true"
    assert data.metrics["privacy/epsilon"] == pytest.approx(private.epsilon)


def test_epsilon_by_step_and_robustness_by_epoch(tracked):
    (_, _, evaluation), client, run_id = tracked
    epsilons = client.get_metric_history(run_id, "privacy/epsilon")
    assert len({m.step for m in epsilons}) == 24
    values = [m.value for m in sorted(epsilons, key=lambda m: (m.step, m.timestamp))]
    assert values == sorted(values)
    worst = client.get_metric_history(run_id, "robust/worst_case_accuracy")
    assert len(worst) == 3
    assert worst[-1].value == pytest.approx(evaluation.report.worst_case_accuracy)
    for name in ("robust/clean_accuracy", "robust/pgd4_accuracy"):
        assert len(client.get_metric_history(run_id, name)) == 3


def test_the_curve_is_a_metric_by_step_and_a_figure(tracked):
    (_, _, evaluation), client, run_id = tracked
    history = client.get_metric_history(run_id, "robust/curve_linf")
    logged = {m.step: m.value for m in history}
    assert logged == {round(1000 * e): a for e, a in evaluation.curves["linf"].items()}
    figure = client.download_artifacts(run_id, "defend/robustness_curve_linf.png")
    assert Path(figure).read_bytes().startswith(b"\x89PNG")


def test_the_card_is_the_description_and_says_what_was_measured(tracked):
    (_, private, evaluation), client, run_id = tracked
    card = Path(client.download_artifacts(run_id, "defend/card.md")).read_text()
    assert client.get_run(run_id).data.tags["mlflow.note.content"] == card
    report = evaluation.report
    for line in (
        f"| ε spent | {private.epsilon:.4g} |",
        "| δ | 0.001 |",
        "| noise multiplier σ | 1 |",
        "| steps | 24 |",
        "| eps (raw units) | 0.1 |",
        f"| none (clean) | {100 * report.clean_accuracy:.1f}% |",
        f"| worst case | {100 * report.worst_case_accuracy:.1f}% |",
    ):
        assert line in card
    assert "Does not cover" in card


def test_the_report_is_json(tracked):
    (_, private, evaluation), client, run_id = tracked
    path = client.download_artifacts(run_id, "defend/report.json")
    report = json.loads(Path(path).read_text())
    assert report["epsilon"] == private.epsilon
    assert report["worst_case_accuracy"] == evaluation.report.worst_case_accuracy


def test_runs_without_dp_have_no_epsilon_and_are_tagged(store):
    logger = MLFlowLogger("defend", **store)
    evaluation = RobustnessEvaluation({"pgd4": PGD(Linf(0.1), steps=2)}, curve_records=0)
    fit(logger, [evaluation], max_epochs=1)
    data = logger.experiment.get_run(logger.run_id).data
    assert "privacy/epsilon" not in data.metrics
    assert data.tags["defend.private"] == "false"
    assert "Privacy" not in data.tags["mlflow.note.content"]


def test_a_fixed_seed_is_on_the_card(store):
    logger = MLFlowLogger("defend", **store)
    private = DifferentialPrivacy(
        delta=1e-3, max_grad_norm=0.5, noise_multiplier=1.0, insecure_seed=1
    )
    fit(logger, [private], max_epochs=1)
    tags = logger.experiment.get_run(logger.run_id).data.tags
    assert tags["defend.private"] == "false"
    assert "Privacy: NONE" in tags["mlflow.note.content"]


def test_other_loggers_and_none_train_the_same(tmp_path):
    def chosen():
        return [
            AdversarialTraining(PGD(Linf(0.1), steps=2)),
            DifferentialPrivacy(
                delta=1e-3, max_grad_norm=0.5, noise_multiplier=1.0, insecure_seed=1
            ),
            RobustnessEvaluation({"pgd4": PGD(Linf(0.1), steps=4)}, curve_records=0),
        ]

    csv = CSVLogger(tmp_path)
    weights = [flat(fit(logger, chosen())[1]) for logger in (csv, None, False)]
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])
    header = Path(csv.log_dir, "metrics.csv").read_text().splitlines()[0]
    assert {"privacy/epsilon", "robust/worst_case_accuracy"} <= set(header.split(","))


def test_long_values_are_cut_here_not_in_silence_there(store):
    from defend.tracking.mlflow import RunLog

    logger = MLFlowLogger("defend", **store)
    log = RunLog(logger.experiment, logger.run_id)
    log.log_params({"long": "x" * 9000, "eps": math.inf})
    log.log_params({"eps": 3})  # a resumed run keeps its first value
    params = logger.experiment.get_run(logger.run_id).data.params
    assert len(params["defend/long"]) == 250
    assert params["defend/eps"] == "inf"
