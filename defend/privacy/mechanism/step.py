"""One logical DP-SGD step, in chunks: from backward to a released gradient."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from defend.errors import PrivacyError
from defend.privacy.gradients.engine import GradientEngine
from defend.privacy.gradients.per_record import PerRecordGradients
from defend.privacy.gradients.sums import as_kind_of
from defend.privacy.mechanism.clipping import Clipping, FlatClipping, checked_noise
from defend.privacy.mechanism.gaussian import add_noise_
from defend.privacy.mechanism.guard import StepGuard
from defend.privacy.mechanism.randomness import Randomness
from defend.privacy.mechanism.shard import Shard, sum_over_processes


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """What a private step does to the gradients.

    Attributes:
        noise_multiplier: σ ≥ 0.
        max_grad_norm: C > 0.
        expected_batch_size: B = q · N over all processes; what the sum is divided by.
        clipping: how records are clipped.
        views: rows of a record, which stand next to each other in a chunk. Their mean gradient is
            the record's, and is clipped once.
        loss_reduction: whether the backward of a chunk starts from a "mean" or a "sum".
        keep_release: whether `released` is to be filled, at the memory of one more gradient.
        shard: this process among all.
        engine: makes what gives norms and weighted sums of a module: engine(module, views=...,
            loss_reduction=...). The default holds the gradients of all records of a chunk.
    """

    noise_multiplier: float
    max_grad_norm: float
    expected_batch_size: float
    clipping: Clipping = FlatClipping()
    views: int = 1
    loss_reduction: Literal["mean", "sum"] = "mean"
    keep_release: bool = False
    shard: Shard = Shard()
    engine: Callable[..., GradientEngine] = PerRecordGradients


class PrivateStep:
    """Turns the gradients of one logical batch into one noised gradient.

    For each logical batch, in any training loop:

        step.begin()
        for chunk in chunks:
            step.expect(rows, records)
            loss(chunk).backward()  # the mean over its rows, or their sum: `loss_reduction`
            step.fold()             # clip each record, add to the sum, forget the rest
        step.release()              # charge, add noise once, ÷ expected batch size → p.grad
        optimizer.step()

    Splitting into chunks changes nothing but the memory used. Across processes each one folds its
    own rows; rank 0 adds the noise, then the sums are added up.

    The optimizer is the user's own. A guard on it refuses any step whose gradients were not
    released by this object, so that no un-noised gradient ever reaches the weights (`StepGuard`).

    Args:
        module: the model; hooks for per-record gradients are installed on it.
        optimizer: its optimizer, holding exactly the trainable parameters.
        settings: what is done to the gradients.
        randomness: source of the noise.
        charge: called with σ and C once a step *before* its noise is added; returns the number of
            the step, which its noise is drawn for, or raises to prevent it.

    Attributes:
        noise_multiplier: σ of the next step; may be set before any `begin`.
        max_grad_norm: C of the next step; may be set before any `begin`. A clipping rule that
            learns moves it.
        released: with `keep_release` the last gradient that was released, noise and all, by
            parameter name; empty before the first. Whatever is computed from it costs no ε.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        settings: StepSettings,
        *,
        randomness: Randomness,
        charge: Callable[[float, float], int],
    ) -> None:
        self.settings = settings
        self.noise_multiplier = settings.noise_multiplier
        self.max_grad_norm = settings.max_grad_norm
        self.randomness = randomness
        self.released: dict[str, Tensor] = {}
        self.engine = settings.engine(
            module, views=settings.views, loss_reduction=settings.loss_reduction
        )
        self._charge = charge
        self._sums: list[Tensor] | None = None  # one a parameter, and the statistic's if any
        self._expected: tuple[int, int] | None = None
        for p in module.parameters():
            if not p.requires_grad:
                p.grad = None  # of an earlier, public training
        self._guard = StepGuard(module, optimizer, self.parameters, self.engine.clear)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters, in the order of every list of gradients here."""
        return list(self.engine.parameters.values())

    def begin(self) -> None:
        """Open a logical batch.

        Raises:
            PrivacyError: if the last one was never stepped on. Every sampled batch is accounted
                as one release; to drop some of them is another mechanism.
        """
        if self._sums is not None or self._guard.holds_release:
            raise PrivacyError(
                "Expected one optimizer step for each batch, got a batch without one. Do not skip "
                "steps in `optimizer_step`; raise batch_size instead of accumulating."
            )
        self.discard()
        self._guard.begin()

    def expect(self, rows: int, records: int) -> None:
        """Announce a chunk of `rows` rows, views included; its first `records` records count."""
        self._expected = (rows, records)
        self.engine.expect(rows)

    def paused(self) -> AbstractContextManager[None]:
        """Inside, forward and backward on the module leave no per-record gradients."""
        return self.engine.paused()

    @property
    def pending(self) -> bool:
        """Whether a chunk was announced that is not folded yet."""
        return self._expected is not None

    def discard(self) -> None:
        """Forget the chunk that was announced last, say because memory ran out in the middle."""
        self._expected = None
        self.engine.clear()

    def fold(self) -> None:
        """After a chunk's backward: clip each record, add to the sum, drop its gradients."""
        if self._expected is None:
            raise PrivacyError("Expected `expect(rows, records)` before `fold()`.")
        rows, records = self._expected
        self._expected = None
        clipping = self.settings.clipping
        norms = self.engine.norms(rows, grouped=clipping.grouped)
        self._guard.refuse_moving_statistics()
        factors = clipping.factors(norms, self.max_grad_norm)
        statistic = clipping.statistic(norms, self.max_grad_norm)
        if records < rows // self.settings.views:  # the rest is padding
            factors[records:] = 0
        sums = self.engine.weighted_sum(factors)
        if statistic is not None:
            sums.append(statistic[:records].sum())
        if self._sums is None:
            self._sums = sums
        else:
            for total, part in zip(self._sums, sums, strict=True):
                total += part
        self.engine.clear()

    def release(self) -> None:
        """Charge the step, noise the sum, divide, and leave the result in every `p.grad`.

        Raises:
            PrivacyError: if no batch was folded since the last release.
            BudgetError: from `charge`; nothing is released then.
        """
        if self.pending:
            self.fold()
        if self._sums is None:
            raise PrivacyError("Expected a folded batch before `release()`, got none.")
        sums, self._sums = self._sums, None
        self._guard.check_release()
        settings, shard = self.settings, self.settings.shard
        error: Exception | None = None
        try:
            number = self._charge(self.noise_multiplier, self.max_grad_norm)
            if shard.rank == 0:
                self._add_noise(sums, number)
        except Exception as caught:
            if shard.world_size == 1:
                raise
            error = caught
        if shard.world_size > 1:
            sums = sum_over_processes(sums, error)
        for (name, p), total in zip(self.engine.parameters.items(), sums, strict=False):
            p.grad = as_kind_of(total / settings.expected_batch_size, p)
            if settings.keep_release:
                self.released[name] = p.grad.clone()  # others may add to theirs
        if settings.clipping.learns:
            self.max_grad_norm = settings.clipping.update(
                self.max_grad_norm, float(sums[-1]), settings.expected_batch_size
            )
        self._guard.note_release()

    def _add_noise(self, sums: list[Tensor], number: int) -> None:
        """The gradients' noise, and apart from it the statistic's, if there is one."""
        clipping, device = self.settings.clipping, sums[0].device
        batch = self.settings.expected_batch_size
        sigma, deviation = checked_noise(clipping, self.noise_multiplier, batch)
        count = len(self.engine.parameters)
        if len(sums) > count:
            draw = self.randomness.gaussian(number, device, "count")
            add_noise_(sums[count:], deviation=deviation, draw=draw)
        draw = self.randomness.gaussian(number, device)
        add_noise_(sums[:count], deviation=sigma * self.max_grad_norm, draw=draw)

    def close(self) -> None:
        """Remove every hook and every private gradient."""
        self._guard.remove()
        self._sums = None
        self.released = {}
        self.engine.remove()
