"""A user's step on a copy of the module, from one and the same state at each call."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from defend.errors import PrivacyError
from defend.privacy.checks.constant_randomness import seeded
from defend.privacy.checks.loss_graph import leaves_of
from defend.privacy.checks.module_copy import changed, restore, state_of, trace
from defend.privacy.checks.step_under_test import StepUnderTest
from defend.privacy.gradients.per_record import PerRecordGradients
from defend.privacy.mechanism.generators import generators_in


class StepOnCopy:
    """Runs the parts of a step on a copy, and gives the gradients that come of it.

    It compares records one by one, so it holds their gradients, whatever engine trains.

    Args:
        module: the copy; hooks are installed on it, and it moves.
        step: the parts.

    Attributes:
        parameters: the trainable parameters by name, in the order of every list of gradients.
        devices: where the parameters are.
        generators: random generators that the copy and the user's other code keep.
        start: parameters and buffers as they were at first; every call begins there.

    Raises:
        PrivacyError: for layers whose per-record gradients cannot be had.
    """

    def __init__(self, module: nn.Module, step: StepUnderTest) -> None:
        self.module, self.step = module, step
        self.parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self._engine = PerRecordGradients(module, views=step.views, loss_reduction="sum")
        self.devices = sorted({p.device for p in module.parameters()}, key=str)
        self.start = state_of(module)
        self.generators = generators_in((module, *step.user_code), step.share)
        self._leaves: dict[int, Tensor] = {}  # of the last loss, without the module's

    def remove(self) -> None:
        """Take the hooks off the copy."""
        self._engine.remove()

    def seeded(self, seed: int) -> AbstractContextManager[None]:
        """Inside, every random generator starts from `seed`."""
        return seeded(seed, self.devices, self.generators)

    def attacked(self, records: list[Any]) -> Any:
        """The adversarial batch of some records; without an attack the batch itself.

        Raises:
            PrivacyError: if the attack left anything behind.
        """
        batch = self.step.collate(list(records))
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
        with self.seeded(4 + number):
            batch = self.step.collate(list(records))
            return self.step.attack_reseeded(self.module, batch, number)

    def gradients(self, batch: Any, records: int) -> list[Tensor]:
        """gᵢ of each record of a batch, `[records, *shape]` for each parameter."""
        rows = records * self.step.views
        self._restore()
        self._engine.expect(rows)
        with torch.enable_grad():
            loss = self.step.loss(self.module, batch)
            self._refuse_foreign_weights(loss)
            self.step.backward(loss * rows)
        try:
            return [g.detach().clone() for g in self._engine.read(rows)]
        finally:
            self._engine.clear()

    def seeded_gradients(self, records: list[Any], seed: int) -> list[Tensor]:
        """gᵢ of each record of a batch without an attack, the global RNGs at `seed`."""
        with self.seeded(seed):
            batch = self.step.collate(list(records))
        with self.seeded(seed):  # a fit renews all numbers before the forward, too
            return self.gradients(batch, len(records))

    def gradient_alone(self, record: Any, seed: int) -> list[Tensor]:
        """The gradient of a record in a batch of its own, by autograd and without hooks."""
        self._restore()
        with self.seeded(seed):
            batch = self.step.collate([record])
        with self.seeded(seed), self._engine.paused(), torch.enable_grad():
            # Not `autograd.grad`: reentrant checkpoints forbid it.
            self.step.backward(self.step.loss(self.module, batch))
        return [
            torch.zeros_like(p) if p.grad is None else p.grad.to_dense()
            for p in self.parameters.values()
        ]

    def _refuse_foreign_weights(self, loss: Tensor) -> None:
        """A leaf that comes back at each call, and is not the module's, was not made by the step.

        Its gradient is neither clipped nor noised.
        """
        own = {id(p) for p in self.module.parameters()}
        leaves = {id(leaf): leaf for leaf in leaves_of(loss) if id(leaf) not in own}
        before, self._leaves = self._leaves, leaves
        for key, leaf in leaves.items():
            if key in before:
                raise PrivacyError(
                    "Expected a loss of the module's own weights, got one that gives a gradient to "
                    f"a tensor of shape {tuple(leaf.shape)} outside of it, raw. Make it a part of "
                    "the module, or of no gradient: requires_grad_(False), torch.no_grad()."
                )

    def _restore(self) -> None:
        restore(self.module, self.start)
