"""Any attack of torchattacks, made safe to train and to evaluate with."""

from defend.attacks.torchattacks.adapter import TorchAttack

__all__ = ["TorchAttack"]
