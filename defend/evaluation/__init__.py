"""Measured robustness: what is still right under attack."""

from defend.evaluation.robustness import (
    RobustnessMeter,
    RobustnessReport,
    evaluate,
    robustness_curve,
)

__all__ = ["RobustnessMeter", "RobustnessReport", "evaluate", "robustness_curve"]
