"""Which records a classifier answers rightly, and which attacks it can be measured with."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from defend.attacks.ascent import Model
from defend.attacks.attack import as_attack
from defend.attacks.context import logits_of, no_trace
from defend.batching.memory import run_in_chunks
from defend.errors import InputError


def check_attacks(attacks: Mapping[str, Callable[..., Any]]) -> None:
    """Refuse what is not a mapping from usable metric names to attacks.

    Raises:
        InputError: says which name or value is wrong.
    """
    if not isinstance(attacks, Mapping) or not attacks:
        raise InputError(
            f"Expected `attacks` to be a dict such as {{'pgd20': PGD(...)}}, got {attacks!r}."
        )
    for name, attack in attacks.items():
        if not isinstance(name, str) or not name.replace("_", "").replace("-", "").isalnum():
            raise InputError(
                f"Expected attack names of letters, digits, '-' and '_', got {name!r}: the name "
                "becomes part of a metric's name."
            )
        if name in ("clean", "worst_case"):
            raise InputError(f"Expected another attack name than {name!r}: that metric is taken.")
        if not callable(attack):
            raise InputError(f"Expected `attacks[{name!r}]` to be an attack, got {attack!r}.")
        if as_attack(attack).targeted:
            raise InputError(
                f"Expected `attacks[{name!r}]` to be untargeted, got targeted=True: the targets of "
                "the data are the true classes, not an attacker's. Use targeted=False."
            )


def right_answers(model: Model, x: Tensor, y: Tensor, rows: int | None) -> tuple[Tensor, int]:
    """Which records are answered rightly, `[N]`; and how many rows at once it took in the end."""

    def answer(start: int, stop: int) -> None:
        logits = logits_of(model(x[start:stop]))
        if logits.ndim != 2 or y.ndim != 1:
            raise InputError(
                "Expected logits of shape [N, classes] and class indices of shape [N], got "
                f"{tuple(logits.shape)} and {tuple(y.shape)}. Only classifiers can be evaluated."
            )
        # argmax of NaN is class 0: a model that has diverged would be right about it.
        right[start:stop] = (logits.argmax(1) == y[start:stop]) & ~logits.isnan().any(1)

    with no_trace(model, x.device), torch.no_grad():
        right = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        return right, run_in_chunks(answer, len(x), rows) if len(x) else 0
