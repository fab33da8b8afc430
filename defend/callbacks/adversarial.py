"""Adversarial training of an unmodified LightningModule."""

from typing import Any

import lightning.pytorch as pl
import torch

from defend.attacks.pgd import Attack
from defend.batching.chunks import check_chunk_size
from defend.batching.fields import get_field, with_field
from defend.callbacks._base import DefendCallback, describe_attack
from defend.callbacks._seams import Seams
from defend.errors import InputError


class AdversarialTraining(DefendCallback):
    r"""Train on the worst inputs that an attacker can find: min_θ E[max_δ loss(x + δ, y; θ)].

    The inner maximum is `attack`, run on each training batch just before the step; the outer
    minimum is the user's own `training_step`, which sees the adversarial batch in place of the
    clean one (Madry et al. 2018, arXiv 1706.06083). No line of the module changes. Works with
    automatic and manual optimization, gradient accumulation, mixed precision and DDP.

    The attack calls the module's `forward`, which must return logits (or an object with
    `logits`), in eval mode and under the trainer's precision. Its random starts come from a
    generator of its own, seeded from `seed_everything` and kept in the checkpoint, so that a
    resumed run continues as the uninterrupted one would. Under `DifferentialPrivacy` they are
    secret and new at each run: were they known, leaving one record out would change the starts of
    all records after it, and with them the clipped sum by more than C.

    Args:
        attack: what to train against, for example `PGD(Linf(8 / 255), steps=10)`.
        input_key: where the inputs are in a batch: a position in a list or tuple, a name in a
            dict, either in a namedtuple or dataclass.
        target_key: likewise for the targets.
        chunk_size: most rows attacked at once. "auto": the whole batch, or the private chunk
            under `DifferentialPrivacy`. Does not change the result.

    Raises:
        InputError: at the first step, if the batch has no such fields or its inputs lie outside
            the attack's `InputSpace`.
    """

    def __init__(
        self,
        attack: Attack,
        *,
        input_key: int | str = 0,
        target_key: int | str = 1,
        chunk_size: int | str | None = "auto",
    ) -> None:
        super().__init__()
        if not callable(attack):
            raise InputError(
                f"Expected `attack` to be an attack such as PGD(Linf(8 / 255)), got {attack!r}."
            )
        check_chunk_size(chunk_size)
        self.attack = attack
        self.input_key = input_key
        self.target_key = target_key
        self.chunk_size = chunk_size
        self._seed: int | None = None
        self._trainer: pl.Trainer | None = None
        self._seams: Seams | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        seams = Seams.of(trainer)
        if seams.adversary not in (None, self):
            raise InputError("Expected one AdversarialTraining callback, got two.")
        seams.adversary = self
        self._trainer, self._seams = trainer, seams
        if self._seed is None:
            # Read, not drawn: the global RNG stays where it is.
            self._seed = torch.initial_seed() % 2**62

    def transform(self, batch: Any, module: torch.nn.Module) -> Any:
        """The batch with its inputs replaced by adversarial ones; the batch itself is untouched."""
        trainer, seams = self._trainer, self._seams
        assert trainer is not None
        assert seams is not None
        x, y = get_field(batch, self.input_key), get_field(batch, self.target_key)
        if not isinstance(x, torch.Tensor) or not isinstance(y, torch.Tensor):
            raise InputError(
                f"Expected tensors at input_key={self.input_key!r} and "
                f"target_key={self.target_key!r}, got {type(x).__name__} and {type(y).__name__}."
            )
        if seams.private is None:
            generator, chunk_size = self._generator(trainer, x.device), None
        else:
            generator = seams.private.attack_generator(x.device)
            chunk_size = seams.private.step_chunk_size
        size = chunk_size if self.chunk_size == "auto" else self.chunk_size
        with trainer.precision_plugin.forward_context():
            x_adv = self.attack(
                module,
                x,
                y,
                generator=generator,
                chunk_size=size,  # type: ignore[arg-type]
            )
        return with_field(batch, self.input_key, x_adv)

    def _generator(self, trainer: pl.Trainer, device: torch.device) -> torch.Generator:
        """A generator for this batch, on this rank: equal on resume, different everywhere else."""
        assert self._seed is not None
        batches = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        key = hash((self._seed, trainer.global_rank, batches)) % 2**62
        return torch.Generator(device=device).manual_seed(key)

    def settings(self) -> dict[str, Any]:
        return {"adversarial_training": True, **describe_attack(self.attack)}

    def state_dict(self) -> dict[str, Any]:
        return {"seed": self._seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._seed = state_dict["seed"]

    def clean_up(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._trainer = self._seams = None
