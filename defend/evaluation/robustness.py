"""Accuracy clean, under each attack, and in the worst case over all of them."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from defend.attacks.ascent import Model
from defend.attacks.attack import Attack, as_attack
from defend.batching.chunks import check_chunk_size
from defend.batching.fields import get_field
from defend.errors import InputError
from defend.evaluation.answers import check_attacks, right_answers
from defend.evaluation.counts import AttackCounts, Counts


@dataclasses.dataclass(frozen=True)
class RobustnessReport:
    """What was measured.

    Attributes:
        records: records evaluated.
        clean_accuracy: share that is right without an attack.
        attack_accuracy: for each attack, the share that is right under it.
        worst_case_accuracy: share that is right clean and under every attack at once. It is at
            most the lowest of the accuracies, and the number to quote.
        zero_gradients: for each attack that counts them (PGD does), the share of its input
            gradients that were zero or not finite. Such a gradient leads nowhere: where it is not
            near 0, the accuracy under that attack says little.
    """

    records: int
    clean_accuracy: float
    attack_accuracy: dict[str, float]
    worst_case_accuracy: float
    zero_gradients: dict[str, float] = dataclasses.field(default_factory=dict)

    def metrics(self) -> dict[str, float]:
        """The figures under the names they are logged by."""
        return {
            "robust/clean_accuracy": self.clean_accuracy,
            **{f"robust/{name}_accuracy": v for name, v in self.attack_accuracy.items()},
            "robust/worst_case_accuracy": self.worst_case_accuracy,
            **{f"robust/{name}_zero_grad_rate": v for name, v in self.zero_gradients.items()},
        }

    def as_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return dataclasses.asdict(self)


class RobustnessMeter:
    """Counts right answers batch by batch.

    Attacks that know how to be at their strongest (`for_evaluation`) are. Whatever the attack, the
    model is left as it was (`untouched`), and the batch too.

    Args:
        attacks: attacks by name; a name becomes part of a metric's name.
        seed: seeds the attacks' random starts, so that two evaluations of the same model on the
            same batches agree.
        chunk_size: most rows at once. "auto": what fits for PGD, whole batches for other attacks.

    Attributes:
        counts: what was counted so far; add up those of several processes to get those of all.
    """

    def __init__(
        self,
        attacks: Mapping[str, Callable[..., Tensor]],
        *,
        seed: int = 0,
        chunk_size: int | str | None = "auto",
    ) -> None:
        check_attacks(attacks)
        check_chunk_size(chunk_size)
        # `Free`, which is no `Attack`, has just been refused.
        own = {name: cast(Attack, as_attack(attack)) for name, attack in attacks.items()}
        self.attacks = {name: attack.for_evaluation() for name, attack in own.items()}
        self.seed = seed
        self.chunk_size = chunk_size
        self.batches = 0
        self.counts = Counts.none(self.attacks)
        # What is known to fit of a forward alone; it shrinks where memory ran out.
        self._rows = chunk_size if isinstance(chunk_size, int) else None

    def update(self, model: Model, x: Tensor, y: Tensor) -> None:
        """Evaluate one batch: inputs `[N, ...]`, class indices `[N]`."""
        clean = self._is_right(model, x, y)
        worst, attacked = clean, {}
        for i, (name, attack) in enumerate(self.attacks.items()):
            key = hash((self.seed, self.batches, i)) % 2**62
            generator = torch.Generator(device=x.device).manual_seed(key)
            result = attack.perturb(model, x, y, generator=generator, chunk_size=self.chunk_size)
            right = self._is_right(model, result.x_adv, y)
            worst = worst & right
            useless = result.counts.zero + result.counts.nonfinite
            attacked[name] = AttackCounts(right.sum(), useless, result.counts.gradients)
        counts = Counts(len(x), clean.sum(), worst.sum(), attacked)
        # By way of a tensor: one transfer from the device for all of them.
        self.counts += counts.from_tensor(counts.to_tensor(x.device))
        self.batches += 1

    def _is_right(self, model: Model, x: Tensor, y: Tensor) -> Tensor:
        right, fitted = right_answers(model, x, y, self._rows)
        if fitted < min(len(x), self._rows or len(x)):
            self._rows = fitted
        return right

    @property
    def records(self) -> int:
        """Records seen so far by this meter."""
        return int(self.counts.records)

    def report(self, counts: Counts | None = None) -> RobustnessReport:
        """The accuracies so far.

        Args:
            counts: use these instead of the meter's own (the sum over processes, say).

        Raises:
            InputError: if no record was seen.
        """
        counts = self.counts if counts is None else counts
        records, attacked = int(counts.records), counts.attacked
        if records == 0:
            raise InputError("Expected at least one record to evaluate, got none.")
        return RobustnessReport(
            records,
            int(counts.clean) / records,
            {name: int(c.right) / records for name, c in attacked.items()},
            int(counts.worst_case) / records,
            {n: int(c.useless) / int(c.gradients) for n, c in attacked.items() if c.gradients},
        )


def evaluate(
    model: nn.Module,
    data: Iterable[Any],
    attacks: Mapping[str, Callable[..., Tensor]],
    *,
    input_key: int | str = 0,
    target_key: int | str = 1,
    max_records: int | None = None,
    seed: int = 0,
    progress: bool = True,
    chunk_size: int | str | None = "auto",
) -> RobustnessReport:
    """Measure the robustness of a classifier.

    Args:
        model: gives logits `[N, classes]`; left untouched, evaluated in eval mode.
        data: batches, a DataLoader say; tensors are moved to the model's device.
        attacks: attacks by name, for example {"pgd20": PGD(Linf(8 / 255), steps=20)}. PGD returns
            the best iterate of each record, unless its `iterate` says otherwise.
        input_key: where the inputs are in a batch.
        target_key: where the class indices are.
        max_records: stop after so many records (from the front; shuffle beforehand if the data
            is sorted).
        seed: seeds the random starts.
        progress: show a progress bar with the accuracies so far.
        chunk_size: most rows attacked at once. "auto": what fits for PGD, whole batches for other
            attacks.

    Returns:
        Accuracies clean, under each attack and in the worst case.

    Raises:
        InputError: for bad or targeted attacks, `max_records` below 1, bad batches or an empty
            data set.
    """
    from tqdm.auto import tqdm

    if max_records is not None and max_records < 1:
        raise InputError(f"Expected `max_records` to be ≥ 1 or None, got {max_records}.")
    meter = RobustnessMeter(attacks, seed=seed, chunk_size=chunk_size)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with tqdm(data, desc="robustness", disable=not progress, unit="batch") as bar:
        for batch in bar:
            x, y = get_field(batch, input_key).to(device), get_field(batch, target_key).to(device)
            if max_records is not None:
                x, y = x[: max_records - meter.records], y[: max_records - meter.records]
            meter.update(model, x, y)
            bar.set_postfix({"worst case": f"{meter.report().worst_case_accuracy:.3f}"})
            if meter.records == max_records:
                break
    return meter.report()
