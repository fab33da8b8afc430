"""Adversarial training and DP-SGD in any loop: what Lightning's callbacks and plain loops share."""

from defend.training.adversarial_loop import AdversarialLoop, make_adversarial
from defend.training.config import Adversarial, Privacy
from defend.training.private_loop import PrivateLoop, make_private

__all__ = [
    "Adversarial",
    "AdversarialLoop",
    "Privacy",
    "PrivateLoop",
    "make_adversarial",
    "make_private",
]
