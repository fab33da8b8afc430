"""Adversarial training and DP-SGD in any loop: what Lightning's callbacks and plain loops share."""

from defend.training.adversarial_loop import AdversarialLoop, make_adversarial
from defend.training.adversarial_settings import AdversarialSettings
from defend.training.loop import PrivateLoop, make_private

__all__ = [
    "AdversarialLoop",
    "AdversarialSettings",
    "PrivateLoop",
    "make_adversarial",
    "make_private",
]
