"""The guard between the optimizer and the weights: only released gradients pass."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from defend.batching.digest import sum_of_bits
from defend.errors import PrivacyError
from defend.privacy.mechanism.release_mark import ReleaseMark


class StepGuard:
    """Hooks that let the user's own optimizer step on released gradients alone.

    *Guarantee.* Between two calls of `begin` the weights move only in one step of the optimizer,
    on the gradients that were in every `p.grad` at `note_release`, or a multiple of them all. Any
    other step, any gradient that was added to or changed after the release, and any weight that
    moved in another way is an error.

    Args:
        module: the model.
        optimizer: its optimizer.
        parameters: those that train.
        forget: drops every raw gradient; called before a refusal that finds some.

    Attributes:
        holds_release: whether a gradient was released that no step was taken on yet.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        parameters: Sequence[nn.Parameter],
        forget: Callable[[], None],
    ) -> None:
        self.holds_release = False
        self._mark: ReleaseMark | None = None  # of the last release
        self._stepping = False  # between the start of a step on a release and its end
        self._module, self._optimizer = module, optimizer
        self._parameters, self._forget = parameters, forget
        self._batch_norms = [m for m in module.modules() if isinstance(m, _BatchNorm)]
        self._weights = _fingerprint(parameters)
        self._hooks: list[RemovableHandle] = [
            optimizer.register_step_pre_hook(self._refuse_unreleased),
            optimizer.register_step_post_hook(self._note_weights),
            *(p.register_post_accumulate_grad_hook(self._refuse_late) for p in parameters),
        ]

    def begin(self) -> None:
        """A new batch starts: nothing but the optimizer's step may have moved the weights."""
        self._stepping = False
        self._refuse_moved_weights("between a step and the next batch")

    def refuse_moving_statistics(self) -> None:
        """A frozen BatchNorm is safe as long as it stays in eval mode."""
        if any(m.training for m in self._batch_norms):
            raise PrivacyError(
                "Expected frozen BatchNorm layers to stay in eval mode, got one in train mode: it "
                "mixes the records of a batch. Override `train()` to keep it in eval mode, or use "
                "GroupNorm."
            )

    def check_release(self) -> None:
        """Before a sum is charged and noised: only known parameters, no hooks, the same weights."""
        self._refuse_strays()
        # One hook on each parameter is our own.
        if any(
            p._backward_hooks or len(p._post_accumulate_grad_hooks) > 1 for p in self._parameters
        ):
            raise PrivacyError(
                "Expected no gradient hooks on parameters, got one that was added during the fit. "
                "It sees gradients before clipping and noise. Remove it."
            )
        self._refuse_moved_weights("between a batch and its step")

    def note_release(self) -> None:
        """The gradients in every `p.grad` are released: one step may be taken on them."""
        self.holds_release = True
        # Hooks that were added since run before ours.
        hooks = self._optimizer._optimizer_step_pre_hooks
        hooks.move_to_end(self._hooks[0].id)  # type: ignore[attr-defined]
        self._mark = ReleaseMark(self._parameters)

    def remove(self) -> None:
        """Take the hooks away; the optimizer then steps on whatever it is given."""
        for hook in self._hooks:
            hook.remove()

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
        self._weights = _fingerprint(self._parameters)

    def _refuse_moved_weights(self, when: str) -> None:
        """Nothing but a released gradient, through the optimizer, may move the weights."""
        if not torch.equal(self._weights, _fingerprint(self._parameters)):
            raise PrivacyError(
                f"Expected the weights to stand still {when}, got weights that changed. Something "
                "updates them behind the optimizer: a second optimizer, a loaded state, an update "
                "by hand. To project the weights after each step, do it in the optimizer's step."
            )

    def _refuse_late(self, parameter: Tensor) -> None:
        """Hook on each accumulated gradient: none may be added to a released one."""
        if self.holds_release or self._stepping:
            self.holds_release = self._stepping = False  # whoever swallows this gets no step either
            self._forget()
            raise PrivacyError(
                "Expected no backward between the release of a gradient and its step, got one: it "
                "would add a gradient without clip and noise. Run it before, or under "
                "torch.autograd.grad."
            )

    def _refuse_strays(self) -> None:
        """Only the parameters known at the start may train."""
        known = {id(p) for p in self._parameters}
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
        if not self.holds_release:
            self._forget()
            raise PrivacyError(
                "Expected one noised gradient for each optimizer step, got a step on gradients "
                "without noise. Let the training loop take the steps: one batch, one step."
            )
        if self._mark is not None and not self._mark.is_kept():
            self.holds_release = False
            self._forget()
            raise PrivacyError(
                "Expected the released gradient to reach the optimizer as it is, or scaled as a "
                "whole, got one that was changed after the noise was added (by a hook before the "
                "optimizer's step, or in configure_gradient_clipping?). Nobody can tell whether it "
                "still depends on the release alone. Do it in the step of the optimizer."
            )
        self.holds_release, self._stepping = False, True


def _fingerprint(parameters: Sequence[Tensor]) -> Tensor:
    return torch.stack([sum_of_bits(p.detach()) for p in parameters])
