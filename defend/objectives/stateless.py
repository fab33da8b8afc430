"""Whether an objective carries something from batch to batch."""

import torch
from torch import Tensor

from defend.errors import PrivacyError
from defend.objectives.base import Objective


class StatelessCheck:
    """Holds an objective to giving the same logits the same loss, whatever it saw in between.

    What an objective kept of one batch and used in another would carry records there without
    noise: a running mean of logits, a queue of negatives. Only what shows in the loss counts;
    caches and counters are its own business.
    """

    def __init__(self) -> None:
        self._logits: tuple[Tensor, Tensor, Tensor] | None = None
        self._loss: Tensor | None = None

    def check(self, objective: Objective, clean: Tensor, adv: Tensor, y: Tensor) -> None:
        """Call it after each batch, with what its penalty came from.

        Raises:
            PrivacyError: if the loss of the first batch's logits is another one now.
        """
        if self._logits is None or self._loss is None:
            self._logits = clean.detach().clone(), adv.detach().clone(), y.detach().clone()
            self._loss = _loss(objective, *self._logits)
            return
        now = _loss(objective, *self._logits)
        if not torch.allclose(now, self._loss, rtol=1e-5, atol=1e-7, equal_nan=True):
            raise PrivacyError(
                "Expected an objective that keeps nothing of a batch, got "
                f"{type(objective).__name__}, whose loss of the same logits changed after another "
                "batch: it would carry records to other batches without noise. Compute the loss "
                "from its arguments alone."
            )


@torch.no_grad()
def _loss(objective: Objective, clean: Tensor, adv: Tensor, y: Tensor) -> Tensor:
    forked = [clean.device] if clean.device.type == "cuda" else []
    with torch.random.fork_rng(forked, device_type="cuda"):
        torch.manual_seed(0)
        return objective.penalty(clean, adv, y).clone()
