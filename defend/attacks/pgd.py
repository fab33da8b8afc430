"""Projected gradient ascent: the only gradient attack in defend, for every norm."""

import dataclasses
import math
import warnings
from functools import partial
from typing import ClassVar, Self

import torch
from torch import Tensor

from defend.attacks import cuda_graphs, pgd_settings
from defend.attacks.ascent import Ascent, Best, Model, PerRecordLoss, Problem
from defend.attacks.attack import Attack
from defend.attacks.context import logits_of, no_trace
from defend.attacks.pgd_settings import LOSSES, check_batch, loss_of, narrowest_width
from defend.attacks.precision import Context, as_now, autocast, keeps_casts
from defend.attacks.restarts import Restarts
from defend.attacks.result import AttackResult
from defend.attacks.sizing import ChunkSize
from defend.batching.chunks import check_chunk_size
from defend.batching.memory import SHARE
from defend.objectives.losses import in_full_precision
from defend.threat.balls import Ball
from defend.threat.inputs import InputSpace


@dataclasses.dataclass(frozen=True)
class PGD(Attack):
    r"""Projected gradient descent attack (Madry et al. 2018, arXiv 1706.06083).

    From a random δ₀ in the ball, `steps` times:

        δ ← project( δ + step_size · steepest(∇_δ Σᵢ loss(model(x + δ)ᵢ, yᵢ)) )

    projecting onto ball and box. Losses are summed, not averaged, so that the gradient of record i
    does not depend on the size of the batch; the model is in eval mode, so it does not depend on
    the other records either. δ, projection and loss are kept in float32 (float64 for float64
    inputs) whatever the dtype of the input or the autocast in force.

    Args:
        ball: threat model, `Linf(eps)`, `L2(eps)` or `L1(eps)`, in raw units.
        steps: gradient steps, ≥ 1.
        step_size: length of a step in raw units; None means 2.5 · eps / steps, which is the
            2/255 of Madry's 8/255 in 10 steps.
        random_start: start uniformly in a ball rather than at the clean input.
        start_radius: radius that the start is drawn from, in raw units; None means `eps`, and half
            of it for L2.
        restarts: independent runs from new random starts; each record keeps its best one, a
            misclassified one before any other and then the one of highest loss.
        loss: what is increased: "ce" (cross-entropy), "margin" (difference of logits ratio),
            "kl" (divergence from the clean input's logits, whatever y says), or a callable
            (logits, y) → loss of each record, shape `[N]`.
        targeted: y is the class that the attacker wants; the loss is decreased.
        iterate: which δ of a run to return: the "last", or the "best", judged as restarts are, at
            the price of one more forward. None means the last, and the best in `evaluate` and
            `RobustnessEvaluation`.
        stop_when_fooled: a record that fools the model stays where it is, and the batch shrinks to
            those not fooled yet. Asks the device for their number once a step. With a `precision`
            of its own, those that seem fooled are looked at once more without it.
        precision: "fp32", "bf16" or "fp16" autocast for the attack's forwards and backwards,
            apart from the training's; None means the autocast in force.
        channels_last: run images `[N, C, H, W]` through the model in this layout, in which
            convolutions are often faster; x_adv comes back in x's own. The model must not `view`
            its feature maps.
        inputs: the legal box, with mean and std where batches are normalized.
        cuda_graphs: on a GPU, capture a step when a shape comes up the second time, and replay it.
            What the forward decides in Python is then decided once (a change of the model's
            attributes is noticed, one of a list or closure only by a check now and then); where
            capturing fails, a log line says why and steps run one by one. Off until measured on a
            GPU: `benchmarks/results/`.

    *Guarantees.* For x in the box: ‖x_adv − x‖ ≤ eps in raw units and x_adv in the box, both to
    the rounding of x's dtype; same shape, dtype, device and layout; row i of x_adv depends on
    row i of x and y, the weights and the generator only. The model and the global RNG are left as
    they were (`no_trace`). Between the check of the inputs and the result, the host waits for the
    device nowhere, but under `stop_when_fooled`, and where a graph is captured or checked.

    Raises:
        InputError: for settings out of range; on call, for inputs that are not floating point,
            lie outside the box or do not match y, and for a radius or mask that does not fit.
    """

    ball: Ball = dataclasses.field()  # without a default, whatever the base has
    _: dataclasses.KW_ONLY
    steps: int = 10
    step_size: float | None = None
    random_start: bool = True
    start_radius: float | None = None
    restarts: int = 1
    loss: str | PerRecordLoss = "ce"
    targeted: bool = False
    iterate: str | None = None
    stop_when_fooled: bool = False
    precision: str | None = None
    channels_last: bool = False
    inputs: InputSpace = InputSpace()
    cuda_graphs: bool = False

    losses: ClassVar[tuple[str, ...]] = tuple(LOSSES)

    def __post_init__(self) -> None:
        pgd_settings.check_threat(self.ball, self.inputs)
        pgd_settings.check_numbers(self.steps, self.restarts, self.step_size, self.start_radius)
        pgd_settings.check_choices(self.loss, self.iterate, self.precision)
        pgd_settings.check_combination(self.loss, self.targeted, self.random_start, self.restarts)

    @property
    def is_one_step(self) -> bool:
        # A loss of the user's own may be for a model that is no classifier.
        return self.steps == 1 and isinstance(self.loss, str)

    @property
    def effective_step_size(self) -> float:
        """`step_size`, or its default 2.5 · eps / steps, in raw units."""
        return 2.5 * self.ball.eps / self.steps if self.step_size is None else self.step_size

    def with_eps(self, eps: float) -> Self:
        """The same attack at another radius, its step size and start scaled along."""
        scale = eps / self.ball.eps if self.ball.eps else 1.0

        def scaled(length: float | None) -> float | None:
            return None if length is None else length * scale or None

        return dataclasses.replace(
            self,
            ball=self.ball.with_eps(eps),
            step_size=scaled(self.step_size),
            start_radius=scaled(self.start_radius),
        )

    def for_evaluation(self) -> Self:
        """The same attack, returning its best iterate unless `iterate` says otherwise."""
        return dataclasses.replace(self, iterate=self.iterate or "best")

    def until_fooled(self) -> Self:
        # A record once fooled needs no more steps.
        return dataclasses.replace(self.for_evaluation(), stop_when_fooled=True)

    def increasing(self, inner_loss: str, start_radius: float | None) -> Self:
        """The attack on `inner_loss`; one whose loss is not "ce" was chosen so, and stays."""
        if self.loss != "ce" or inner_loss == "ce":
            return self
        start = self.start_radius
        if start is None and start_radius is not None:
            start = min(start_radius * narrowest_width(self.inputs), self.ball.eps) or None
        return dataclasses.replace(self, loss=inner_loss, start_radius=start)

    def probe(self) -> Self:
        """PGD-10 at the radius that is defended."""
        eps, start, step = self.ball.eps, self.start_radius, self.step_size
        if self.steps == 1 and start and step and math.isclose(start + step, eps):
            eps = step  # N-FGSM: noise outside ε, one step of ε, and a ball that holds both
        return dataclasses.replace(
            self,
            ball=self.ball.with_eps(eps),
            steps=10,
            step_size=None,
            random_start=True,
            start_radius=None,
            restarts=1,
            iterate=None,
            stop_when_fooled=False,
        )

    def __call__(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        *,
        generator: torch.Generator | None = None,
        chunk_size: int | str | None = "auto",
        eps: float | Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """x_adv of `perturb`; warns where gradients were not finite."""
        result = self.perturb(
            model, x, y, generator=generator, chunk_size=chunk_size, eps=eps, mask=mask
        )
        broken = int(result.nonfinite_gradients)
        if broken:
            warnings.warn(
                f"{broken} of {result.gradients} input gradients were not finite; the attack is "
                "weaker than it looks. Look for overflow in the model (fp16?) or a loss of log(0).",
                stacklevel=2,
            )
        return result.x_adv

    def perturb(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        *,
        generator: torch.Generator | None = None,
        chunk_size: int | str | None = "auto",
        eps: float | Tensor | None = None,
        mask: Tensor | None = None,
    ) -> AttackResult:
        """Attack a batch; arguments that are not explained here are those of `Attack.perturb`.

        Args:
            y: targets `[N]` (or whatever the loss takes, one row a record).
            generator: source of the random start. The global RNG is never read, so pass a seeded
                one for results that repeat.
            chunk_size: most rows to run through the model at once; the random start is drawn for
                the whole batch first, so the result does not depend on it. "auto": on a GPU what
                fits into its memory, elsewhere what stays warm. A chunk that does not fit after
                all is halved.
            eps: another radius than the ball's: a number, or one for each record, `[N]`. Step size
                and start scale along.
            mask: True where x may change; any shape that broadcasts to x's.

        Returns:
            x_adv, detached, and the counts of gradients, which are left on the device.
        """
        check_batch(x, y, channels_last=self.channels_last)
        check_chunk_size(chunk_size)
        if len(x) == 0:
            return AttackResult(x.detach().clone())
        if generator is None:
            generator = torch.Generator(device=x.device)
            generator.seed()
        graphed = self.cuda_graphs and not self.stop_when_fooled
        graphed = graphed and cuda_graphs.may_capture(model, x)
        with no_trace(model, x.device, freeze=graphed or not keeps_casts(self.precision, x.device)):
            # Clones made here are ordinary tensors even where x was made in inference mode.
            layout = torch.channels_last if self.channels_last else torch.preserve_format
            clean, y = x.detach().clone(memory_format=layout), y.detach().clone()
            problem = self._problem(clean, y, eps, mask)
            judge = as_now(x.device) if self.precision and self.stop_when_fooled else None
            with autocast(self.precision, x.device):
                restarts = Restarts(
                    problem,
                    start=partial(self.start, problem, generator),
                    ascent=partial(self.ascent, model, judge),
                    steps=self.steps,
                    restarts=self.restarts,
                    stop_when_fooled=self.stop_when_fooled,
                    graphed=graphed,
                    size=self._chunk_size(model, x),
                    asked=chunk_size,
                )
                x_adv = torch.empty_like(x).copy_(problem.result(restarts.best()))
        return AttackResult(x_adv, restarts.counts)

    _perturb = perturb  # which leaves no trace by itself

    def _problem(
        self, x: Tensor, y: Tensor, eps: float | Tensor | None, mask: Tensor | None
    ) -> Problem:
        compute = x.to(torch.promote_types(x.dtype, torch.float32))
        raw = self.inputs.to_raw(compute)
        self.inputs.check(raw, x.dtype)
        region = self.inputs.region(raw, self.ball.eps if eps is None else eps, mask)
        low, high = self.inputs.bounds(compute)
        std = None
        if (moments := self.inputs.moments(compute)) is not None:
            mean, std = moments
            low, high = (low - mean) / std, (high - mean) / std
        return Problem(
            x=compute,
            y=y,
            target=y,
            region=region,
            step_size=self._scaled(self.step_size, 2.5 / self.steps, region.eps),
            std=std,
            box=(low, high),
            dtype=x.dtype,
        )

    def _scaled(self, value: float | None, default: float, eps: Tensor) -> Tensor:
        """A length that is `value` at the ball's own radius and grows with the radius in force."""
        if value is None:
            return eps * default
        return eps * (value / self.ball.eps) if self.ball.eps else torch.full_like(eps, value)

    def start(self, problem: Problem, generator: torch.Generator) -> Tensor:
        """δ₀ of every record of the batch."""
        region = problem.region
        if not self.random_start:
            return torch.zeros_like(problem.x)
        radius = self._scaled(self.start_radius, self.ball.start_share, region.eps)
        delta = self.ball.random_start(problem.x, generator, eps=radius, free=region.free)
        # A start wider than the ball comes back to it: it may be the best that is found.
        return self.ball.project_(delta, region)

    def ascent(
        self, model: Model, judge: Context | None, problem: Problem, delta: Tensor
    ) -> Ascent:
        """One run over some records, from `delta`, which it moves."""
        if self.loss == "kl":
            # Not under no_grad: autocast would keep casts of the weights without their graph.
            clean = in_full_precision(logits_of(model(problem.apply(torch.zeros_like(delta)))))
            problem = dataclasses.replace(problem, target=clean.detach())
        return Ascent(
            model=model,
            loss=loss_of(self.loss, targeted=self.targeted),
            ball=self.ball,
            problem=problem,
            delta=delta,
            targeted=self.targeted,
            nan_fools=self.precision is None,
            judge=judge,
            best=Best.none(delta) if self.iterate == "best" else None,
            counts=torch.zeros(2, dtype=torch.int64, device=delta.device),
        )

    def _chunk_size(self, model: Model, x: Tensor) -> ChunkSize:
        autocast = torch.is_autocast_enabled(x.device.type)
        key = (x.shape[1:], x.dtype, self.ball.name, self.iterate, self.precision, autocast)
        return ChunkSize(model, key, x.device, SHARE)
