"""DP-SGD in any training loop: the core that Lightning's callback and plain loops share."""

from defend.training.loop import PrivateLoop, make_private

__all__ = ["PrivateLoop", "make_private"]
