"""Adversarial weight perturbation: the gradient is taken where the weights are worst, too."""

import dataclasses
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from defend.errors import InputError
from defend.objectives.base import Objective
from defend.objectives.madry import Madry


@dataclasses.dataclass(frozen=True)
class AWP(Objective):
    r"""Adversarial weight perturbation (Wu et al. 2020, arXiv 2004.05884), around an objective.

        min_θ E[ max_{v ∈ V} loss(θ + v) ],     V: ‖v_l‖ ≤ γ · ‖θ_l‖ for each layer l

    One step of ascent on the weights gives v (`weight_perturbation`), the gradient is taken at
    θ + v (`PerturbedWeights`), and the optimizer's step starts from θ. It costs one more forward
    and backward, and a copy of the weights. The losses are those of the objective inside.

    *Guarantees.* θ is put back bit for bit before the optimizer's step. v depends on all records
    of the batch, and so does then each record's gradient, which DP-SGD does not allow: beside
    `DifferentialPrivacy` v follows the gradient that was released last, noise and all
    (`perturbation_along`). It then costs no further pass, and the first step of a fit, or after a
    resume, goes without it.

    Args:
        objective: what to minimize, for example `TRADES(6.0)`.
        gamma: γ > 0, the size of v beside that of the weights. The paper has 0.01 with Madry and
            0.005 with TRADES; the default is 0.01 with either.

    Raises:
        InputError: if γ is not positive and finite, or `objective` is none, or an AWP.
    """

    objective: Objective = dataclasses.field(default_factory=Madry)
    gamma: float = 0.01

    def __post_init__(self) -> None:
        if not isinstance(self.objective, Objective) or isinstance(self.objective, AWP):
            raise InputError(
                "Expected `objective` to be an objective such as Madry() or TRADES(), other than "
                f"AWP, got {self.objective!r}. Wrap it once."
            )
        check_gamma(self.gamma)

    @property
    def name(self) -> str:
        return f"awp({self.objective.name})"

    @property
    def inner_loss(self) -> Literal["ce", "kl"]:
        return self.objective.inner_loss

    @property
    def start_radius(self) -> float | None:
        return self.objective.start_radius

    @property
    def trains_on(self) -> Literal["adversarial", "clean"]:
        return self.objective.trains_on

    @property
    def pairs(self) -> bool:
        return self.objective.pairs

    def _penalty(self, clean_logits: Tensor, adv_logits: Tensor, y: Tensor) -> Tensor:
        return self.objective._penalty(clean_logits, adv_logits, y)


def check_gamma(gamma: float) -> None:
    """Refuse a size that is not positive and finite."""
    if not 0 < gamma < float("inf"):
        raise InputError(
            f"Expected `gamma` to be a finite number > 0, got {gamma}. Give the size of the "
            "perturbation beside that of the weights, for example 0.01."
        )


def as_logits(output: Any) -> Tensor:
    """A model's output that is its logits."""
    if isinstance(output, Tensor):
        return output
    raise InputError(
        f"Expected the model's forward to return logits, got {type(output).__name__}. Pass "
        "`logits`, a function from that output to logits [N, classes]."
    )


def weight_perturbation(
    module: nn.Module,
    objective: Objective,
    x: Tensor,
    x_adv: Tensor,
    y: Tensor,
    gamma: float,
    *,
    logits: Callable[[Any], Tensor] = as_logits,
) -> dict[str, Tensor]:
    r"""One normalized step up the objective, for the weights of each layer.

        v_l = γ · ‖w_l‖₂ · g_l / ‖g_l‖₂,     g_l = ∇_{w_l} Σᵢ lossᵢ

    for the parameters that require a gradient and have more than one dimension. Scales and
    offsets, of normalizations too, are left alone: small changes of them would count as large.
    The sum over records has the direction of the mean, and in half precision small gradients
    outlive it.

    *Guarantees.* Weights, buffers (BatchNorm's statistics), `.grad` and the global RNG of the CPU
    and of x's device are left as they were. The step's own dropout masks come from where the RNG
    stood, so the training step that follows may draw the same ones. Modes are the module's own.
    Among several processes each takes its own rows and so has its own v; as the weights are put
    back before they step, they stay equal.

    Args:
        module: the model, not wrapped for DDP; module(x) gives logits `[N, classes]`.
        objective: whose loss to increase.
        x: clean inputs `[N, ...]`; run through the model only where the objective `pairs`.
        x_adv: adversarial inputs `[N, ...]`.
        y: class indices `[N]`, or class probabilities `[N, classes]`.
        gamma: γ > 0.
        logits: from what the module returns to its logits.

    Returns:
        v_l by parameter name, as `named_parameters` has it; tied weights once. Zero where g_l is
        zero or not finite.

    Raises:
        InputError: if γ is not positive and finite, if the loss depends on no such parameter, or
            if the module's output is not logits.
    """
    check_gamma(gamma)
    moved = [name for name, p in module.named_parameters() if p.requires_grad and p.ndim > 1]
    # Detached: the module's own parameters get no graph and no gradient.
    weights = {name: p.detach() for name, p in module.named_parameters()}
    for name in moved:
        weights[name].requires_grad_()
    # A forward in train mode writes to buffers, so it gets copies to write to.
    buffers = {name: buffer.detach().clone() for name, buffer in module.named_buffers()}

    def run(inputs: Tensor) -> Tensor:
        return logits(torch.func.functional_call(module, (weights, buffers), (inputs,)))

    forked = [x.device] if x.device.type == "cuda" else []
    with torch.random.fork_rng(forked, device_type="cuda"), torch.enable_grad():
        loss = objective.losses(run(x) if objective.pairs else None, run(x_adv), y).sum()
        steps = _steps_up(loss, [weights[name] for name in moved], gamma)
    return dict(zip(moved, steps, strict=True))


def perturbation_along(
    module: nn.Module, gradient: Mapping[str, Tensor], gamma: float
) -> dict[str, Tensor]:
    r"""`weight_perturbation` along a gradient that is there already: v_l = γ · ‖w_l‖ · g_l / ‖g_l‖.

    In private training, along the last released gradient: noised as it is, it costs no ε and does
    not depend on who is in this batch (Park et al. 2023, arXiv 2306.05651).

    Args:
        module: the model.
        gradient: by parameter name. Parameters that it does not name stay.
        gamma: γ > 0.

    Returns:
        v_l by parameter name, for those with more than one dimension.

    Raises:
        InputError: if γ is not positive and finite.
    """
    check_gamma(gamma)
    return {
        name: ascent(p.detach(), gradient[name], gamma)
        for name, p in module.named_parameters()
        if p.requires_grad and p.ndim > 1 and name in gradient
    }


def _steps_up(loss: Tensor, weights: list[Tensor], gamma: float) -> list[Tensor]:
    if not weights or not loss.requires_grad:
        raise InputError(
            "Expected a loss that depends on trainable parameters of more than one dimension, "
            "got none to perturb. Unfreeze the model, or take the objective without AWP."
        )
    gradients = torch.autograd.grad(loss, weights, materialize_grads=True)
    return [ascent(w.detach(), g, gamma) for w, g in zip(weights, gradients, strict=True)]


def ascent(weight: Tensor, gradient: Tensor, gamma: float) -> Tensor:
    """γ · ‖w‖ · g / ‖g‖, of the shape and dtype of w; zero where g is zero or not finite."""
    g = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    # Divided by its largest value first: the squares of tiny gradients are zero.
    largest = g.abs().amax()
    g = g / torch.where(largest > 0, largest, 1.0)
    norm = torch.linalg.vector_norm(g)
    usable = norm.isfinite() & (norm > 0)
    size = gamma * torch.linalg.vector_norm(weight, dtype=g.dtype)
    direction = torch.where(usable, g / torch.where(usable, norm, 1.0), 0.0)
    return direction.mul_(size).to(weight.dtype)


class PerturbedWeights:
    """A module's weights, moved by a perturbation and put back bit for bit.

    Apply before the forward of a training step, restore after its backward and before the
    optimizer's step: the weights are written in place, which autograd refuses to overlook between
    a forward and its backward. As a context manager it restores after an exception too.

    Args:
        module: whose parameters to move.
        perturbation: what to add to them, by name, from `weight_perturbation`.

    Raises:
        InputError: if a name or a shape is not that of a parameter.
    """

    def __init__(self, module: nn.Module, perturbation: Mapping[str, Tensor]) -> None:
        parameters = dict(module.named_parameters())
        for name, step in perturbation.items():
            if name not in parameters or parameters[name].shape != step.shape:
                there = tuple(parameters[name].shape) if name in parameters else "no such parameter"
                raise InputError(
                    f"Expected a perturbation of the module's own parameters, got {name!r} of "
                    f"shape {tuple(step.shape)} for {there}. Compute it on the same module."
                )
        self._steps = [(parameters[name], step) for name, step in perturbation.items()]
        self._saved: list[tuple[nn.Parameter, Tensor]] = []

    @property
    def applied(self) -> bool:
        """Whether the weights are moved now."""
        return bool(self._saved)

    @torch.no_grad()
    def apply(self) -> None:
        """Add the perturbation to the weights.

        Raises:
            InputError: if it is applied already.
        """
        if self.applied:
            raise InputError(
                "Expected weights that are not perturbed, got a second `apply`. Call `restore` "
                "first."
            )
        self._saved = [(parameter, parameter.detach().clone()) for parameter, _ in self._steps]
        try:
            for parameter, step in self._steps:
                parameter.add_(step)
        except BaseException:
            self.restore()
            raise
        # Autocast keeps half-precision copies of weights, and would go on with those.
        torch.clear_autocast_cache()

    @torch.no_grad()
    def restore(self) -> None:
        """Write the saved weights back; nothing happens where none are saved."""
        for parameter, saved in self._saved:
            parameter.copy_(saved)
        self._saved = []
        torch.clear_autocast_cache()

    def __enter__(self) -> Self:
        self.apply()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.restore()
