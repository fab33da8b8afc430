"""The processes of a distributed run, as far as DP-SGD has to know them."""

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from defend.errors import PrivacyError


def _alone(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class Processes:
    """Where this process stands among all.

    Attributes:
        rank: this process, from 0.
        world_size: how many there are.
        broadcast: gives every process what rank 0 passes; called by all at once.
    """

    rank: int = 0
    world_size: int = 1
    broadcast: Callable[[Any], Any] = _alone

    def agree(self, value: Any) -> bool:
        """Whether all processes pass the same value; called by all at once."""
        if self.world_size == 1:
            return True
        found = [None] * self.world_size
        dist.all_gather_object(found, value)
        return all(other == found[0] for other in found)

    @classmethod
    def current(cls) -> "Processes":
        """Those of `torch.distributed`, if it was initialized (by torchrun, say)."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size(), _broadcast)

    def from_first(self, compute: Callable[[], Any]) -> Any:
        """What `compute` gives on rank 0, on every rank; an error there is raised on all.

        Args:
            compute: called on rank 0 alone; what it returns has to survive pickling.
        """
        value: Any = None
        error: Exception | None = None
        if self.rank == 0:
            try:
                value = compute()
            except Exception as caught:
                error = caught
        value, told = self.broadcast((value, _picklable(error)))
        if told is not None:
            raise told if error is None else error
        return value


def _picklable(error: Exception | None) -> Exception | None:
    """The error as other processes can take it up: one that cannot travel would leave them waiting.

    Many errors with arguments of their own can be pickled, but not back.
    """
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return PrivacyError(f"Expected rank 0 to succeed, got {type(error).__name__}: {error}")
    return error


def _broadcast(value: Any) -> Any:
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def collectives() -> int:
    """How many operations of all processes this one has begun; 0 where it is alone."""
    if not dist.is_available() or not dist.is_initialized():
        return 0
    group: Any = dist.group.WORLD
    return int(group._get_sequence_number_for_group())
