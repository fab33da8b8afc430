"""Adversarial training, step by step: what every kind of loop shares."""

import contextlib
import dataclasses
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from defend.attacks.attack import Attack
from defend.attacks.context import logits_of
from defend.attacks.free import Free
from defend.attacks.pgd import PGD
from defend.batching.fields import get_field, with_field
from defend.errors import InputError
from defend.objectives import AWP
from defend.objectives.awp import PerturbedWeights, perturbation_along, weight_perturbation
from defend.objectives.stateless import Memoryless
from defend.training.adversarial_settings import AdversarialSettings, radius_of
from defend.training.foreign import run_foreign
from defend.training.kept_logits import KeepLogits
from defend.training.tally import Tally

__all__ = ["AdversarialSettings", "AdversarialSteps", "AttackedBatch"]

Context = Callable[[], contextlib.AbstractContextManager[Any]]


@dataclasses.dataclass(frozen=True)
class AttackedBatch:
    """One batch, clean and attacked.

    Attributes:
        batch: what the training step is to see.
        x: its clean inputs.
        x_adv: its adversarial ones.
        y: its targets.
    """

    batch: Any
    x: Tensor
    x_adv: Tensor
    y: Tensor


class AdversarialSteps:
    """Attacks batches and completes the loss of the training step that follows.

    For each batch, in this order, with the forwards that each takes:

        made = steps.attacked(module, batch, ...)     # the attack's: eval mode, without a trace
        with steps.step(module, made):                # AWP's, clean first; buffers are put back
            loss = ...                                # the user's own, on made.batch
        penalty = steps.penalty(module, made)         # TRADES, MART: the other batch
        (loss + penalty).backward()                   # without the penalty where it is None
        steps.after_backward()                        # weights back, before the optimizer's step

    `run` is all from `step` to `penalty`.

    The last two kinds of forward run in the module's own mode: BatchNorm sees the batch of the
    user's forward first, then the other one, and each has a dropout mask of its own.

    Args:
        settings: what is asked for.
        tried: whether they only try a private step out, on copies of the module. The objective is
            then held to keeping nothing from batch to batch.

    Attributes:
        settings: what was asked for.
        attack: what is used now; the alarm may have switched it.
        tally: input gradients computed, and those that were of no use.
    """

    def __init__(self, settings: AdversarialSettings, *, tried: bool = False) -> None:
        self.settings = settings
        self._memoryless = Memoryless() if tried else None
        self.switch(settings.training_attack())
        self._weights: PerturbedWeights | None = None
        self._own: list[tuple[Tensor, int]] = []
        self.tally = Tally()

    # --- before the training step -----------------------------------------------------------------

    def inputs_of(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a batch.

        Raises:
            InputError: if they are not there, or no tensors.
        """
        settings = self.settings
        x, y = get_field(batch, settings.input_key), get_field(batch, settings.target_key)
        if not isinstance(x, Tensor) or not isinstance(y, Tensor):
            raise InputError(
                f"Expected tensors at input_key={settings.input_key!r} and "
                f"target_key={settings.target_key!r}, got {type(x).__name__} and "
                f"{type(y).__name__}. Name the fields that hold inputs and targets."
            )
        return x, y

    def attacked(
        self,
        module: nn.Module,
        batch: Any,
        *,
        generator: torch.Generator,
        epochs: float,
        chunk_size: int | str | None = "auto",
        private: bool = False,
        views: int = 1,
    ) -> AttackedBatch:
        """Attack a batch; the batch itself is untouched.

        Args:
            module: gives logits; not wrapped.
            batch: in any container.
            generator: source of random starts, and of which records stay clean.
            epochs: trained so far, this step included, in the unit of `warmup_epochs`.
            chunk_size: most rows attacked at once, where the settings leave it open.
            private: whether a record may stay clean or not whatever the others do, as DP-SGD
                needs; otherwise the same number of records stays clean in every batch.
            views: rows of a record, next to each other. Where the run is private, of every
                record's as many stay clean as `clean_fraction` says, up to one that tosses a coin.

        Raises:
            InputError: if the batch has no such fields, or what the attack refuses.
        """
        settings = self.settings
        x, y = self.inputs_of(batch)
        share = self.eps_share(epochs)
        if self._free is not None:
            eps = None if share == 1 else self._free.free.ball.eps * share
            x_adv = self._free.perturb(x, eps=eps)
        else:
            if settings.chunk_size != "auto":
                chunk_size = settings.chunk_size
            rows = self._rows_to_attack(x, generator, private, views)
            x_adv = self._run(module, x[rows], y[rows], share, generator, chunk_size)
            if not isinstance(rows, slice):
                x_adv = x.detach().clone().index_copy_(0, rows, x_adv)
        return AttackedBatch(self._seen(batch, x_adv), x, x_adv, y)

    def unattacked(self, batch: Any) -> AttackedBatch:
        """A batch for trying out the step without the attack: the other inputs are half as large.

        Not the same, or an objective that compares the two would have nothing to compare.
        """
        x, y = self.inputs_of(batch)
        x_adv = x * 0.5
        return AttackedBatch(self._seen(batch, x_adv), x, x_adv, y)

    def _seen(self, batch: Any, x_adv: Tensor) -> Any:
        if self.settings.objective.trains_on == "clean":
            return batch
        return with_field(batch, self.settings.input_key, x_adv)

    def eps_share(self, epochs: float) -> float:
        """The part of eps that is attacked with after so many epochs: linear up to 1."""
        warmup = self.settings.warmup_epochs
        return min(1.0, epochs / warmup) if warmup else 1.0

    def _rows_to_attack(
        self, x: Tensor, generator: torch.Generator, private: bool, views: int
    ) -> Tensor | slice:
        fraction = self.settings.clean_fraction
        if not fraction:
            return slice(None)
        draws = torch.rand(len(x), generator=generator, device=generator.device).to(x.device)
        if private:  # of each record alone: its first views are clean, the next tosses a coin
            view = torch.arange(len(x), device=x.device) % views
            return (draws >= fraction * views - view).nonzero().squeeze(1)
        return draws.argsort()[round(fraction * len(x)) :]  # always as many: one shape on a GPU

    def _run(
        self,
        module: nn.Module,
        x: Tensor,
        y: Tensor,
        share: float,
        generator: torch.Generator,
        chunk_size: int | str | None,
    ) -> Tensor:
        """x_adv of all rows, at a part of the attack's radius."""
        attack: Any = self.attack
        if len(x) == 0:
            return x.detach().clone()
        eps = None if share == 1 else radius_of(attack) * share  # type: ignore[operator]
        if isinstance(attack, PGD):
            result = attack.run(module, x, y, generator=generator, chunk_size=chunk_size, eps=eps)
            self.tally.add(result.gradients, result.zero_gradients, result.nonfinite_gradients)
            return result.x_adv
        attack = attack if eps is None else attack.with_eps(eps)
        size = chunk_size if isinstance(chunk_size, int) else None
        return run_foreign(attack, module, x, y, generator=generator, chunk_size=size)

    # --- around the training step -----------------------------------------------------------------

    @contextlib.contextmanager
    def step(
        self,
        module: nn.Module,
        made: AttackedBatch,
        *,
        precision: Context = contextlib.nullcontext,
        released: Mapping[str, Tensor] | None = None,
    ) -> Iterator[None]:
        """Around the user's training step: keep its logits, move the weights (AWP).

        The weights stay moved for the backward, until `after_backward`; an exception in here puts
        them back.

        Args:
            module: not wrapped.
            made: the attacked batch.
            precision: makes the context, of autocast for example, that AWP's own forward runs in.
            released: where the run is private, the last released gradient, which AWP then follows
                in place of the batch's own.
        """
        self.restore_weights()
        objective = self.settings.objective
        try:
            if isinstance(objective, AWP):
                if released is not None:
                    moved = perturbation_along(module, released, objective.gamma)
                else:
                    with precision():
                        moved = weight_perturbation(
                            module, objective, made.x, made.x_adv, made.y, objective.gamma,
                            logits=logits_of,
                        )  # fmt: skip
                self._weights = PerturbedWeights(module, moved)
                self._weights.apply()
            with self._kept_logits(module, made) if objective.pairs else contextlib.nullcontext():
                yield
        except BaseException:
            self.restore_weights()
            raise

    def run(
        self,
        module: nn.Module,
        made: AttackedBatch,
        step: Callable[[Any], Any],
        *,
        add: Callable[[Any, Tensor], Any] = operator.add,
        precision: Context = contextlib.nullcontext,
        released: Mapping[str, Tensor] | None = None,
    ) -> Any:
        """The user's training step within `step`, and what it returned with `penalty` added.

        Args:
            module: not wrapped.
            made: the attacked batch.
            step: batch → the mean loss over its rows, or what holds it; None skips the batch.
            add: (what `step` returned, penalty) → what is returned.
            precision: as in `step`.
            released: as in `step`.
        """
        try:
            with self.step(module, made, precision=precision, released=released):
                output = step(made.batch)
            if output is None:
                self.restore_weights()
                return None
            with precision():
                penalty = self.penalty(module, made)
            return output if penalty is None else add(output, penalty)
        except BaseException:
            self.restore_weights()
            raise

    @contextlib.contextmanager
    def _kept_logits(self, module: nn.Module, made: AttackedBatch) -> Iterator[None]:
        """Keep the logits of the first call of the module with the batch's inputs as they are."""
        # One of this step's: a compiled module may go on calling the hook of an earlier one.
        keep = KeepLogits(get_field(made.batch, self.settings.input_key))
        self._own = keep.own
        hook = module.register_forward_hook(keep, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()
            keep.seen = None

    def penalty(self, module: nn.Module, made: AttackedBatch) -> Tensor | None:
        """What the objective adds to the training step's mean loss; None where it adds nothing.

        The logits of the batch that the training step saw are those of its own forward where it
        called the module with the batch's inputs as they are, and nothing else, and did not write
        to what came out; else the module runs once more.

        Args:
            module: not wrapped: DistributedDataParallel's forward would exchange buffers once more,
                in the middle of a step. Gradients synchronize where they reach the parameters,
                whichever forward they come from.
            made: the attacked batch.
        """
        objective, own = self.settings.objective, self._own
        self._own = []
        if not objective.pairs:
            return None
        sees_clean = objective.trains_on == "clean"
        if own and own[0][0]._version == own[0][1]:
            first = own[0][0]
        else:
            first = logits_of(module(made.x if sees_clean else made.x_adv))
        other = logits_of(module(made.x_adv if sees_clean else made.x))
        clean, adv = (first, other) if sees_clean else (other, first)
        if self._memoryless is not None:
            self._memoryless.check(objective, clean, adv, made.y)
        return objective.penalty(clean, adv, made.y).mean()

    def after_backward(self) -> None:
        """Once the step's gradients are there: put the weights back, move Free's perturbation."""
        self.restore_weights()
        if self._free is not None and self._free.pending:
            self._free.absorb()
            self.tally.add(*self._free.take_counts())

    def restore_weights(self) -> None:
        """Undo AWP's perturbation, if one is on; safe to call twice."""
        self._own = []
        if self._weights is not None:
            self._weights.restore()
            self._weights = None

    # --- what came of it --------------------------------------------------------------------------

    def switch(self, attack: Attack | Free) -> None:
        """Go on with another attack."""
        self.attack = attack
        self._free = attack.begin() if isinstance(attack, Free) else None

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run has to know."""
        return {} if self._free is None else {"free": self._free.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up where a checkpoint was."""
        if self._free is not None and "free" in state:
            self._free.load_state_dict(state["free"])
