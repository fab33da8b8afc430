"""The share of one process in a step that several take together."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from defend.errors import PrivacyError


class Shard(NamedTuple):
    """One process among all.

    Attributes:
        rank: this process, from 0.
        world_size: all processes.
    """

    rank: int = 0
    world_size: int = 1


def sum_over_processes(sums: list[Tensor], error: Exception | None) -> list[Tensor]:
    """The sums over all processes, in one message; an error on one is an error on all.

    A process that failed (a full disk under the ledger) takes part with zeros, so that the others
    do not wait for it, and tells them by one more number.
    """
    failed = sums[0].new_tensor(0.0 if error is None else 1.0)
    flat = torch.cat([s.flatten() for s in (*sums, failed)])
    if error is not None:
        flat[:-1] = 0
    dist.all_reduce(flat)
    if error is not None:
        raise error
    if flat[-1] > 0:
        raise PrivacyError(
            "Expected every process to account for the step, got an error on another one. See its "
            "message; nothing was released."
        )
    parts = flat[:-1].split([s.numel() for s in sums])
    return [part.view_as(s) for part, s in zip(parts, sums, strict=True)]
