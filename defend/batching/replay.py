"""The same batch several times in a row."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from defend.errors import InputError


class Replayed:
    """A loader that yields each batch of another one `times` times in a row.

    The same object comes each time, so what takes a batch must not write to it: a hook that scales
    it in place would scale it `times` times. Everything but iteration and length is the loader's
    own: samplers, data set, worker settings, state. Whoever looks for a sampler to set an epoch on,
    or workers to stop, finds them.

    Args:
        loader: any iterable of batches.
        times: how often each batch is yielded, ≥ 1.

    Raises:
        InputError: if `times` is not an integer ≥ 1; while it is iterated, if a batch was written
            to between two of its replays.
    """

    _OWN = frozenset({"loader", "times"})

    def __init__(self, loader: Iterable[Any], times: int) -> None:
        if not isinstance(times, int) or isinstance(times, bool) or times < 1:
            raise InputError(f"Expected `times` to be an integer ≥ 1, got {times!r}.")
        self.loader = loader
        self.times = times

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            before = _state(batch)
            for _ in range(self.times):
                yield batch
                if self.times > 1 and not _same(_state(batch), before):
                    raise InputError(
                        "Expected a batch that is replayed to stay as it is, got one that was "
                        "written to: each replay would change it once more. Change a copy in your "
                        "batch hooks and your training step, as x = x * 2 does and x.mul_(2) does "
                        "not."
                    )

    def __len__(self) -> int:
        """Batches in all; a TypeError where the loader has no length."""
        return self.times * len(self.loader)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        # Only for what is not found here. Copying and unpickling ask before there is a loader.
        if name in self._OWN or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.loader, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._OWN:
            super().__setattr__(name, value)
        else:
            setattr(self.loader, name, value)


def _state(batch: Any) -> list[tuple[Tensor, int]]:
    """The tensors in a batch, with how often each was written to."""
    if isinstance(batch, Tensor):
        return [(batch, 0 if batch.is_inference() else batch._version)]
    if isinstance(batch, Mapping):
        parts = list(batch.values())
    elif isinstance(batch, list | tuple):
        parts = list(batch)
    elif dataclasses.is_dataclass(batch):
        parts = list(vars(batch).values())
    else:
        parts = []
    return [pair for part in parts for pair in _state(part)]


def _same(now: list[tuple[Tensor, int]], before: list[tuple[Tensor, int]]) -> bool:
    return len(now) == len(before) and all(
        tensor is earlier and version == then
        for (tensor, version), (earlier, then) in zip(now, before, strict=True)
    )
