"""The loader of a private loop of one's own: what is stepped on must be what it gave."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from torch.utils.data import DataLoader

from defend.batching.digest import digest, same
from defend.errors import PrivacyError

_END = object()
_OWN = ("_loader", "_given", "_loading", "_on_end")


class RecordedLoader:
    """Gives the batches of a loader, and knows later what each of them held.

    It has the loader's length and attributes. Batches of tensors and arrays, in lists, tuples,
    mappings and dataclasses, are compared by what they hold, others as objects.

    Args:
        loader: the private one.
        loading: gives what is entered while a batch is loaded.
        on_end: called where a pass over it ends, wherever the loop leaves it.
    """

    def __init__(
        self,
        loader: DataLoader,
        loading: Callable[[], AbstractContextManager[None]],
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        self._loader, self._loading, self._on_end = loader, loading, on_end
        self._given: deque[list[Any]] = deque()

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        self._given.clear()
        batches = iter(self._loader)
        try:
            while (batch := self._next(batches)) is not _END:
                self._given.append(digest(batch))
                yield batch
        finally:  # at a `break`, too
            self._on_end()

    def _next(self, batches: Iterator[Any]) -> Any:
        with self._loading():
            return next(batches, _END)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in _OWN:  # of a copy in the making
            raise AttributeError(name)
        return getattr(self._loader, name)

    def check(self, batch: Any) -> None:
        """Refuse a batch that is not the next one as it was given.

        Raises:
            PrivacyError: if it was changed.
        """
        given = self._given.popleft() if self._given else None
        if given is None and not self._loader.batch_sampler.drawn:  # type: ignore[union-attr]
            return  # no batch was drawn at all: the step says so
        if given is None or not same(given, digest(batch)):
            raise PrivacyError(
                "Expected the batch as the private loader gave it, got another, or one that was "
                "changed before `step`, where nobody can try out what is done to it. Do it in the "
                "data set, in the collate function or in `loss`; to train on adversarial inputs "
                "pass `adversarial=`."
            )
