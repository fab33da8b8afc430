"""What a step logs for one record after another, as one value a step."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


@dataclasses.dataclass
class _Held:
    """What was logged under one name."""

    value: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    numbers: list[Any] = dataclasses.field(default_factory=list)


class RecordLogs:
    """Holds back numbers that are logged while a step runs record by record.

    Args:
        log: what `self.log` ends in: (hook, name, value, ...).
    """

    def __init__(self, log: Callable[..., None]) -> None:
        self._log = log
        self._held: dict[tuple[str, str], _Held] = {}

    def log(self, fx: str, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """Take a number, or a metric of torchmetrics and the number that it gave last."""
        if fx != "training_step":
            self._log(fx, name, value, *args, **kwargs)
            return
        number = getattr(value, "_forward_cache", None) if hasattr(value, "compute") else value
        number = number.detach() if isinstance(number, Tensor) else number
        self._held.setdefault((fx, name), _Held(value, args, kwargs)).numbers.append(number)

    def flush(self) -> None:
        """The step is over: hand on the mean, or what `reduce_fx` makes of the values."""
        held, self._held = self._held, {}
        for (fx, name), kept in held.items():
            kwargs = {**kept.kwargs, "batch_size": len(kept.numbers)}
            reduced: Any = _reduced(kept.numbers, kwargs.get("reduce_fx", "mean"))
            if hasattr(kept.value, "compute"):  # counts over all records by itself
                kept.value._forward_cache, reduced = reduced, kept.value
            self._log(fx, name, reduced, *kept.args, **kwargs)


def _reduced(values: list[Any], by: Any) -> Tensor | None:
    if any(v is None for v in values):  # a metric that was updated without a forward
        return None
    stacked = torch.stack([torch.as_tensor(v).float() for v in values])
    name = by if isinstance(by, str) else getattr(by, "__name__", "")
    if name in ("sum", "max", "min"):
        found: Tensor = getattr(stacked, name)()
        return found
    return stacked.mean()
