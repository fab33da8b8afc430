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
        self._padding = {
            m.weight: m.padding_idx
            for m in module.modules()
            if isinstance(m, nn.Embedding) and m.padding_idx is not None
        }
        # Opacus' backward hooks refuse in-place activations; out of place they compute the same.
        self._in_place = [m for m in module.modules() if getattr(m, "inplace", False) is True]
        try:
            self._hooks = GradSampleHooks(module, strict=True)
        except NotImplementedError as error:
            for parameter in module.parameters():
                for leftover in ("grad_sample", "_forward_counter"):
                    vars(parameter).pop(leftover, None)
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
        self._compare_with_autograd(gradients)
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
                "used outside its own module's forward, its module is in eval mode, or its forward "
                "ran again for another purpose or under a checkpoint. Call each module for the "
                "loss alone, compute what is only logged under torch.no_grad(), or freeze it."
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
        if parameter in self._padding:
            gradient[:, self._padding[parameter]] = 0  # Opacus fills what autograd leaves out
        return gradient

    def _compare_with_autograd(self, gradients: Sequence[Tensor | None]) -> None:
        """The mean of the per-record gradients must be the gradient that autograd found.

        Checked once a parameter. The slack is for rounding: half precision rounds both, TF32 the
        one, and where the true gradient is zero (a bias before a normalization) both are rounding.
        """
        found = [
            (n, p.grad.float(), g)
            for (n, p), g in zip(self.parameters.items(), gradients, strict=True)
            if g is not None and p.grad is not None and n not in self._checked
        ]
        if not found:
            return
        model = torch.stack([total.norm() for _, total, _ in found]).norm()
        for name, total, gradient in found:
            self._checked.add(name)
            exact = gradient.dtype in (torch.float32, torch.float64)
            own, whole = (1e-2, 1e-4) if exact else (1e-1, 2e-2)
            difference = (gradient.float().mean(0) - total).norm()
            if difference > own * total.norm() + whole * model:
                raise PrivacyError(
                    f"Expected per-record gradients of `{name}` that add up to its gradient, got a "
                    f"difference of {difference / total.norm():.0%}: the weight is also used "
                    "outside its own module's forward (F.linear(h, layer.weight), say), or the "
                    "loss has a penalty on it. Call the module instead; for a penalty use the "
                    "optimizer's weight_decay."
                )

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
