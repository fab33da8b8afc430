"""Measured robustness: what is still right under attack."""

from defend.evaluation.curve import robustness_curve
from defend.evaluation.overfitting import OverfittingAlarm
from defend.evaluation.robustness import RobustnessMeter, RobustnessReport, evaluate

__all__ = [
    "OverfittingAlarm",
    "RobustnessMeter",
    "RobustnessReport",
    "evaluate",
    "robustness_curve",
]
