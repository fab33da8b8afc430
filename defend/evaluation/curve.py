"""Accuracy under an attack as its radius grows."""

from collections.abc import Sequence

import torch
from torch import Tensor

from defend.attacks.ascent import Model
from defend.attacks.attack import Attack
from defend.errors import InputError
from defend.evaluation.answers import check_attacks, right_answers


def robustness_curve(
    model: Model,
    x: Tensor,
    y: Tensor,
    attack: Attack,
    eps_values: Sequence[float],
    *,
    seed: int = 0,
    chunk_size: int | str | None = "auto",
) -> dict[float, float]:
    """Accuracy under `attack`, at its strongest, at each radius; its step size is scaled along.

    Args:
        model: gives logits.
        x: clean inputs `[N, ...]`.
        y: class indices `[N]`.
        attack: gives ball, steps and the rest.
        eps_values: radii in raw units.
        seed: seeds the random starts, the same at each radius.
        chunk_size: most rows attacked at once. "auto": what fits.

    Returns:
        Accuracy in [0, 1] by eps.

    Raises:
        InputError: for a targeted attack, or a batch without records.
    """
    batches = [(x, y)]
    return curve_of_batches(model, batches, attack, eps_values, seed=seed, chunk_size=chunk_size)


def curve_of_batches(
    model: Model,
    batches: Sequence[tuple[Tensor, Tensor]],
    attack: Attack,
    eps_values: Sequence[float],
    *,
    seed: int = 0,
    chunk_size: int | str | None = "auto",
) -> dict[float, float]:
    """`robustness_curve` of all records of several batches, which need not have one shape."""
    check_attacks({"curve": attack})
    records = sum(len(x) for x, _ in batches)
    if records == 0:
        raise InputError("Expected at least one record to evaluate, got none.")
    most = chunk_size if isinstance(chunk_size, int) else None
    curve = {}
    for eps in eps_values:
        strongest = attack.with_eps(eps).for_evaluation()
        generator = torch.Generator(device=batches[0][0].device).manual_seed(seed)
        right = 0
        for x, y in batches:
            x_adv = strongest(model, x, y, generator=generator, chunk_size=chunk_size)
            answers, fitted = right_answers(model, x_adv, y, most)
            if fitted < min(len(x), most or len(x)):
                most = fitted
            right += int(answers.sum())
        curve[eps] = right / records
    return curve
