"""Adversarial training: the attack, the weights that AWP moves, and the objective's own term."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from defend.attacks.attack import TrainingAttack
from defend.attacks.context import logits_of
from defend.attacks.result import GradientCounts
from defend.batching.fields import get_field, with_field
from defend.errors import InputError
from defend.objectives import AWP
from defend.objectives.awp import PerturbedWeights, perturbation_along, weight_perturbation
from defend.objectives.stateless import StatelessCheck
from defend.training.config import Adversarial

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

        attacked = steps.attacked(module, batch, ...)   # the attack's: eval mode, without a trace
        with steps.around_forward(module, attacked):    # AWP's, clean first; buffers are put back
            loss = ...                                  # the user's own, on attacked.batch
        penalty = steps.penalty(module, attacked)       # TRADES, MART: the other batch
        (loss + penalty).backward()                     # without the penalty where it is None
        steps.after_backward()                          # weights back, before the optimizer's step

    `defend.training.step` does so for every kind of loop.

    The last two kinds of forward run in the module's own mode: BatchNorm sees the batch of the
    user's forward first, then the other one, and each has a dropout mask of its own.

    Args:
        settings: what is asked for.
        dry_run: whether they only try a private step out, on copies of the module. The objective is
            then held to keeping nothing from batch to batch.

    Attributes:
        settings: what was asked for.
        attack: what is used now; the alarm may have switched it.
        counts: input gradients since they were taken last.
    """

    def __init__(self, settings: Adversarial, *, dry_run: bool = False) -> None:
        self.settings = settings
        self._stateless = StatelessCheck() if dry_run else None
        self.switch(settings.training_attack())
        self._weights: PerturbedWeights | None = None
        self._recorded: list[tuple[Tensor, int]] = []
        self.counts = GradientCounts()

    def for_dry_run(self) -> "AdversarialSteps":
        """The same steps, for trying them out on copies of the module; counted apart."""
        return AdversarialSteps(self.settings, dry_run=True)

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

    def converted(self, batch: Any, convert: Callable[[Tensor], Tensor]) -> tuple[Any, Tensor]:
        """The batch with its inputs in the precision that the model takes, and these inputs."""
        x, _ = self.inputs_of(batch)
        taken = convert(x)
        if taken is not x:
            batch = with_field(batch, self.settings.input_key, taken)
        return batch, taken

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
            epochs: trained so far, this step included.
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
        if settings.chunk_size != "auto":
            chunk_size = settings.chunk_size
        share = self.eps_share(epochs)
        rows = self._rows_to_attack(x, generator, private, views)
        if isinstance(rows, slice):
            x_adv = self._perturbed(module, x, y, share, generator, chunk_size)
        else:
            some = self._perturbed(module, x[rows], y[rows], share, generator, chunk_size)
            x_adv = x.detach().clone().index_copy_(0, rows, some)
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

    def _perturbed(
        self,
        module: nn.Module,
        x: Tensor,
        y: Tensor,
        share: float,
        generator: torch.Generator,
        chunk_size: int | str | None,
    ) -> Tensor:
        """x_adv of all rows, at a part of the attack's radius."""
        if len(x) == 0:
            return x.detach().clone()
        radius = self.attack.radius
        eps = None if share == 1 or radius is None else radius * share
        result = self._perturber.perturb(
            module, x, y, generator=generator, chunk_size=chunk_size, eps=eps
        )
        self.counts += result.counts
        return result.x_adv

    # --- around the training step -----------------------------------------------------------------

    @contextlib.contextmanager
    def around_forward(
        self,
        module: nn.Module,
        attacked: AttackedBatch,
        *,
        precision: Context = contextlib.nullcontext,
        released: Mapping[str, Tensor] | None = None,
    ) -> Iterator[None]:
        """Around the user's training step: keep its logits, move the weights (AWP).

        The weights stay moved for the backward, until `after_backward`; an exception in here puts
        them back.

        Args:
            module: not wrapped.
            attacked: the attacked batch.
            precision: makes the context, of autocast for example, that AWP's own forward runs in.
            released: where the run is private, the last released gradient, which AWP then follows
                in place of the batch's own.
        """
        self.restore_weights()
        objective = self.settings.objective
        recorded = (
            self._recorded_logits(module, attacked) if objective.pairs else contextlib.nullcontext()
        )
        try:
            if isinstance(objective, AWP):
                self._move_weights(module, objective, attacked, precision, released)
            with recorded:
                yield
        except BaseException:
            self.restore_weights()
            raise

    def _move_weights(
        self,
        module: nn.Module,
        awp: AWP,
        attacked: AttackedBatch,
        precision: Context,
        released: Mapping[str, Tensor] | None,
    ) -> None:
        if released is not None:
            moved = perturbation_along(module, released, awp.gamma)
        else:
            with precision():
                moved = weight_perturbation(
                    module, awp, attacked.x, attacked.x_adv, attacked.y, awp.gamma,
                    logits=logits_of,
                )  # fmt: skip
        self._weights = PerturbedWeights(module, moved)
        self._weights.apply()

    @contextlib.contextmanager
    def _recorded_logits(self, module: nn.Module, attacked: AttackedBatch) -> Iterator[None]:
        """Keep the logits of the first call of the module with the batch's inputs as they are."""
        # One of this step's: a compiled module may go on calling the hook of an earlier one.
        recorder = LogitsRecorder(get_field(attacked.batch, self.settings.input_key))
        self._recorded = recorder.logits
        hook = module.register_forward_hook(recorder, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()
            recorder.inputs = None

    def penalty(self, module: nn.Module, attacked: AttackedBatch) -> Tensor | None:
        """What the objective adds to the training step's mean loss; None where it adds nothing.

        The logits of the batch that the training step saw are those of its own forward where it
        called the module with the batch's inputs as they are, and nothing else, and did not write
        to what came out; else the module runs once more.

        Args:
            module: not wrapped: DistributedDataParallel's forward would exchange buffers once more,
                in the middle of a step. Gradients synchronize where they reach the parameters,
                whichever forward they come from.
            attacked: the attacked batch.
        """
        objective, recorded = self.settings.objective, self._recorded
        self._recorded = []
        if not objective.pairs:
            return None
        sees_clean = objective.trains_on == "clean"
        if recorded and recorded[0][0]._version == recorded[0][1]:
            first = recorded[0][0]
        else:
            first = logits_of(module(attacked.x if sees_clean else attacked.x_adv))
        other = logits_of(module(attacked.x_adv if sees_clean else attacked.x))
        clean, adv = (first, other) if sees_clean else (other, first)
        if self._stateless is not None:
            self._stateless.check(objective, clean, adv, attacked.y)
        return objective.penalty(clean, adv, attacked.y).mean()

    def after_backward(self) -> None:
        """Once the step's gradients are there: put the weights back, move Free's perturbation."""
        self.restore_weights()
        self.counts += self._perturber.after_backward()

    def restore_weights(self) -> None:
        """Undo AWP's perturbation, if one is on; safe to call twice."""
        self._recorded = []
        if self._weights is not None:
            self._weights.restore()
            self._weights = None

    # --- what came of it --------------------------------------------------------------------------

    def switch(self, attack: TrainingAttack) -> None:
        """Go on with another attack."""
        self.attack = attack
        self._perturber = attack.begin()

    def take_counts(self) -> GradientCounts:
        """The counts since the last call."""
        counts, self.counts = self.counts, GradientCounts()
        return counts

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run has to know."""
        state = self._perturber.state_dict()
        return {"perturbation": state} if state else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up where a checkpoint was."""
        if "perturbation" in state:
            self._perturber.load_state_dict(state["perturbation"])


class LogitsRecorder:
    """Forward hook: the logits of the first call with `inputs` as they are, and their version.

    A module that is copied or pickled in its training step takes the hook along, without what it
    holds.
    """

    def __init__(self, inputs: Any) -> None:
        self.inputs = inputs
        self.logits: list[tuple[Tensor, int]] = []

    def __call__(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        given = [*args, *kwargs.values()]
        unknown = self.inputs is None or self.logits or len(given) != 1
        if unknown or given[0] is not self.inputs:
            return
        logits = logits_of(output)
        if logits.requires_grad:
            self.logits.append((logits, logits._version))

    def __reduce__(self) -> tuple[Any, ...]:
        return LogitsRecorder, (None,)
