"""Adversarial training within private steps of a loop of your own."""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from defend.batching.fields import with_field
from defend.errors import InputError
from defend.training.adversarial import AdversarialSettings, AdversarialSteps, AttackedBatch
from defend.training.host import Host
from defend.training.private import PrivateTraining


class PrivateAdversary:
    """Attacks private batches and completes their losses, on the model and on copies of it.

    A copy, on which the self-test tries the step out, is attacked at full strength whatever the
    warm-up, and is not counted.

    Args:
        settings: what to train against.

    Raises:
        InputError: for anything but settings.
        PrivacyError: for what would let one record move more than its one clip.
    """

    def __init__(self, settings: AdversarialSettings) -> None:
        if not isinstance(settings, AdversarialSettings):
            raise InputError(
                "Expected `adversarial` to be AdversarialSettings(PGD(...), objective=...), got "
                f"{settings!r}. Wrap it."
            )
        settings.refuse_beside_privacy()
        self.settings = settings
        self.steps = AdversarialSteps(settings)
        self._tried = AdversarialSteps(settings, tried=True)

    def as_taken(self, host: Host, batch: Any) -> Any:
        """The batch with its inputs in the precision that the model takes."""
        x, _ = self.steps.inputs_of(batch)
        taken = host.as_model_takes(x)
        return batch if taken is x else with_field(batch, self.settings.input_key, taken)

    def attacked(
        self,
        module: nn.Module,
        batch: Any,
        *,
        host: Host,
        private: PrivateTraining,
        epochs: float,
        anew: int | None = None,
    ) -> AttackedBatch:
        """The batch, clean and attacked: each record on its own, from secret random numbers."""
        real = module is host.bare
        x, _ = self.steps.inputs_of(batch)
        with host.autocast():
            return (self.steps if real else self._tried).attacked(
                module,
                batch,
                generator=private.attack_generator(x.device, anew=anew),
                epochs=epochs if real else math.inf,
                chunk_size=private.chunk_size,
                private=True,
                views=private.settings.views,
            )

    def loss(
        self,
        model: nn.Module,
        made: AttackedBatch | Any,
        loss: Callable[[nn.Module, Any], Tensor],
        *,
        host: Host,
        private: PrivateTraining,
    ) -> Tensor:
        """The whole mean loss over the rows of an attacked batch."""
        real = model is host.model
        steps = self.steps if real else self._tried
        if not isinstance(made, AttackedBatch):
            made = steps.unattacked(made)
        bare = host.bare if real else model
        # On a copy any direction will do for AWP; the weights' own is at hand.
        released = private.released if real else dict(bare.named_parameters())
        return steps.run(
            bare,
            made,
            lambda batch: loss(model, batch),
            precision=host.autocast,
            released=released,
        )

    @contextlib.contextmanager
    def backward(self) -> Iterator[None]:
        """Around a backward: the weights go back to where the optimizer is to move them from."""
        try:
            yield
        finally:
            self.restore_weights()

    def restore_weights(self) -> None:
        """Undo what AWP did; safe to call twice."""
        self.steps.restore_weights()
        self._tried.restore_weights()
