"""The logits that a training step computed by itself, for the objective to use again."""

from typing import Any

from torch import Tensor, nn

from defend.attacks.context import logits_of


class KeepLogits:
    """Forward hook: the logits of the first call with `seen` as it is, and where they stood.

    A module that is copied or pickled in its training step takes the hook along, without what it
    holds.
    """

    def __init__(self, seen: Any) -> None:
        self.seen = seen
        self.own: list[tuple[Tensor, int]] = []

    def __call__(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        given = [*args, *kwargs.values()]
        if self.seen is None or self.own or len(given) != 1 or given[0] is not self.seen:
            return
        logits = logits_of(output)
        if logits.requires_grad:
            self.own.append((logits, logits._version))

    def __reduce__(self) -> tuple[Any, ...]:
        return KeepLogits, (None,)
