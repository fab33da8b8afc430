"""One logical DP-SGD step, in chunks: the state machine between backward and optimizer.step."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from defend.errors import PrivacyError
from defend.privacy.gradients.per_record import PerRecordGradients
from defend.privacy.mechanism.clipping import AdaptiveClipping, Clipping, FlatClipping
from defend.privacy.mechanism.gaussian import add_noise_
from defend.privacy.mechanism.randomness import Randomness


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

    The optimizer is the user's own. A hook on it refuses any step whose gradients were not
    released by this object, so that no un-noised gradient ever reaches the weights.

    Args:
        module: the model; per-record hooks are installed on it.
        optimizer: its optimizer, holding exactly the trainable parameters.
        noise_multiplier: σ ≥ 0.
        max_grad_norm: C > 0. Both may be set anew before any `begin`; adaptive clipping moves C.
        expected_batch_size: B = q · N over all processes; what the sum is divided by.
        randomness: source of the noise.
        charge: called with σ and C once a step *before* its noise is added; returns the number of
            the step, which its noise is drawn for, or raises to prevent it.
        clipping: how records are clipped.
        views: rows of a record, which stand next to each other in a chunk. Their mean gradient is
            the record's, and is clipped once.
        keep_release: whether `released` is to be filled, at the memory of one more gradient.
        loss_reduction: whether the backward of a chunk starts from a "mean" or a "sum".
        rank: this process.
        world_size: all processes.

    Attributes:
        released: with `keep_release` the last gradient that was released, noise and all, by
            parameter name; empty before the first. Whatever is computed from it costs no ε.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        *,
        noise_multiplier: float,
        max_grad_norm: float,
        expected_batch_size: float,
        randomness: Randomness,
        charge: Callable[[float, float], int],
        clipping: Clipping = FlatClipping(),
        views: int = 1,
        keep_release: bool = False,
        loss_reduction: Literal["mean", "sum"] = "mean",
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.noise_multiplier = noise_multiplier
        self.max_grad_norm = max_grad_norm
        self.expected_batch_size = expected_batch_size
        self.randomness = randomness
        self.rank = rank
        self.world_size = world_size
        self.clipping = clipping
        self.views = views
        self.keep_release = keep_release
        self.released: dict[str, Tensor] = {}
        self._charge = charge
        self._sums: list[Tensor] | None = None
        self._count: Tensor | None = None
        self._expected: tuple[int, int] | None = None
        self._released = False
        self._stepping = False  # between the start of a step on a release and its end
        self._module = module
        self._batch_norms = [m for m in module.modules() if isinstance(m, _BatchNorm)]
        self._optimizer = optimizer
        self._per_record = PerRecordGradients(module, views=views, loss_reduction=loss_reduction)
        for p in module.parameters():
            if not p.requires_grad:
                p.grad = None  # of an earlier, public training
        self._weights = _fingerprint(self.parameters)
        self._hooks: list[RemovableHandle] = [
            optimizer.register_step_pre_hook(self._refuse_unreleased),
            optimizer.register_step_post_hook(self._note_weights),
            *(p.register_post_accumulate_grad_hook(self._refuse_late) for p in self.parameters),
        ]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters, in the order of every list of gradients here."""
        return list(self._per_record.parameters.values())

    def begin(self) -> None:
        """Open a logical batch.

        Raises:
            PrivacyError: if the last one was never stepped on. Every sampled batch is accounted
                as one release; to drop some of them is another mechanism.
        """
        if self._sums is not None or self._released:
            raise PrivacyError(
                "Expected one optimizer step for each batch, got a batch without one. Do not skip "
                "steps in `optimizer_step`; raise batch_size instead of accumulating."
            )
        self._per_record.clear()
        self._expected = None
        self._count = None
        self._stepping = False
        self._refuse_moved_weights("between a step and the next batch")

    def expect(self, rows: int, records: int) -> None:
        """Announce a chunk of `rows` rows, views included; its first `records` records count."""
        self._expected = (rows, records)
        self._per_record.expect(rows)

    def paused(self) -> AbstractContextManager[None]:
        """Inside, forward and backward on the module leave no per-record gradients."""
        return self._per_record.paused()

    @property
    def pending(self) -> bool:
        """Whether a chunk was announced that is not folded yet."""
        return self._expected is not None

    def discard(self) -> None:
        """Forget the chunk that was announced last, say because memory ran out in the middle."""
        self._expected = None
        self._per_record.clear()

    def fold(self) -> None:
        """After a chunk's backward: clip each record, add to the sum, drop its gradients."""
        if self._expected is None:
            raise PrivacyError("Expected `expect(rows, records)` before `fold()`.")
        rows, records = self._expected
        self._expected = None
        gradients = self._per_record.read(rows)
        held, weights = rows // self.views, None
        if records < held:
            weights = (torch.arange(held, device=gradients[0].device) < records).float()
        self._refuse_moving_statistics()
        sums, count = self.clipping.clip(gradients, self.max_grad_norm, weights)
        if self._sums is None:
            self._sums, self._count = sums, count
        else:
            for total, part in zip(self._sums, sums, strict=True):
                total += part
            if count is not None:
                self._count = count if self._count is None else self._count + count
        self._per_record.clear()

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
        self._refuse_strays()
        # One hook on each parameter is our own.
        if any(
            p._backward_hooks or len(p._post_accumulate_grad_hooks) > 1 for p in self.parameters
        ):
            raise PrivacyError(
                "Expected no gradient hooks on parameters, got one that was added during the fit. "
                "It sees gradients before clipping and noise. Remove it."
            )
        self._refuse_moved_weights("between a batch and its step")
        if self._count is not None:
            sums.append(self._count.to(sums[0].dtype).reshape(()))
        error: Exception | None = None
        try:
            number = self._charge(self.noise_multiplier, self.max_grad_norm)
            if self.rank == 0:
                self._add_noise(sums, number)
        except Exception as caught:
            if self.world_size == 1:
                raise
            error = caught
        if self.world_size > 1:
            sums = _sum_over_processes(sums, error)
        for (name, parameter), total in zip(
            self._per_record.parameters.items(), sums, strict=False
        ):
            parameter.grad = (total / self.expected_batch_size).to(parameter.dtype)
            if self.keep_release:
                self.released[name] = parameter.grad.clone()  # others may add to theirs
        if isinstance(self.clipping, AdaptiveClipping):
            self.max_grad_norm = self.clipping.update(
                self.max_grad_norm, float(sums[-1]), self.expected_batch_size
            )
        self._released = True

    def _add_noise(self, sums: list[Tensor], number: int) -> None:
        device, sigma = sums[0].device, self.noise_multiplier
        gradients = sums
        if isinstance(self.clipping, AdaptiveClipping):
            *gradients, count = sums
            deviation = self.clipping.count_deviation(sigma, self.expected_batch_size)
            add_noise_(
                [count],
                deviation=deviation if sigma else 0.0,
                draw=self.randomness.gaussian(number, device, "count"),
            )
            sigma = self.clipping.gradient_multiplier(sigma, self.expected_batch_size)
        add_noise_(
            gradients,
            deviation=sigma * self.max_grad_norm,
            draw=self.randomness.gaussian(number, device),
        )

    def close(self) -> None:
        """Remove every hook and every private gradient."""
        for hook in self._hooks:
            hook.remove()
        self._sums = self._count = None
        self.released = {}
        self._per_record.remove()

    def _refuse_unreleased(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Optimizer pre-hook. A closure computes gradients inside the step: check after it."""
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._use_release()
            return None

        def checked() -> Any:
            result = closure()
            self._use_release()
            return result

        if len(args) > 1:
            return (args[0], checked, *args[2:]), kwargs
        return args, {**kwargs, "closure": checked}

    def _note_weights(self, *_: Any) -> None:
        """Optimizer post-hook: what a released gradient made of the weights."""
        self._stepping = False
        self._weights = _fingerprint(self.parameters)

    def _refuse_moved_weights(self, when: str) -> None:
        """Nothing but a released gradient, through the optimizer, may move the weights."""
        if not torch.equal(self._weights, _fingerprint(self.parameters)):
            raise PrivacyError(
                f"Expected the weights to stand still {when}, got weights that changed. Something "
                "updates them behind the optimizer: a second optimizer, a loaded state, an update "
                "by hand. To project the weights after each step, do it in the optimizer's step."
            )

    def _refuse_late(self, parameter: Tensor) -> None:
        """Hook on each accumulated gradient: none may be added to a released one."""
        if self._released or self._stepping:
            self._released = self._stepping = False  # whoever swallows this gets no step either
            self._per_record.clear()
            raise PrivacyError(
                "Expected no backward between the release of a gradient and its step, got one: it "
                "would add a gradient without clip and noise. Run it before, or under "
                "torch.autograd.grad."
            )

    def _refuse_moving_statistics(self) -> None:
        """A frozen BatchNorm is safe as long as it stays in eval mode."""
        if any(m.training for m in self._batch_norms):
            raise PrivacyError(
                "Expected frozen BatchNorm layers to stay in eval mode, got one in train mode: it "
                "mixes the records of a batch. Override `train()` to keep it in eval mode, or use "
                "GroupNorm."
            )

    def _refuse_strays(self) -> None:
        """Only the parameters known at the start may train."""
        known = {id(p) for p in self.parameters}
        held = [p for group in self._optimizer.param_groups for p in group["params"]]
        strays = {
            id(p): p
            for p in (*self._module.parameters(), *held)
            if id(p) not in known and (p.requires_grad or p.grad is not None)
        }
        for p in strays.values():
            p.grad = None
        if strays:
            raise PrivacyError(
                f"Expected the parameters that were trainable at the start, got {len(strays)} more "
                "(unfrozen, or added to the optimizer). Their gradients are neither clipped nor "
                "noised. Decide what trains before fit; fit again to train more."
            )

    def _use_release(self) -> None:
        if self._stepping:  # torch hooks a subclass's step, and the base's that it calls
            return
        self._refuse_strays()
        if not self._released:
            self._per_record.clear()
            raise PrivacyError(
                "Expected one noised gradient for each optimizer step, got a step on gradients "
                "without noise. Let the training loop take the steps: one batch, one step."
            )
        self._released, self._stepping = False, True


def _fingerprint(parameters: Sequence[Tensor]) -> Tensor:
    """The sum of the bits of each parameter: any single value that changes, changes it."""
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    with torch.no_grad():
        return torch.stack([p.detach().view(kinds[p.element_size()]).sum() for p in parameters])


def _sum_over_processes(sums: list[Tensor], error: Exception | None) -> list[Tensor]:
    """The sums over all processes, in one message; an error on one is an error on all.

    A process that failed (a full disk under the ledger) takes part with zeros, so that the others
    do not wait for it, and tells them by one more number.
    """
    failed = sums[0].new_tensor(0.0 if error is None else 1.0)
    flat = torch.cat([s.flatten() for s in (*sums, failed)])
    if error is not None:
        flat[:-1] = 0
    dist.all_reduce(flat)
    if error is not None:
        raise error
    if flat[-1] > 0:
        raise PrivacyError(
            "Expected every process to account for the step, got an error on another one. See its "
            "message; nothing was released."
        )
    parts = flat[:-1].split([s.numel() for s in sums])
    return [part.view_as(s) for part, s in zip(parts, sums, strict=True)]
