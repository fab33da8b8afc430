"""On a GPU: one step of an attack, captured once as a CUDA graph and replayed."""

from defend.attacks.cuda_graphs.cache import may_capture, replay_steps

__all__ = ["may_capture", "replay_steps"]
