"""One gradient a record, by Opacus' hooks, on the user's own module.

The only importer of `opacus.grad_sample`. The module is not wrapped: its class, its forward and
the keys of its state_dict stay as they are.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from defend.errors import PrivacyError


class PerRecordGradients:
    """Hooks that leave gᵢ, the gradient of record i's loss, on every trainable parameter.

    Assumes a loss that is the mean over the rows of a batch, as Lightning users write it: the
    hooks multiply by the number of rows.

    Args:
        module: the module to watch; hooks are installed at once.

    Raises:
        PrivacyError: for layers whose per-record gradients cannot be had.
    """

    def __init__(self, module: nn.Module) -> None:
        from opacus.grad_sample import GradSampleHooks

        self.module = module
        self.parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self._checked: set[str] = set()
        # Opacus' backward hooks refuse in-place activations; out of place they compute the same.
        self._in_place = [m for m in module.modules() if getattr(m, "inplace", False) is True]
        try:
            self._hooks = GradSampleHooks(module, strict=True)
        except NotImplementedError as error:
            raise PrivacyError(
                "Expected layers whose per-record gradients can be computed, got one that cannot: "
                f"{error} Replace it, or freeze its parameters."
            ) from error
        for m in self._in_place:
            m.inplace = False  # type: ignore[assignment]

    def read(self, rows: int) -> list[Tensor]:
        """The per-record gradients of the last backward, `[rows, *shape]` for each parameter.

        A parameter that the loss did not use gets zeros.

        Args:
            rows: rows that were in the batch, padding included.

        Raises:
            PrivacyError: if a parameter has a gradient but none per record, if records were
                counted more than once, or if no gradient came at all.
        """
        gradients = [self._of(n, p, rows) for n, p in self.parameters.items()]
        if all(g is None for g in gradients):
            raise PrivacyError(
                "Expected `training_step` to return a loss that depends on the parameters, got no "
                "gradient at all. A batch may not be skipped: return a loss for every batch."
            )
        return [
            p.new_zeros((rows, *p.shape)) if g is None else g
            for g, p in zip(gradients, self.parameters.values(), strict=True)
        ]

    def _of(self, name: str, parameter: nn.Parameter, rows: int) -> Tensor | None:
        gradient = getattr(parameter, "grad_sample", None)
        if gradient is None:
            if parameter.grad is None:
                return None
            raise PrivacyError(
                f"Expected a gradient per record for `{name}`, got only their sum: the weight is "
                "used outside its own module's forward, or its module is in eval mode. Call the "
                "module instead of using its weight, or freeze the parameter."
            )
        if isinstance(gradient, Sequence):
            raise PrivacyError(
                f"Expected one backward a batch, got {len(gradient)} for `{name}`: each would "
                "count every record again. Add the losses up and run one backward."
            )
        if gradient.shape[0] != rows:
            raise PrivacyError(
                f"Expected {rows} rows, one a record, in the gradient of `{name}`, got "
                f"{gradient.shape[0]}. Rows were concatenated, dropped or folded into the batch "
                "dimension on the way; pass each record through as one row."
            )
        if name not in self._checked:
            self._checked.add(name)
            _compare_with_autograd(name, parameter, gradient)
        return gradient

    def clear(self) -> None:
        """Forget all gradients, per record and summed, and any activations kept for them."""
        for parameter in self.parameters.values():
            parameter.grad = None
            parameter.grad_sample = None  # type: ignore[attr-defined]
            if hasattr(parameter, "_forward_counter"):
                parameter._forward_counter = 0
            if hasattr(parameter, "_current_grad_sample"):
                del parameter._current_grad_sample
        for module in self.module.modules():
            for leftover in ("activations", "max_batch_len"):
                module.__dict__.pop(leftover, None)

    def remove(self) -> None:
        """Take the hooks away and leave the module as it was, with no private gradient on it."""
        self.clear()
        self._hooks.cleanup()
        for m in self._in_place:
            m.inplace = True  # type: ignore[assignment]


def _compare_with_autograd(name: str, parameter: nn.Parameter, gradient: Tensor) -> None:
    """The mean of the per-record gradients must be the gradient that autograd found.

    Checked once a parameter. Half precision rounds both, and TF32 the one.
    """
    if parameter.grad is None:
        return
    mean, total = gradient.float().mean(0), parameter.grad.float()
    tolerance = 1e-2 if gradient.dtype in (torch.float32, torch.float64) else 1e-1
    if (mean - total).norm() <= tolerance * total.norm() + 1e-6:
        return
    raise PrivacyError(
        f"Expected per-record gradients of `{name}` that add up to its gradient, got a difference "
        f"of {(mean - total).norm() / total.norm():.0%}: the weight is also used outside its own "
        "module's forward (F.linear(h, layer.weight), say). Call the module instead."
    )
