"""A user's step on a copy of the module, from one and the same state at each call."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from defend.errors import PrivacyError
from defend.privacy.checks.constant_randomness import seeded
from defend.privacy.checks.differences import mixture, worst_difference
from defend.privacy.checks.ignored_seeds import generators_made
from defend.privacy.checks.isolation import roots_of
from defend.privacy.checks.kept_state import remember
from defend.privacy.checks.loss_graph import leaves_of
from defend.privacy.checks.module_copy import changed, restore, tensors_by_name, trace
from defend.privacy.checks.step_under_test import StepUnderTest
from defend.privacy.gradients.per_record import PerRecordGradients
from defend.privacy.gradients.sums import as_real
from defend.privacy.mechanism.generators import (
    GLOBAL,
    generators_in,
    objects_in,
    same_state,
    state_of,
)


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
        start: parameters and buffers as they were at first; `batch_of` begins there each time.
        drew: whether a generator of these, a global one or a new one was drawn from or seeded.
        keeps: whether the step was seen to leave something behind, if only a count.
        draws: whether the step may draw random numbers; where it does not, none are started anew.

    Raises:
        PrivacyError: for layers whose per-record gradients cannot be had.
    """

    def __init__(self, module: nn.Module, step: StepUnderTest) -> None:
        self.module, self.step = module, step
        self.parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self._engine = self._engine_on(module)
        self.devices = sorted({p.device for p in module.parameters()}, key=str)
        self.start = tensors_by_name(module)
        roots, skip = roots_of(module, step.user_code, step.share)
        self.generators = generators_in(roots, skip)
        self._put_back = remember(objects_in(roots, skip, users_only=True))
        self.drew, self.draws, self.keeps = False, True, False
        self._seed = 0
        self._leaves: dict[int, Tensor] = {}  # of the last loss, without the module's

    def _engine_on(self, module: nn.Module) -> Any:
        return PerRecordGradients(module, views=self.step.views, loss_reduction="sum")

    def remove(self) -> None:
        """Take the hooks off the copy, and leave what the user's code keeps as it was."""
        self._put_back()
        self.step.restart(self.module)
        self._engine.remove()

    @contextmanager
    def seeded(self, seed: int) -> Iterator[None]:
        """Inside, every random generator starts from `seed`."""
        self._seed = seed
        if not self.draws:
            yield
            return
        generators = (*GLOBAL, *self.generators)
        with seeded(seed, self.devices, self.generators):
            before, made = [state_of(g) for g in generators], generators_made()
            yield
            stood = all(map(same_state, before, map(state_of, generators)))
            self.drew |= not stood or generators_made() > made

    def difference(
        self, found: list[Tensor], expected: list[Tensor], *, same_shapes: bool = False
    ) -> tuple[str, float] | None:
        """Where two gradients differ most (`worst_difference`); None if by rounding."""
        return worst_difference(
            self.parameters, found, expected, half=self.step.half, same_shapes=same_shapes
        )

    def batch_of(self, records: list[Any]) -> Any:
        """From the start again: the batch of some records, as the step gets it."""
        self.keeps |= self._put_back()
        restore(self.module, self.start)
        self.step.restart(self.module)
        return self._prepared(records)

    def attacked(self, records: list[Any]) -> Any:
        """From the start again: the adversarial batch; without an attack the batch itself.

        Raises:
            PrivacyError: if the attack left anything behind.
        """
        return self._attacked(self.batch_of(records))

    def next_attacked(self, batch: Any, load: Callable[[], list[Any]]) -> Any:
        """After the step on a batch, from the state that it left: the next one.

        Args:
            batch: of the step before, as that got it.
            load: gives the records of the next one.
        """
        return self._attacked(self._next_batch(batch, load))

    def _attacked(self, batch: Any) -> Any:
        if self.step.attack is None:
            return batch
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
        with self.seeded(4 + number):
            return self.step.attack_reseeded(self.module, self.batch_of(records), number)

    def gradients(self, batch: Any, records: int) -> list[Tensor]:
        """gᵢ of each record of the batch that was made last, `[records, *shape]` a parameter."""
        rows = records * self.step.views
        self._engine.expect(rows)
        with torch.enable_grad():
            loss = self.step.loss(self.module, batch)
            self._refuse_foreign_weights(loss)
            self.step.backward(loss * rows)
        try:
            return [g.detach().clone() for g in self._engine.read(rows)]
        finally:
            self._engine.clear()

    def gradients_in_a_row(self, records: list[Any], seed: int, steps: int) -> list[list[Tensor]]:
        """Of some steps in a row on clean rows of the same records, each from `seed`.

        Returns:
            For each step the `mixture` of the records' gradients.
        """
        found: list[list[Tensor]] = []
        batch = None
        for _ in range(steps):
            with self.seeded(seed):
                if batch is None:
                    batch = self.batch_of(records)
                else:
                    batch = self._next_batch(batch, lambda: records)
            with self.seeded(seed):
                found.append(mixture(self.gradients(batch, len(records))))
        return found

    def seeded_gradients(self, records: list[Any], seed: int) -> list[Tensor]:
        """gᵢ of each record of a batch without an attack, the global RNGs at `seed`."""
        with self.seeded(seed):
            batch = self.batch_of(records)
        with self.seeded(seed):  # a fit renews all numbers before the forward, too
            return self.gradients(batch, len(records))

    def gradient_alone(self, record: Any, seed: int) -> list[Tensor]:
        """The gradient of a record in a batch of its own, by autograd and without hooks."""
        with self.seeded(seed):
            batch = self.batch_of([record])
        with self.seeded(seed), self._engine.paused(), torch.enable_grad():
            # Not `autograd.grad`: reentrant checkpoints forbid it.
            self.step.backward(self.step.loss(self.module, batch))
            return self._plain_gradient()

    def gradient_together(self, records: list[Any], seed: int) -> list[Tensor]:
        """The gradient of the loss on one batch of some records, by autograd and without hooks."""
        with self.seeded(seed):
            batch = self.collated(records)
        with self.seeded(seed), self._engine.paused(), torch.enable_grad():
            loss = self.step.loss(self.module, batch)
            self.step.drop_gradients(self.module)
            if loss.requires_grad:
                self.step.backward(loss)
            return self._plain_gradient()

    def _plain_gradient(self) -> list[Tensor]:
        return [
            as_real(torch.zeros_like(p) if p.grad is None else p.grad.to_dense())
            for p in self.parameters.values()
        ]

    def collated(self, records: list[Any]) -> Any:
        """From the start again: one batch of some records, put together, as a step would get it."""
        return self.batch_of(records)

    def _next_batch(self, batch: Any, load: Callable[[], list[Any]]) -> Any:
        """After the hooks that follow the step on a batch: the next one."""
        for p in self.parameters.values():
            p.grad = torch.zeros_like(p)  # a release would be here, not the records' own
        self.step.finish(self.module, batch)
        for p in self.parameters.values():
            p.grad = None
        return self._prepared(load())

    def _prepared(self, records: list[Any]) -> Any:
        return self.step.prepare(self.module, self.step.collate(list(records)))

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
