"""Free adversarial training: the backward of the training step is the attack's gradient too."""

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor

from defend.attacks.ascent import Model, step_up_
from defend.attacks.attack import Perturber, TrainingAttack
from defend.attacks.pgd import PGD
from defend.attacks.result import AttackResult, GradientCounts
from defend.errors import InputError
from defend.threat.balls import Ball
from defend.threat.inputs import InputSpace
from defend.threat.region import Region


@dataclasses.dataclass(frozen=True)
class Free(TrainingAttack):
    r"""Free adversarial training (Shafahi et al. 2019, arXiv 1904.12843).

    Every batch is trained `replays` times in a row, and one backward gives the gradients of the
    weights θ and of the input at once:

        g_θ, g_x ← ∇_θ, ∇_x  loss(model(x + δ; θ), y)
        θ ← optimizer(θ, g_θ)
        δ ← project( δ + step_size · steepest(g_x) )

    δ belongs to a position in the batch: the next batch starts from what the last one ended with.
    A step costs what a plain step costs; train 1/`replays` as many epochs to see as many batches.

    Where we leave the paper: δ is projected onto the ball *and* the box of the batch at hand (so
    that ascent never waits behind the edge of the box), for any ball and not L∞ alone.

    This is no attack to be called, as there is no gradient but the training's. `begin()` gives
    the perturbation that goes through a training.

    Args:
        ball: `Linf(eps)`, `L2(eps)` or `L1(eps)`, in raw units.
        replays: how often a batch is trained in a row, ≥ 1.
        step_size: in raw units; None means the paper's eps.
        inputs: the legal box, with mean and std where batches are normalized.

    *Guarantees.* Every x_adv is in ball and box, to the rounding of x's dtype. But δ carries what
    was learned on one batch into the next, so that x_adv of a record depends on *other* records:
    not for DP-SGD.

    Raises:
        InputError: for settings out of range.
    """

    ball: Ball = dataclasses.field()  # without a default, whatever the base has
    _: dataclasses.KW_ONLY
    replays: int = 8
    step_size: float | None = None
    inputs: InputSpace = InputSpace()

    uses_training_gradient: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.ball, Ball):
            raise InputError(
                f"Expected `ball` to be a ball such as Linf(8 / 255), got {self.ball!r}."
            )
        if not isinstance(self.replays, int) or isinstance(self.replays, bool) or self.replays < 1:
            raise InputError(f"Expected `replays` to be an integer ≥ 1, got {self.replays!r}.")
        if self.step_size is not None and not 0 < self.step_size < float("inf"):
            raise InputError(f"Expected `step_size` to be > 0 or None, got {self.step_size}.")

    def begin(self) -> "FreePerturbation":
        """The perturbation of one training, zero so far."""
        return FreePerturbation(self)

    def watched(self) -> PGD:
        return self.single_step()

    def single_step(self) -> PGD:
        """One such step from the clean input, as an attack: what `OverfittingAlarm` can watch."""
        return PGD(
            self.ball,
            steps=1,
            step_size=self.step_size or self.ball.eps or None,
            random_start=False,
            inputs=self.inputs,
        )


class FreePerturbation(Perturber):
    """δ of one training. Around every training step:

        x_adv = perturbation.perturb(model, x, y).x_adv    # a leaf that wants a gradient
        loss(model(x_adv), y).backward()                   # the training's own backward
        counts = perturbation.after_backward()             # δ takes its step

    Attributes:
        free: its settings.
        delta: δ by position in the batch `[largest N so far, ...]`, raw units, at least float32;
            None before the first batch.
    """

    def __init__(self, free: Free) -> None:
        self.free = free
        self.delta: Tensor | None = None
        self._pending: tuple[Tensor, Region, Tensor | None] | None = None

    @property
    def pending(self) -> bool:
        """Whether the last `perturb` waits for its gradient."""
        return self._pending is not None

    @torch.no_grad()
    def perturb(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        *,
        generator: torch.Generator | None = None,
        chunk_size: int | str | None = "auto",
        eps: float | None = None,
    ) -> AttackResult:
        """x + δ, clipped to the box. Only x and eps matter here.

        A batch larger than any before gets zeros for its new positions; a smaller one leaves the
        positions that it lacks alone. Records of another shape start anew.

        Args:
            model: not called.
            x: clean inputs `[N, ...]`, floating point, in model units; not written to.
            y: not read.
            generator: not drawn from.
            chunk_size: of no use, since nothing is computed row by row.
            eps: another radius than the ball's, in raw units; the step scales along.

        Returns:
            x_adv is a leaf of x's shape, dtype, device and layout that requires a gradient;
            nothing is counted yet.

        Raises:
            InputError: for inputs that are not floating point or not inside the box.
        """
        if not x.is_floating_point() or x.ndim < 2:
            raise InputError(
                "Expected floating point inputs of shape [N, ...], got "
                f"{x.dtype} of shape {tuple(x.shape)}. Scale them into the box first, for example "
                "x.float() / 255."
            )
        ball, space = self.free.ball, self.free.inputs
        with torch.inference_mode(False):
            clean = x.detach().to(torch.promote_types(x.dtype, torch.float32))
            raw = space.to_raw(clean)
            space.check(raw, x.dtype)
            region = space.region(raw, ball.eps if eps is None else eps)
            # Legal for the last batch; this one lies elsewhere in the box, within another radius.
            delta = ball.project_(self._fitted(raw)[: len(raw)], region)
            moved = space.to_model((raw + delta).clamp(*space.bounds(raw)))
            # x itself, bit for bit, where it is not moved (and where it may hold anything).
            adv = torch.empty_like(x).copy_(torch.where(delta == 0, clean, moved))
            adv.requires_grad_()
        moments = space.moments(raw)
        self._pending = (adv, region, None if moments is None else moments[1])
        return AttackResult(adv)

    def after_backward(self) -> GradientCounts:
        """`absorb`, where a batch waits for its gradient; else nothing."""
        return self.absorb() if self.pending else GradientCounts()

    @torch.no_grad()
    def absorb(self) -> GradientCounts:
        """Move δ by the gradient that the training's backward left in the last `perturb`'s x_adv.

        A positive factor of the loss, as the 1/N of a mean or the scale of a gradient scaler, does
        not matter. A gradient that is not finite moves nothing.

        Returns:
            One gradient for each record; how many were zero or not finite stays on the device.

        Raises:
            InputError: if nothing waits for its gradient, or if none came.
        """
        if self._pending is None:
            raise InputError(
                "Expected `perturb` before every `absorb`, got none since the last. Train on what "
                "`perturb` returns, once."
            )
        (adv, region, std), self._pending = self._pending, None
        delta, ball = self.delta, self.free.ball
        if adv.grad is None or delta is None:
            raise InputError(
                "Expected the training step's backward to reach its inputs, got no gradient for "
                "them. Free training needs a step that uses the batch it is given, "
                "differentiably: no detach, no rounding, no copy through NumPy. Otherwise train "
                "against PGD or fgsm_rs."
            )
        rows = delta[: len(adv)]
        useless = step_up_(rows, adv.grad, ball, region, self._step_size(region), std)
        return GradientCounts(len(adv), *useless)

    def _step_size(self, region: Region) -> Tensor:
        """`step_size` at the ball's own radius, growing with the radius in force."""
        step, eps = self.free.step_size, self.free.ball.eps
        return region.eps * (step / eps if step is not None and eps else 1.0)

    def _fitted(self, raw: Tensor) -> Tensor:
        """δ with at least as many rows as `raw`, of its dtype and device; kept."""
        delta = self.delta
        if delta is None or delta.shape[1:] != raw.shape[1:]:
            delta = torch.zeros_like(raw)
        elif len(delta) < len(raw):
            delta = torch.zeros_like(raw).index_copy_(
                0, torch.arange(len(delta), device=raw.device), delta.to(raw)
            )
        self.delta = delta.to(raw)
        return self.delta

    def state_dict(self) -> dict[str, Any]:
        """δ so far: with it a training that is resumed goes on as if it had not stopped."""
        return {"delta": None if self.delta is None else self.delta.clone()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take δ from a state; it moves to the inputs' device with the next batch."""
        delta = state_dict["delta"]
        self.delta = None if delta is None else delta.clone()
        self._pending = None
