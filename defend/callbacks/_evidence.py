"""Hand what the callbacks gathered to MLflow, where the trainer logs to MLflow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from defend.callbacks._lightning import is_made_from
from defend.tracking.card import render_card
from defend.tracking.mlflow import RunLog

if TYPE_CHECKING:
    import lightning.pytorch as pl


def run_logs(trainer: pl.Trainer) -> list[RunLog]:
    """The MLflow runs that the trainer logs to; none with other loggers, or without one."""
    loggers: list[Any] = [x for x in trainer.loggers if is_made_from(x, "MLFlowLogger")]
    return [RunLog(logger.experiment, str(logger.run_id)) for logger in loggers]


def tag_private(trainer: pl.Trainer, settings: dict[str, Any]) -> None:
    """The tag `defend.private`, which a finding in the middle of a fit changes."""
    for run in run_logs(trainer):
        run.set_tag("defend.private", str(bool(settings.get("private", False))).lower())


def log_settings(trainer: pl.Trainer, settings: dict[str, Any]) -> None:
    """Parameters, and the tag `defend.private`."""
    for run in run_logs(trainer):
        run.log_params(settings)
    tag_private(trainer, settings)


def log_card(trainer: pl.Trainer, settings: dict[str, Any], results: dict[str, Any]) -> None:
    """The card as an artifact and as the run's description; report and curve beside it."""
    for run in run_logs(trainer):
        run.log_card(render_card(settings, results))
        if results:
            run.log_report(results)
        unnoised = results.get("unnoised_metrics")
        if unnoised is not None:
            names = unnoised if isinstance(unnoised, str) else ", ".join(unnoised)
            run.set_tag("defend.unnoised_metrics", names or "none")
        for ball, curve in results.get("curves", {}).items():
            run.log_curve(ball, curve)
