"""One gradient a record, on the user's own module.

The module is not wrapped: its class, its forward and the keys of its state_dict stay as they are,
and no gradient of a record is ever stored on it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from defend.errors import IndistinctRowsError, PrivacyError
from defend.privacy.gradients.engine import GradientEngine
from defend.privacy.gradients.hooks import Call, LayerCalls
from defend.privacy.gradients.layers import Buffers, gradients_of, rule_of, trainable_layers
from defend.privacy.gradients.sums import per_record_norms, weighted_sum


class PerRecordGradients(GradientEngine):
    """The engine that holds gᵢ, the gradient of record i's loss, for every trainable parameter.

    *Guarantee.* Row i of a gradient comes from row i of what each layer was given and got back. A
    model that reorders or mixes rows between layers breaks this without a trace in shapes or sums;
    only a comparison with each record alone finds it (`defend.privacy.checks.selftest`).

    With K `views`, K rows in a row of the batch are one record: gᵢ is the mean of their gradients,
    taken as each layer's come in, so that no more than one layer's are held row by row.

    Args:
        module: the module to watch; hooks are installed at once.
        views: rows of a record, K ≥ 1.
        loss_reduction: whether backward starts from the "mean" over the rows or from their "sum".
            Prefer "sum" in half precision: the division by the rows rounds every gradient
            another way when one record is left out, and all of them then move a little.

    Raises:
        IndistinctRowsError: for layers whose per-record gradients cannot be had.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        views: int = 1,
        loss_reduction: Literal["mean", "sum"] = "mean",
    ) -> None:
        self.views = views
        self.loss_reduction = loss_reduction
        self.parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self._trained: set[Tensor] = set(self.parameters.values())
        self._checked: set[tuple[str, int | None]] = set()
        self._gradients: dict[Tensor, Tensor] = {}
        self._measured: tuple[list[Tensor], Tensor] | None = None  # gradients and their norms
        self._by_formula: set[Tensor] = set()
        self._other_rows: dict[Tensor, int] = {}
        self._repeated: set[Tensor] = set()
        self._calls = LayerCalls(module, self._receive, self._repeat)
        without_rule = (m for m in trainable_layers(module) if rule_of(m) is None)
        self._computed_again = [m for m in without_rule if next(m.buffers(), None) is not None]
        self._buffers: dict[nn.Module, Buffers] = {}

    def __getstate__(self) -> dict[str, Any]:
        """A copied or pickled module takes its hooks along, but no record's gradient."""
        return {**vars(self), "_gradients": {}, "_measured": None}

    def expect(self, rows: int) -> None:
        """Announce the next batch, before its forward.

        Ids of shape `[1, T]` that are looked up in an nn.Embedding and broadcast over the batch
        (positions, say) are then looked up once a row, so that each record has its own gradient.

        Args:
            rows: rows that will be in the batch, padding and all views included; at least 1.

        Raises:
            PrivacyError: if they are no whole number of records.
        """
        if rows % self.views:
            raise PrivacyError(
                f"Expected a multiple of {self.views} rows, {self.views} a record, got {rows}. "
                "Keep the views of a record together."
            )
        self._calls.rows = rows
        self._buffers = {m: Buffers(m) for m in self._computed_again}

    @property
    def holds_any(self) -> bool:
        """Whether a per-record gradient has come in since the last `clear()`."""
        return bool(self._gradients)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, forward and backward leave no per-record gradients."""
        before = self._calls.hooks_enabled
        self._calls.disable_hooks()
        try:
            yield
        finally:
            self._calls.hooks_enabled = before

    def read(self, rows: int) -> list[Tensor]:
        """The per-record gradients of the last backward, `[records, *shape]` for each parameter.

        A parameter that the loss did not use gets zeros.

        Args:
            rows: rows that were in the batch, padding and all views included.

        Raises:
            PrivacyError: if a parameter has a gradient but none per record, if records were
                counted more than once, or if no gradient came at all.
        """
        gradients = [self._of(n, p, rows) for n, p in self.parameters.items()]
        self._compare_with_autograd(gradients, rows)
        if all(g is None for g in gradients):
            raise PrivacyError(
                "Expected `training_step` to return a loss that depends on the parameters, got no "
                "gradient at all. A batch may not be skipped: return a loss for every batch."
            )
        return [
            p.new_zeros((rows // self.views, *p.shape)) if g is None else g
            for g, p in zip(gradients, self.parameters.values(), strict=True)
        ]

    def norms(self, rows: int, *, grouped: bool) -> Tensor:
        """‖gᵢ‖₂ of each record, after all checks of `read`."""
        gradients = self.read(rows)
        norms = per_record_norms(gradients, grouped=grouped)
        self._measured = gradients, norms
        return norms

    def weighted_sum(self, factors: Tensor) -> list[Tensor]:
        """Σᵢ fᵢ gᵢ of the gradients whose norms were asked for last."""
        assert self._measured is not None, "norms come before their sum"
        return weighted_sum(*self._measured, factors)

    def clear(self) -> None:
        """Forget all gradients, per record and summed, and how many rows were expected."""
        for parameter in self.parameters.values():
            parameter.grad = None
        self._gradients.clear()
        self._measured = None
        self._by_formula.clear()
        self._other_rows.clear()
        self._repeated.clear()
        self._calls.reset()

    def remove(self) -> None:
        """Take the hooks away and leave the module as it was, with no private gradient on it."""
        self.clear()
        self._calls.remove()

    def _repeat(self, module: nn.Module) -> None:
        self._repeated.update(module.parameters())

    def _receive(self, call: Call) -> None:
        """Add the gradients of one call to those of the batch."""
        if call.module in self._buffers:
            self._buffers[call.module].require_same()
        mean = self.loss_reduction == "mean"
        found = gradients_of(
            call.module,
            call.args,
            call.kwargs,
            call.gradient * call.rows if mean else call.gradient,
            place=call.place,
            autocast=call.autocast,
        )
        if rule_of(call.module) is not None:
            self._by_formula.update(found)
        elif call.module in self._buffers:
            self._buffers[call.module].require_same()
        for parameter, gradient in found.items():
            if parameter not in self._trained:
                continue
            if call.order is not None:
                of_records = gradient.new_zeros((call.rows, *parameter.shape))
                of_records[call.order[: len(gradient)]] = gradient
                gradient = of_records
            if len(gradient) != call.rows or len(gradient) % self.views:
                self._other_rows[parameter] = len(gradient)
            else:
                gradient = mean_of_views(gradient, self.views)
            earlier = self._gradients.get(parameter)
            if earlier is None:
                self._gradients[parameter] = gradient
            elif len(earlier) == len(gradient):
                # Not in place: a formula may return the very tensor that it was given.
                self._gradients[parameter] = earlier + gradient
            else:
                self._other_rows.setdefault(parameter, min(len(earlier), len(gradient)))

    def _of(self, name: str, parameter: nn.Parameter, rows: int) -> Tensor | None:
        gradient = self._gradients.get(parameter)
        if gradient is None:
            if parameter.grad is None:
                return None
            raise IndistinctRowsError(
                f"Expected a gradient per record for `{name}`, got only their sum: the weight is "
                "used outside its own module's forward. Call the module instead, or freeze it."
            )
        if parameter in self._repeated:
            raise IndistinctRowsError(
                f"Expected one backward a batch, got 2 or more for `{name}`: each would count "
                "every record again. Add the losses up and run one backward; let an attack run in "
                "AdversarialTraining or under `defend.attacks.no_trace`, but no gradient penalty: "
                "that would erase it."
            )
        found = self._other_rows.get(parameter, len(gradient) * self.views)
        if found != rows or parameter in self._other_rows:
            raise IndistinctRowsError(
                f"Expected {rows} rows, one a record, in the gradient of `{name}`, got {found}. "
                "Rows were concatenated, dropped or folded into the batch dimension on the way, or "
                "positions come before records, or all records share one row. Pass each record "
                "through as one row, records first; give position ids the shape [1, T]."
            )
        return gradient

    def _compare_with_autograd(self, gradients: Sequence[Tensor | None], rows: int) -> None:
        """The per-record gradients must add up to the gradient that autograd found.

        Checked once a parameter; once a batch size for layers without a formula, because what
        they share between rows is told from the rows by its size. The slack is for rounding: half
        precision rounds both, TF32 the one, and where the true gradient is zero (a bias before a
        normalization) both are rounding.
        """
        found = [
            (n, p.grad.to_dense().float(), g)
            for (n, p), g in zip(self.parameters.items(), gradients, strict=True)
            if g is not None and p.grad is not None and self._key(n, p, rows) not in self._checked
        ]
        if not found:
            return
        model = torch.stack([total.norm() for _, total, _ in found]).norm()
        for name, total, gradient in found:
            self._checked.add(self._key(name, self.parameters[name], rows))
            exact = gradient.dtype in (torch.float32, torch.float64)
            own, whole = (1e-2, 1e-4) if exact else (1e-1, 2e-2)
            found_total = gradient.float().sum(0) * self.views
            if self.loss_reduction == "mean":
                found_total /= rows
            difference = (found_total - total).norm()
            if difference > own * total.norm() + whole * model:
                raise IndistinctRowsError(
                    f"Expected per-record gradients of `{name}` that add up to its gradient, got a "
                    f"difference of {difference / total.norm():.0%}: the weight is also used "
                    "outside its own module's forward (F.linear(h, layer.weight), say), the layer "
                    "mixes rows, or the loss has a penalty on it. Call the module instead, treat "
                    "each row alone; for a penalty use the optimizer's weight_decay."
                )

    def _key(self, name: str, parameter: nn.Parameter, rows: int) -> tuple[str, int | None]:
        return name, None if parameter in self._by_formula else rows


def mean_of_views(gradient: Tensor, views: int) -> Tensor:
    """gᵢ = (1/K) Σₖ gᵢₖ.

    Args:
        gradient: of each row, `[records · K, *shape]`, the K rows of a record next to each other.
        views: K ≥ 1.

    Returns:
        `[records, *shape]`.
    """
    if views == 1:
        return gradient
    return gradient.unflatten(0, (-1, views)).mean(1)
