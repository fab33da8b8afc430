"""The loader of a private loop of one's own: what is stepped on must be what it gave."""

from collections import deque
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from defend.batching.digest import digest, same
from defend.errors import PrivacyError


class RecordedLoader:
    """Gives the batches of a loader, and knows later what each of them held.

    It has the loader's length and attributes. Batches of tensors and arrays, in lists, tuples,
    mappings and dataclasses, are compared by what they hold, others as objects.

    Args:
        loader: the private one.
    """

    def __init__(self, loader: DataLoader) -> None:
        self._loader = loader
        self._given: deque[list[Any]] = deque()

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        self._given.clear()
        for batch in self._loader:
            self._given.append(digest(batch))
            yield batch

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("_loader", "_given"):  # of a copy in the making
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
