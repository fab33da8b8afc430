"""One step of gradient ascent on a batch: the tensors it works on, and what it does to them."""

import dataclasses
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor

from defend.attacks.context import logits_of
from defend.attacks.precision import Context
from defend.errors import InputError
from defend.objectives.losses import in_full_precision
from defend.threat.balls import Ball
from defend.threat.region import Region, rows_of

Model = Callable[..., Any]
PerRecordLoss = Callable[[Tensor, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is attacked: clean records, their targets and where δ may go.

    Attributes:
        x: clean inputs `[N, ...]` in model units, at least float32.
        y: targets, one a record.
        target: what the loss compares logits with: y, or the clean logits.
        region: the legal δ, in raw units.
        step_size: 0-dimensional, or `[N, 1, ...]`; in raw units.
        std: raw units in one model unit, or None where they are the same.
        box: smallest and largest legal input in model units.
        dtype: of the model's input.
    """

    x: Tensor
    y: Tensor
    target: Tensor
    region: Region
    step_size: Tensor
    std: Tensor | None
    box: tuple[Tensor, Tensor]
    dtype: torch.dtype

    def apply(self, delta: Tensor) -> Tensor:
        """x + δ as the model sees it."""
        return self._moved(delta).to(self.dtype)

    def result(self, delta: Tensor) -> Tensor:
        """x + δ, in the box in spite of rounding; x itself, bit for bit, where δ is 0."""
        moved = self._moved(delta).clamp_(*self.box)
        return torch.where(delta == 0, self.x, moved).to(self.dtype)

    def _moved(self, delta: Tensor) -> Tensor:
        return self.x + (delta if self.std is None else delta / self.std)

    def rows(self, rows: slice | Tensor) -> Self:
        """The problem of some of the records: a slice of rows, or their indices."""
        return dataclasses.replace(
            self,
            x=self.x[rows],
            y=self.y[rows],
            target=self.target[rows],
            region=self.region.rows(rows),
            step_size=rows_of(self.step_size, rows),
        )


@dataclasses.dataclass
class Best:
    """The best δ of each record so far.

    One that fools the model comes before any that does not; after that the higher loss counts.

    Attributes:
        delta: `[N, ...]`.
        loss: `[N]`.
        fooled: `[N]`, bool.
    """

    delta: Tensor
    loss: Tensor
    fooled: Tensor

    @classmethod
    def none(cls, delta: Tensor) -> Self:
        """Nothing seen yet: every δ is better."""
        loss = torch.full((len(delta),), float("-inf"), device=delta.device, dtype=delta.dtype)
        return cls(delta.clone(), loss, torch.zeros_like(loss, dtype=torch.bool))

    def see_(self, other: "Best") -> None:
        """Take what is better of another δ, record by record."""
        ahead, behind = other.fooled & ~self.fooled, self.fooled & ~other.fooled
        better = ahead | ((other.loss > self.loss) & ~behind)
        self.loss.copy_(torch.where(better, other.loss, self.loss))
        self.fooled |= other.fooled
        self.delta.copy_(torch.where(_as_column(better, self.delta), other.delta, self.delta))

    def rows(self, rows: slice | Tensor) -> Self:
        """Of some of the records."""
        return dataclasses.replace(
            self, delta=self.delta[rows], loss=self.loss[rows], fooled=self.fooled[rows]
        )

    def put_(self, rows: slice | Tensor, other: "Best") -> None:
        """Write the best of some records into their places."""
        self.delta[rows], self.loss[rows] = other.delta, other.loss
        self.fooled[rows] = other.fooled


@dataclasses.dataclass
class Ascent:
    """Gradient ascent on the loss of `problem`, a step at each call, in place.

        δ ← project( δ + step_size · steepest(∇_δ Σᵢ lossᵢ) )

    A call reads and writes tensors only, always the same ones, and never asks the device for a
    value; so it can be captured as a CUDA graph.

    Attributes:
        model: gives logits.
        loss: (logits, target) → loss of each record.
        ball: the norm.
        problem: the records.
        delta: where each record is, raw units; written.
        targeted: whether the loss is to fall, and the model is fooled where it says y.
        nan_fools: whether logits of NaN are a wrong answer; not where only the attack's own
            precision makes them so.
        judge: the precision in which a record counts as fooled, where the attack runs in another
            one; else None. Records that seem fooled are then run once more, and the host waits
            for the device to say which they are.
        best: the best δ so far, where iterates are compared; they are judged *before* each step.
            None where only the last one counts. Written.
        counts: int64 `[2]`: gradients that were zero, and that were not finite; written.
    """

    model: Model
    loss: PerRecordLoss
    ball: Ball
    problem: Problem
    delta: Tensor
    targeted: bool
    nan_fools: bool
    judge: Context | None
    best: Best | None
    counts: Tensor

    def __call__(self) -> None:
        """One step."""
        adv, logits, losses = self.forward()
        if self.best is not None:
            self.seen(logits, losses)
        self.update(adv, losses)

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        """(x + δ, logits, losses), the losses negated for a targeted attack, which lowers them."""
        adv = self.problem.apply(self.delta).requires_grad_()
        logits = logits_of(self.model(adv))
        losses = self.loss(in_full_precision(logits), self.problem.target)
        if losses.shape != self.delta.shape[:1]:
            raise InputError(
                f"Expected `loss` to return one value a record, shape ({len(self.delta)},), got "
                f"{tuple(losses.shape)}. Use reduction='none'."
            )
        return adv, logits, -losses if self.targeted else losses

    def update(self, adv: Tensor, losses: Tensor) -> None:
        """Move δ by one step of gradient ascent, from the losses of `forward`."""
        grad = _gradient(losses.sum(), adv)
        problem = self.problem
        self.counts.add_(
            step_up_(self.delta, grad, self.ball, problem.region, problem.step_size, problem.std)
        )

    def fooled(self, logits: Tensor) -> Tensor:
        """Which records fool the model.

        Only a classifier can be fooled; elsewhere the loss alone tells one δ from another.
        """
        y = self.problem.y
        classes = logits.ndim == 2 and logits.shape[1] > 1
        if classes and y.is_floating_point() and y.shape == logits.shape:
            probabilities = (y >= 0).all(1) & ((y.sum(1) - 1).abs() < 1e-3)
            reached = self._reached(logits, y.argmax(1)) & probabilities
        elif classes and not y.is_floating_point() and y.shape == logits.shape[:1]:
            reached = self._reached(logits, y)
        else:
            return torch.zeros(len(self.delta), dtype=torch.bool, device=self.delta.device)
        nan = logits.isnan().any(1)
        fooled = reached | nan if self.nan_fools else reached & ~nan
        return fooled if self.judge is None else self._confirmed(self.judge, fooled)

    def _confirmed(self, judge: Context, fooled: Tensor) -> Tensor:
        rows = fooled.nonzero().squeeze(1)
        if len(rows) == 0:
            return fooled
        candidates = dataclasses.replace(self.rows(rows), judge=None, nan_fools=True)
        with judge(), torch.no_grad():
            logits = candidates.forward()[1]
        return fooled.index_put((rows,), candidates.fooled(logits))

    def _reached(self, logits: Tensor, labels: Tensor) -> Tensor:
        return (logits.argmax(1) == labels) == self.targeted

    def seen(self, logits: Tensor, losses: Tensor) -> Best:
        """The best δ after what `forward` found; just that where iterates are not compared."""
        losses = losses.detach().to(self.delta.dtype)
        # A loss that is not finite says nothing of how good δ is.
        losses = torch.where(losses.isfinite(), losses, float("-inf"))
        now = Best(self.delta, losses, self.fooled(logits))
        if self.best is None:
            return now
        self.best.see_(now)
        return self.best

    @torch.no_grad()
    def end(self, *, judged: bool) -> Best:
        """The result: the best iterate where they were compared, else the last.

        Args:
            judged: whether the loss of the last iterate is of interest; it takes a forward.
        """
        if self.best is None and not judged:
            return dataclasses.replace(Best.none(self.delta), delta=self.delta)
        _, logits, losses = self.forward()
        return self.seen(logits, losses)

    def rows(self, rows: Tensor) -> Self:
        """The ascent of some of the records from their present δ; it adds to the same counts."""
        return dataclasses.replace(
            self,
            problem=self.problem.rows(rows),
            delta=self.delta[rows],
            best=None if self.best is None else self.best.rows(rows),
        )


def _as_column(t: Tensor, like: Tensor) -> Tensor:
    """`[N]` → `[N, 1, ...]`, to broadcast over `like`."""
    return t.view(-1, *(1,) * (like.ndim - 1))


def _gradient(loss: Tensor, adv: Tensor) -> Tensor:
    try:
        return torch.autograd.grad(loss, adv)[0]
    except RuntimeError as error:
        if "does not require grad" in str(error) or "to not have been used" in str(error):
            raise InputError(
                "Expected a model whose output depends on its input differentiably, got one "
                "without a gradient for it. Attack a model without argmax, rounding, detach or "
                "NumPy between input and logits."
            ) from error
        raise


def step_up_(
    delta: Tensor, grad: Tensor, ball: Ball, region: Region, step_size: Tensor, std: Tensor | None
) -> Tensor:
    """Move δ, in place, along the gradient of the model's input.

    Returns:
        int64 `[2]`: gradients that were zero, and that were not finite.
    """
    grad = region.hold(grad.to(delta.dtype))
    # One pass over memory: the largest |value| is 0, or NaN or inf, exactly when asked for.
    largest = grad.abs().amax(tuple(range(1, grad.ndim)))
    useless = torch.stack([largest == 0, (largest < float("inf")).logical_not_()])
    if std is not None:
        grad = grad / std  # ∂/∂δ_raw = ∂/∂x_model · ∂x_model/∂δ_raw
    delta.addcmul_(ball.steepest(grad, delta, region), step_size)
    ball.project_(delta, region)
    return useless.sum(1)
