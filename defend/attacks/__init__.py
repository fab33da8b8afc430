"""Attacks: x_adv = attack(model, x, y), inside a ball and a box, without a trace."""

from defend.attacks.context import no_trace
from defend.attacks.pgd import PGD, Attack

__all__ = ["PGD", "Attack", "no_trace"]
