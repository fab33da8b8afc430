"""A user's step on a copy of the module, one record at a time."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from defend.batching.records import RecordBatches
from defend.privacy.checks.constant_randomness import seeded
from defend.privacy.checks.isolation import Isolation
from defend.privacy.checks.step_on_copy import StepOnCopy
from defend.privacy.checks.step_under_test import StepUnderTest
from defend.privacy.gradients.one_record import OneRecord


class RecordsOnCopy(StepOnCopy):
    """The same as `StepOnCopy`, with a batch of its own for each record, as `OneRecord` trains.

    Each record draws the same numbers from `seeded`, wherever it stands, so that its gradient is
    to be the same, whatever ran before it.

    Attributes:
        trains: whether the loss of any record had a gradient.
    """

    def __init__(self, module: nn.Module, step: StepUnderTest) -> None:
        super().__init__(module, step)
        self._isolation = Isolation(module, step.user_code, step.share)
        self.trains = False

    def _engine_on(self, module: nn.Module) -> Any:
        return OneRecord(module, views=self.step.views, loss_reduction="sum")

    def _seeded_again(self) -> AbstractContextManager[None]:
        return seeded(self._seed, self.devices, self.generators)

    def _prepared(self, records: list[Any]) -> Any:
        batches = RecordBatches()
        for record in records:
            with self._seeded_again():
                batches.append(self.step.collate([record]))
        return self.step.prepare(self.module, batches)

    def collated(self, records: list[Any]) -> Any:
        self.batch_of([])
        return self.step.prepare(self.module, self.step.collate(list(records)))

    def attacked(self, records: list[Any]) -> Any:
        """The records' batches; each is attacked in its turn."""
        return self.batch_of(records)

    def next_attacked(self, batch: Any, load: Any) -> Any:
        return self._next_batch(batch, load)

    def gradients(self, batch: Any, records: int) -> list[Tensor]:
        """gᵢ of each record, `[records, *shape]` a parameter."""
        found = []
        self._isolation.begin()
        for record in batch:
            self._isolation.next_record()
            with self._seeded_again():
                found.append(self._gradient_of(record))
        return [torch.stack(parts) for parts in zip(*found, strict=True)]

    def gradient_alone(self, record: Any, seed: int) -> list[Tensor]:
        """The gradient of a record that is the only one."""
        return [g[0] for g in self.seeded_gradients([record], seed)]

    def _gradient_of(self, record: Any) -> list[Tensor]:
        batch = self._attacked(self.step.transfer(self.module, record))
        self._engine.clear()
        with torch.enable_grad():
            loss = self.step.loss(self.module, batch)
            self.step.drop_gradients(self.module)
            self.trains |= loss.requires_grad
            if loss.requires_grad:
                self._refuse_foreign_weights(loss)
                self.step.backward(loss * self.step.views)
        try:
            return [g.clone() for g in self._engine.read()]
        finally:
            self._engine.clear()
