"""Lightning callbacks: thin shells around the floors below."""

from defend.callbacks.adversarial import AdversarialTraining
from defend.callbacks.privacy import DifferentialPrivacy
from defend.callbacks.robustness import RobustnessEvaluation

__all__ = ["AdversarialTraining", "DifferentialPrivacy", "RobustnessEvaluation"]
