"""A training step as the self-test tries it out: the same step, on copies of the module."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from defend.privacy.checks.step_under_test import StepUnderTest
from defend.training.outputs import loss_of
from defend.training.runtime import CopyRuntime
from defend.training.step import TrainingStep


def step_under_test(
    step: TrainingStep, collate: Callable[[list[Any]], Any], **settings: Any
) -> StepUnderTest:
    """The step, with the module left open; attacks are at full strength and not counted.

    Args:
        step: of a private training.
        collate: items of the data set → batch.
        settings: further fields of `StepUnderTest`.
    """
    tried = _Tried(step)
    user_code = step.runtime.user_code()
    if step.data is not None:
        user_code.append(step.data.original.collate_fn)
    if tried.adversarial is not None:
        user_code.append(tried.adversarial.attack.source)
    return StepUnderTest(
        loss=tried.loss,
        collate=collate,
        restart=step.runtime.restart_on,
        prepare=tried.silently(step.runtime.prepare_on),
        transfer=tried.silently(step.runtime.transfer_on),
        finish=tried.silently(step.runtime.finish_on),
        reads_clock=step.runtime.reads_clock,
        attack=None if tried.adversarial is None else tried.attack,
        attack_reseeded=None if tried.adversarial is None else tried.attack,
        drop_gradients=step.runtime.drop_gradients,
        backward=tried.on(step.runtime.module).backward,  # asks no module
        user_code=user_code,
        **settings,
    )


class _Tried:
    """The parts of a step, on a module that is given."""

    def __init__(self, step: TrainingStep) -> None:
        self._step = step
        self.adversarial = None if step.adversarial is None else step.adversarial.for_dry_run()

    def on(self, module: nn.Module) -> TrainingStep:
        """The step on a copy of the module."""
        return TrainingStep(
            CopyRuntime(self._step.runtime, module), self.adversarial, self._step.data
        )

    def silently(self, run: Callable[[nn.Module, Any], Any]) -> Callable[[nn.Module, Any], Any]:
        """The same, and what it logs goes nowhere."""

        def silent(module: nn.Module, batch: Any) -> Any:
            with self._step.runtime.silenced():
                return run(module, batch)

        return silent

    def attack(self, module: nn.Module, batch: Any, number: int | None = None) -> Any:
        """The adversarial batch."""
        with self._step.runtime.silenced():
            return self.on(module).attack(batch, number=number)

    def loss(self, module: nn.Module, batch: Any) -> Tensor:
        """The loss; of a record that is alone and gives none, zero."""
        data = self._step.data
        with self._step.runtime.silenced():
            output = self.on(module).forward(batch)
        skips = output is None and data is not None and data.isolated
        return torch.zeros(()) if skips else loss_of(output)
