"""Attacks: x_adv = attack(model, x, y), inside a ball and a box, without a trace."""

from defend.attacks.attack import Attack
from defend.attacks.context import no_trace
from defend.attacks.free import Free
from defend.attacks.pgd import PGD
from defend.attacks.presets import fgsm_rs, n_fgsm
from defend.attacks.result import AttackResult
from defend.attacks.torchattacks.adapter import TorchAttack

__all__ = [
    "PGD",
    "Attack",
    "AttackResult",
    "Free",
    "TorchAttack",
    "fgsm_rs",
    "n_fgsm",
    "no_trace",
]
