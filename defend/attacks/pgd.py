"""Projected gradient ascent: the only gradient loop in defend, for every norm."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from defend.attacks.context import logits_of, no_trace
from defend.batching.chunks import chunk_bounds
from defend.errors import InputError
from defend.threat.balls import Ball
from defend.threat.inputs import InputSpace

Model = Callable[..., Any]
PerRecordLoss = Callable[[Tensor, Tensor], Tensor]


class Attack(Protocol):
    """Anything that perturbs a batch: x_adv of the same shape, dtype, device and layout as x."""

    def __call__(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        *,
        generator: torch.Generator | None = None,
        chunk_size: int | None = None,
    ) -> Tensor: ...


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of each record, shape `[N]`; y holds class indices or class probabilities."""
    return F.cross_entropy(logits, y, reduction="none")


_LOSSES: dict[str, PerRecordLoss] = {"ce": cross_entropy}


@dataclasses.dataclass(frozen=True)
class _Room:
    """Where δ may go for one batch, in raw units, and how it reaches the model's input."""

    x: Tensor  # clean input, model units, compute dtype
    lower: Tensor  # smallest legal δ, ≤ 0
    upper: Tensor  # largest legal δ, ≥ 0
    std: Tensor | None  # raw units in one model unit; None where they are the same
    box: tuple[Tensor, Tensor]  # the legal box in model units
    dtype: torch.dtype  # of the model's input

    def apply(self, delta: Tensor) -> Tensor:
        """x + δ as the model sees it."""
        return self._moved(delta).to(self.dtype)

    def result(self, delta: Tensor) -> Tensor:
        """x + δ, in the box in spite of rounding."""
        return self._moved(delta).clamp_(*self.box).to(self.dtype)

    def _moved(self, delta: Tensor) -> Tensor:
        return self.x + (delta if self.std is None else delta / self.std)

    def rows(self, start: int, stop: int) -> Self:
        cut = slice(start, stop)
        return dataclasses.replace(
            self, x=self.x[cut], lower=self.lower[cut], upper=self.upper[cut]
        )


@dataclasses.dataclass(frozen=True)
class PGD:
    r"""Projected gradient descent attack (Madry et al. 2018, arXiv 1706.06083).

    From a random δ₀ in the ball, `steps` times:

        δ ← clip_box( project_ball( δ + step_size · steepest(∇_δ Σᵢ loss(model(x + δ)ᵢ, yᵢ)) ) )

    Losses are summed, not averaged, so that the gradient of record i does not depend on the size
    of the batch; the model is in eval mode, so it does not depend on the other records either.
    δ, projection and loss are kept in float32 (float64 for float64 inputs) whatever the dtype of
    the input or the autocast in force.

    Args:
        ball: threat model, `Linf(eps)` or `L2(eps)`, in raw units.
        steps: gradient steps, ≥ 1.
        step_size: length of a step in raw units; None means 2.5 · eps / steps, which is the
            2/255 of Madry's 8/255 in 10 steps.
        random_start: start uniformly in the ball rather than at the clean input.
        restarts: independent runs from new random starts; each record keeps its best one, a
            misclassified one before any other and then the one of highest loss.
        loss: "ce", or a callable (logits, y) → loss of each record, shape `[N]`, to be increased.
        inputs: the legal box, with mean and std where batches are normalized.

    *Guarantees.* For x in the box: ‖x_adv − x‖ ≤ eps in raw units and x_adv in the box, both to
    the rounding of x's dtype; same shape, dtype, device and layout; row i of x_adv depends on
    row i of x and y, the weights and the generator only. The model and the global RNG are left as
    they were (`no_trace`).

    Raises:
        InputError: for settings out of range; on call, for inputs that are not floating point,
            lie outside the box or do not match y.
    """

    ball: Ball
    _: dataclasses.KW_ONLY
    steps: int = 10
    step_size: float | None = None
    random_start: bool = True
    restarts: int = 1
    loss: str | PerRecordLoss = "ce"
    inputs: InputSpace = InputSpace()

    def __post_init__(self) -> None:
        for name in ("steps", "restarts"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise InputError(f"Expected `{name}` to be an integer ≥ 1, got {value!r}.")
        if self.step_size is not None and not self.step_size > 0:
            raise InputError(f"Expected `step_size` to be > 0 or None, got {self.step_size}.")
        if isinstance(self.loss, str) and self.loss not in _LOSSES:
            raise InputError(
                f"Expected `loss` to be one of {sorted(_LOSSES)} or a callable "
                f"(logits, y) -> [N], got {self.loss!r}."
            )
        if self.restarts > 1 and not self.random_start:
            raise InputError(
                "Expected `random_start=True` with restarts > 1, got False: every restart would "
                "be the same run."
            )

    @property
    def effective_step_size(self) -> float:
        """`step_size`, or its default 2.5 · eps / steps, in raw units."""
        return 2.5 * self.ball.eps / self.steps if self.step_size is None else self.step_size

    def with_eps(self, eps: float) -> Self:
        """The same attack at another radius, its step size scaled along."""
        scale = eps / self.ball.eps if self.ball.eps else 1.0
        step_size = None if self.step_size is None else self.step_size * scale or None
        return dataclasses.replace(self, ball=self.ball.with_eps(eps), step_size=step_size)

    def __call__(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        *,
        generator: torch.Generator | None = None,
        chunk_size: int | None = None,
    ) -> Tensor:
        """Attack a batch.

        Args:
            model: a module or callable; model(x) gives logits `[N, classes]`.
            x: clean inputs `[N, ...]`, floating point, in model units.
            y: targets `[N]` (or whatever the loss takes, one row a record).
            generator: source of the random start; None draws from fresh OS entropy. The global
                RNG is never read, so pass a seeded one for results that repeat.
            chunk_size: most rows to run through the model at once; the random start is drawn for
                the whole batch first, so the result does not depend on it.

        Returns:
            x_adv, detached.
        """
        self._check(x, y)
        if len(x) == 0:
            return x.detach().clone()
        if generator is None:
            generator = torch.Generator(device=x.device)
            generator.seed()
        with no_trace(model, x.device):
            # Clones made here are ordinary tensors even where x was made in inference mode.
            clean, y = x.detach().clone(), y.detach().clone() if y.is_inference() else y.detach()
            room = self._room(clean)
            best = self._run(model, room, y, generator, chunk_size)
            if self.restarts > 1:
                score = partial(self._score, model, room, y, chunk_size=chunk_size)
                best_score = score(best)
                for _ in range(self.restarts - 1):
                    delta = self._run(model, room, y, generator, chunk_size)
                    new_score = score(delta)
                    better = new_score > best_score
                    best[better] = delta[better]
                    best_score = torch.maximum(best_score, new_score)
            return room.result(best)

    def _check(self, x: Tensor, y: Tensor) -> None:
        if not x.is_floating_point():
            raise InputError(
                f"Expected floating point inputs, got {x.dtype}. Scale them into the box first, "
                "for example x.float() / 255."
            )
        if x.ndim < 2:
            raise InputError(
                f"Expected inputs of shape [N, ...] with one record a row, got {tuple(x.shape)}."
            )
        if len(x) != len(y):
            raise InputError(
                f"Expected one target a record, got {len(x)} inputs, {len(y)} targets."
            )

    def _room(self, x: Tensor) -> _Room:
        compute = x.to(torch.promote_types(x.dtype, torch.float32))
        raw = self.inputs.to_raw(compute)
        self.inputs.check(raw, x.dtype)
        moments = self.inputs.moments(compute)
        low, high = (compute.new_tensor(v) for v in (self.inputs.low, self.inputs.high))
        return _Room(
            x=compute,
            # Rounding may leave x a hair outside the box: δ = 0 stays legal all the same.
            lower=(low - raw).clamp_max_(0),
            upper=(high - raw).clamp_min_(0),
            std=None if moments is None else moments[1],
            box=(low, high)
            if moments is None
            else ((low - moments[0]) / moments[1], (high - moments[0]) / moments[1]),
            dtype=x.dtype,
        )

    def _run(
        self,
        model: Model,
        room: _Room,
        y: Tensor,
        generator: torch.Generator,
        chunk_size: int | None,
    ) -> Tensor:
        if self.random_start:
            delta = self.ball.random_start(room.x, generator).clamp_(room.lower, room.upper)
        else:
            delta = torch.zeros_like(room.x)
        for start, stop in chunk_bounds(len(delta), chunk_size):
            self._ascend_(model, room.rows(start, stop), y[start:stop], delta[start:stop])
        return delta

    def _ascend_(self, model: Model, room: _Room, y: Tensor, delta: Tensor) -> None:
        """The loop. Writes the result into `delta`; no host-device sync inside."""
        step_size = self.effective_step_size
        for _ in range(self.steps):
            adv = room.apply(delta).requires_grad_()
            loss = self._losses(model, adv, y).sum()
            (grad,) = torch.autograd.grad(loss, adv)
            grad = grad.to(delta.dtype)
            if room.std is not None:
                grad = grad / room.std  # ∂/∂δ_raw = ∂/∂x_model · ∂x_model/∂δ_raw
            delta.add_(self.ball.steepest(grad), alpha=step_size)
            # Ball first, then box: the box holds δ = 0, so clipping never leaves the ball.
            self.ball.project_(delta).clamp_(room.lower, room.upper)

    def _losses(self, model: Model, adv: Tensor, y: Tensor) -> Tensor:
        return self._losses_of(logits_of(model(adv)), y)

    def _losses_of(self, logits: Tensor, y: Tensor) -> Tensor:
        per_record = _LOSSES[self.loss] if isinstance(self.loss, str) else self.loss
        losses = per_record(logits.to(torch.promote_types(logits.dtype, torch.float32)), y)
        if losses.shape != y.shape[:1]:
            raise InputError(
                f"Expected `loss` to return one value a record, shape ({len(y)},), got "
                f"{tuple(losses.shape)}. Use reduction='none'."
            )
        return losses

    @torch.no_grad()
    def _score(
        self,
        model: Model,
        room: _Room,
        y: Tensor,
        delta: Tensor,
        chunk_size: int | None,
    ) -> Tensor:
        """How good each record's δ is: +inf where it fools the model, else its loss."""
        scores = []
        for start, stop in chunk_bounds(len(delta), chunk_size):
            logits = logits_of(model(room.rows(start, stop).apply(delta[start:stop])))
            target = y[start:stop]
            label = target if target.ndim == 1 else target.argmax(1)
            losses = self._losses_of(logits, target).float()
            fooled = (logits.argmax(1) != label) | ~losses.isfinite()
            scores.append(losses.masked_fill(fooled, float("inf")))
        return torch.cat(scores)
