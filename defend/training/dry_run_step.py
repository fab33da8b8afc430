"""A training step as the self-test tries it out: the same step, on copies of the module."""

from collections.abc import Callable
from typing import Any

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
    adversarial = None if step.adversarial is None else step.adversarial.for_dry_run()
    user_code = step.runtime.user_code()
    if step.data is not None:
        user_code.append(step.data.original.collate_fn)
    if adversarial is not None:
        user_code.append(adversarial.attack.source)

    def on(module: nn.Module) -> TrainingStep:
        return TrainingStep(CopyRuntime(step.runtime, module), adversarial, step.data)

    def prepare(module: nn.Module, batch: Any) -> Any:
        with step.runtime.silenced():
            return step.runtime.prepare_on(module, batch)

    def finish(module: nn.Module, batch: Any) -> None:
        with step.runtime.silenced():
            step.runtime.finish_on(module, batch)

    def attack(module: nn.Module, batch: Any, number: int | None = None) -> Any:
        with step.runtime.silenced():
            return on(module).attack(batch, number=number)

    def loss(module: nn.Module, batch: Any) -> Tensor:
        with step.runtime.silenced():
            return loss_of(on(module).forward(batch))

    return StepUnderTest(
        loss=loss,
        collate=collate,
        restart=step.runtime.restart_on,
        prepare=prepare,
        finish=finish,
        reads_clock=step.runtime.reads_clock,
        attack=None if adversarial is None else attack,
        attack_reseeded=None if adversarial is None else attack,
        backward=on(step.runtime.module).backward,  # asks no module
        user_code=user_code,
        **settings,
    )
