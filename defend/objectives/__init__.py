"""Objectives of adversarial training: what the attack increases, what the training decreases."""

from defend.objectives.awp import AWP
from defend.objectives.base import Objective
from defend.objectives.madry import Madry
from defend.objectives.mart import MART
from defend.objectives.trades import TRADES

__all__ = ["AWP", "MART", "TRADES", "Madry", "Objective"]
