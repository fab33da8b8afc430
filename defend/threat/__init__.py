"""What an attacker may do: norm balls, and the box that legal inputs live in."""

from defend.threat.balls import L2, Ball, Linf
from defend.threat.inputs import InputSpace

__all__ = ["L2", "Ball", "InputSpace", "Linf"]
