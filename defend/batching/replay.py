"""The same batch several times in a row."""

from collections.abc import Iterable, Iterator
from typing import Any

from defend.errors import InputError


class Replayed:
    """A loader that yields each batch of another one `times` times in a row.

    The same object comes each time, so what takes a batch must not write to it. Everything but
    iteration and length is the loader's own: samplers, data set, worker settings, state. Whoever
    looks for a sampler to set an epoch on, or workers to stop, finds them.

    Args:
        loader: any iterable of batches.
        times: how often each batch is yielded, ≥ 1.

    Raises:
        InputError: if `times` is not an integer ≥ 1.
    """

    _OWN = frozenset({"loader", "times"})

    def __init__(self, loader: Iterable[Any], times: int) -> None:
        if not isinstance(times, int) or isinstance(times, bool) or times < 1:
            raise InputError(f"Expected `times` to be an integer ≥ 1, got {times!r}.")
        self.loader = loader
        self.times = times

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            for _ in range(self.times):
                yield batch

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
