"""The random numbers that user code draws in a private fit: secret, and started anew all the time.

A record's dropout mask or augmentation is drawn at its place in the batch. Were the numbers known,
leaving one record out would change those of all records after it, by a known amount, and the sum
would move by more than C. With secret numbers each record's are independent of the others', and
they may be thought of as belonging to it. One seed for a whole fit would not do: whatever calls
`seed_everything` later, an item of the data set or a callback, would make them known again.
"""

import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import get_worker_info

from defend.privacy.mechanism.generators import (
    GLOBAL,
    Generator,
    generators_in,
    put_back,
    start,
    state_of,
)

_SEARCHES = 64  # renewals between two searches, at most


class UserRandomness:
    """The generators that user code draws from: the global ones, and those that it keeps itself.

    Code that makes a generator later is looked at again at each start of an epoch and every 64
    renewals.

    Args:
        code: the objects whose code draws: data set, collate function, module, callbacks.
        skip: objects that they refer to and that are not entered, such as a trainer.

    *Guarantee.* After `renew` all of them start from OS entropy, apart from the root of masks and
    noise; what was drawn before, or seeded, says nothing about what is drawn next.

    Raises:
        PrivacyError: from `renew`, for a generator that cannot be started anew.
    """

    def __init__(self, code: Iterable[Any], skip: Iterable[Any] = ()) -> None:
        self._code, self._skip = tuple(code), tuple(skip)
        self._found: list[Generator] = []
        self._renewals = 0

    def renew(self, *, search: bool = False) -> None:
        """Start every generator from OS entropy.

        Args:
            search: whether to look for those of the user's code first, as at the start of an epoch;
                it is done now and then anyway.
        """
        rare = self._renewals & (self._renewals - 1) == 0  # 0, 1, 2, 4, 8, …
        if search or rare or self._renewals % _SEARCHES == 0:
            self._found = generators_in(self._code, self._skip)
        self._renewals += 1
        for generator in (*GLOBAL, *self._found):
            start(generator)
        if torch.cuda.is_initialized():  # never in a forked worker, which must not touch CUDA
            torch.cuda.manual_seed_all(secrets.randbits(63))

    @contextmanager
    def secret(self) -> Iterator[None]:
        """Inside, they are secret from the first number on; then they are put back."""
        before = [(g, state_of(g)) for g in (*GLOBAL, *generators_in(self._code, self._skip))]
        before_cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        try:
            self.renew()
            yield
        finally:
            for generator, state in before:
                put_back(generator, state)
            if before_cuda:
                torch.cuda.set_rng_state_all(before_cuda)


class SecretWorker:
    """A loader's worker: its `worker_init_fn` and its `collate_fn`, with secret random numbers.

    They are renewed when the worker starts, after the user's own function, and before and after
    each batch is put together.

    Args:
        init: the user's `worker_init_fn`, or None. May be pickled if that may.
        collate: the user's `collate_fn`; likewise.
    """

    def __init__(self, init: Callable[[int], Any] | None, collate: Callable[[Any], Any]) -> None:
        self.users_init, self.users_collate = init, collate
        self._randomness = UserRandomness(())

    def init(self, worker: int) -> None:
        """The user's function, and then secret numbers."""
        if self.users_init is not None:
            self.users_init(worker)
        info = get_worker_info()
        dataset = None if info is None else info.dataset
        self._randomness = UserRandomness((dataset, self.users_collate))
        self._randomness.renew()

    def collate(self, items: Any) -> Any:
        """The user's batch; the numbers of the next one are secret again."""
        self._randomness.renew()  # an item may have seeded
        batch = self.users_collate(items)
        self._randomness.renew()
        return batch
