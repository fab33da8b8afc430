"""What an attacker may do: norm balls, and the box that legal inputs live in."""

from defend.threat.balls import L2, Ball, Linf
from defend.threat.inputs import InputSpace
from defend.threat.l1 import L1
from defend.threat.region import Region

__all__ = ["L1", "L2", "Ball", "InputSpace", "Linf", "Region"]
