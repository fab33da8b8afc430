"""A user's step on a copy of the module, from one and the same state at each call."""

from typing import Any

import torch
from torch import Tensor, nn

from defend.errors import PrivacyError
from defend.privacy.checks.constant_randomness import seeded
from defend.privacy.checks.module_copy import changed, generators_of, restore, state_of, trace
from defend.privacy.checks.step_under_test import StepUnderTest
from defend.privacy.gradients.per_record import PerRecordGradients


class StepOnCopy:
    """Runs the parts of a step on a copy, and gives the gradients that come of it.

    It compares records one by one, so it holds their gradients, whatever engine trains.

    Args:
        module: the copy; hooks are installed on it, and it moves.
        step: the parts.

    Attributes:
        parameters: the trainable parameters by name, in the order of every list of gradients.
        devices: where the parameters are.
        start: parameters and buffers as they were at first; every call begins there.

    Raises:
        PrivacyError: for layers whose per-record gradients cannot be had.
    """

    def __init__(self, module: nn.Module, step: StepUnderTest) -> None:
        self.module, self.step = module, step
        self.parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self.devices = sorted({p.device for p in module.parameters()}, key=str)
        self.start, self._generators = state_of(module), generators_of(module)
        self._engine = PerRecordGradients(module, views=step.views, loss_reduction="sum")

    def remove(self) -> None:
        """Take the hooks off the copy."""
        self._engine.remove()

    def attacked(self, batch: Any) -> Any:
        """The adversarial batch; without an attack the batch itself.

        Raises:
            PrivacyError: if the attack left anything behind.
        """
        if self.step.attack is None:
            return batch
        self._restore()
        before = trace(self.module, self.devices, self._engine)
        batch = self.step.attack(self.module, batch)
        left = changed(before, trace(self.module, self.devices, self._engine))
        if left is not None:
            raise PrivacyError(
                f"Expected an attack that leaves no trace on the module, got a changed {left}. "
                "Run it in `defend.attacks.no_trace`, or restore what it changes."
            )
        return batch

    def attacked_reseeded(self, records: list[Any], number: int) -> Any:
        """The adversarial batch from other secret numbers, and other global ones."""
        assert self.step.attack_reseeded is not None
        self._restore()
        with seeded(4 + number, self.devices):
            batch = self.step.collate(list(records))
            return self.step.attack_reseeded(self.module, batch, number)

    def gradients(self, batch: Any, records: int) -> list[Tensor]:
        """gᵢ of each record of a batch, `[records, *shape]` for each parameter."""
        rows = records * self.step.views
        self._restore()
        self._engine.expect(rows)
        with torch.enable_grad():
            self.step.backward(self.step.loss(self.module, batch) * rows)
        try:
            return [g.detach().clone() for g in self._engine.read(rows)]
        finally:
            self._engine.clear()

    def seeded_gradients(self, records: list[Any], seed: int) -> list[Tensor]:
        """gᵢ of each record of a batch without an attack, the global RNGs at `seed`."""
        with seeded(seed, self.devices):
            return self.gradients(self.step.collate(list(records)), len(records))

    def gradient_alone(self, record: Any, seed: int) -> list[Tensor]:
        """The gradient of a record in a batch of its own, by autograd and without hooks."""
        self._restore()
        with seeded(seed, self.devices), self._engine.paused(), torch.enable_grad():
            # Not `autograd.grad`: reentrant checkpoints forbid it.
            self.step.backward(self.step.loss(self.module, self.step.collate([record])))
        return [
            torch.zeros_like(p) if p.grad is None else p.grad.to_dense()
            for p in self.parameters.values()
        ]

    def _restore(self) -> None:
        restore(self.module, self.start, self._generators)
