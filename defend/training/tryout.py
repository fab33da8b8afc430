"""The user's own step on records of the user's own data: before step 0, and again now and then."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader

from defend.batching.memory import free_bytes
from defend.privacy.checks.constant_randomness import seeded
from defend.privacy.checks.module_copy import tensors_of
from defend.privacy.checks.probe_records import probe_positions
from defend.privacy.checks.probed_step import Anew, Attack, Backward, Loss
from defend.privacy.checks.selftest import RECORDS, SelfTest, selftest
from defend.training.measure import peak_bytes


def _as_it_is(batch: Any) -> Any:
    return batch


def _unseen(turn: int) -> None:
    """Nobody waits for a look."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A training step, in the parts in which it is tried out.

    Attributes:
        loss: (module, batch) → mean loss over the rows, as training computes it.
        transfer: collated batch → batch on the device, as training sees it.
        attack: (module, batch) → adversarial batch, or None.
        attack_anew: (module, batch, number) → the same from other secret numbers.
        backward: takes a loss through its backward, and undoes what the loss did to the weights.
        half: whether the step computes in half precision.
        share: objects that the module may refer to and that are not to be copied with it.
        on_look: called with 0, 1, 2, … before each look.
    """

    loss: Loss
    transfer: Callable[[Any], Any] = _as_it_is
    attack: Attack | None = None
    attack_anew: Anew | None = None
    backward: Backward = Tensor.backward
    half: bool = False
    share: Sequence[Any] = ()
    on_look: Callable[[int], None] = _unseen


class TryOut:
    """Runs the self-test, and measures the memory of a step, on a copy of the module.

    Args:
        module: the model itself.
        loader: the user's own training loader.
        trial: its step.
        max_grad_norm: C.
        views: rows of a record.

    Attributes:
        records: records that are tried; all but one of them are in the batch at once.
    """

    def __init__(
        self,
        module: nn.Module,
        loader: DataLoader,
        trial: Trial,
        *,
        max_grad_norm: float,
        views: int,
    ) -> None:
        self.module, self.loader, self.trial = module, loader, trial
        self.max_grad_norm, self.views = max_grad_norm, views
        self.records = RECORDS
        self._looks = 0

    def selftest(self, rows: int | None = None) -> SelfTest | None:
        """The self-test: whole the first time, in short and on other records after that.

        Args:
            rows: rows of an ordinary chunk.

        Returns:
            None for a data set of fewer than three records: too few to mix.
        """
        trial, turn, self._looks = self.trial, self._looks, self._looks + 1
        trial.on_look(turn)
        records = self._records(turn)
        if len(records) < 3:
            return None
        return selftest(
            self.module,
            records,
            loss=trial.loss,
            collate=self._collate,
            attack=trial.attack,
            attack_anew=trial.attack_anew,
            backward=trial.backward,
            views=self.views,
            max_grad_norm=self.max_grad_norm,
            half=trial.half,
            rows=rows,
            turn=turn,
            share=trial.share,
        )

    def peak_bytes(self, rows: int) -> int:
        """Most bytes that a private step on `rows` rows allocates; on a GPU only."""
        trial, count = self.trial, -(-rows // self.views)
        records = list(itertools.islice(itertools.cycle(self._records(0)), count))
        return peak_bytes(
            self.module,
            trial.loss,
            self._collate(records),
            rows=count * self.views,
            views=self.views,
            backward=trial.backward,
            share=trial.share,
        )

    def views_are_alike(self) -> bool:
        """Whether the views of a record are the same rows: K times the work for nothing."""
        rows = tensors_of(self._collate(self._records(0)[:1]))
        return not any(bool((t != t[:1]).any()) for t in rows if t.ndim and len(t) == self.views)

    def free_bytes(self) -> int:
        """Bytes that are left; on a GPU only."""
        return free_bytes(next(self.module.parameters()).device)

    def _records(self, turn: int) -> list[list[Any]]:
        """Records, each as the items that the loader gives for it, one a view."""
        dataset = self.loader.dataset
        with seeded(turn, ()):
            positions = probe_positions(dataset, self.records, turn)
            return [[dataset[i] for _ in range(self.views)] for i in positions]

    def _collate(self, records: list[list[Any]]) -> Any:
        items = [item for record in records for item in record]
        return self.trial.transfer(self.loader.collate_fn(items))


def is_due(step: int, epoch: int, *, first_of_epoch: bool) -> bool:
    """Whether to look again: a step may behave one way on its first batch and another later.

    At steps 4, 16, 64, …, and at the start of the second, fifth, 17th, … epoch: warm-ups and late
    starts of any length are found before they went on for long, at a cost that fades.

    Args:
        step: steps of this fit so far.
        epoch: epochs of this fit that are over.
        first_of_epoch: whether the next step is the first of its epoch.
    """
    return (step >= 4 and _is_power_of_four(step)) or (first_of_epoch and _is_power_of_four(epoch))


def _is_power_of_four(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0 and n.bit_length() % 2 == 1
