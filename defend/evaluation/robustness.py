"""Accuracy clean, under each attack, and in the worst case over all of them."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from defend.attacks.context import logits_of, no_trace
from defend.attacks.pgd import PGD, Attack, Model
from defend.batching.fields import get_field
from defend.errors import InputError


@dataclasses.dataclass(frozen=True)
class RobustnessReport:
    """What was measured.

    Attributes:
        records: records evaluated.
        clean_accuracy: share that is right without an attack.
        attack_accuracy: for each attack, the share that is right under it.
        worst_case_accuracy: share that is right clean and under every attack at once. It is at
            most the lowest of the accuracies, and the number to quote.
    """

    records: int
    clean_accuracy: float
    attack_accuracy: dict[str, float]
    worst_case_accuracy: float

    def metrics(self) -> dict[str, float]:
        """The figures under the names they are logged by."""
        return {
            "robust/clean_accuracy": self.clean_accuracy,
            **{f"robust/{name}_accuracy": v for name, v in self.attack_accuracy.items()},
            "robust/worst_case_accuracy": self.worst_case_accuracy,
        }

    def as_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return dataclasses.asdict(self)


class RobustnessMeter:
    """Counts right answers batch by batch.

    Args:
        attacks: attacks by name; a name becomes part of a metric's name.
        seed: seeds the attacks' random starts, so that two evaluations of the same model on the
            same batches agree.

    Attributes:
        counts: right answers `[clean, *attacks, worst case]`, then records; add up the counts of
            several processes to get those of all.
    """

    def __init__(self, attacks: Mapping[str, Attack], *, seed: int = 0) -> None:
        check_attacks(attacks)
        self.attacks = dict(attacks)
        self.seed = seed
        self.batches = 0
        self.counts = torch.zeros(len(attacks) + 3, dtype=torch.float64)

    def update(self, model: Model, x: Tensor, y: Tensor) -> None:
        """Evaluate one batch: inputs `[N, ...]`, class indices `[N]`."""
        right = [_is_right(model, x, y)]
        for i, attack in enumerate(self.attacks.values()):
            key = hash((self.seed, self.batches, i)) % 2**62
            generator = torch.Generator(device=x.device).manual_seed(key)
            right.append(_is_right(model, attack(model, x, y, generator=generator), y))
        worst = torch.stack(right).all(0)
        counts = torch.stack([r.sum() for r in (*right, worst)])
        self.counts[:-1] += counts.to("cpu", torch.float64)
        self.counts[-1] += len(x)
        self.batches += 1

    @property
    def records(self) -> int:
        """Records seen so far by this meter."""
        return int(self.counts[-1])

    def report(self, counts: Tensor | None = None) -> RobustnessReport:
        """The accuracies so far.

        Args:
            counts: use these instead of the meter's own (the sum over processes, say).

        Raises:
            InputError: if no record was seen.
        """
        *right, records = (self.counts if counts is None else counts).tolist()
        if records == 0:
            raise InputError("Expected at least one record to evaluate, got none.")
        clean, *attacked, worst = (r / records for r in right)
        names = dict(zip(self.attacks, attacked, strict=True))
        return RobustnessReport(int(records), clean, names, worst)


def evaluate(
    model: nn.Module,
    data: Iterable[Any],
    attacks: Mapping[str, Attack],
    *,
    input_key: int | str = 0,
    target_key: int | str = 1,
    max_records: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> RobustnessReport:
    """Measure the robustness of a classifier.

    Args:
        model: gives logits `[N, classes]`; left untouched, evaluated in eval mode.
        data: batches, a DataLoader say; tensors are moved to the model's device.
        attacks: attacks by name, for example {"pgd20": PGD(Linf(8 / 255), steps=20)}.
        input_key: where the inputs are in a batch.
        target_key: where the class indices are.
        max_records: stop after so many records (from the front; shuffle beforehand if the data
            is sorted).
        seed: seeds the random starts.
        progress: show a progress bar with the accuracies so far.

    Returns:
        Accuracies clean, under each attack and in the worst case.

    Raises:
        InputError: for bad attacks, batches or an empty data set.
    """
    from tqdm.auto import tqdm

    meter = RobustnessMeter(attacks, seed=seed)
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


def robustness_curve(
    model: Model,
    x: Tensor,
    y: Tensor,
    attack: PGD,
    eps_values: Sequence[float],
    *,
    seed: int = 0,
    chunk_size: int | None = 256,
) -> dict[float, float]:
    """Accuracy under `attack` at each radius, its step size scaled along.

    Args:
        model: gives logits.
        x: clean inputs `[N, ...]`.
        y: class indices `[N]`.
        attack: gives ball, steps and the rest.
        eps_values: radii in raw units.
        seed: seeds the random starts, the same at each radius.
        chunk_size: most rows attacked at once.

    Returns:
        Accuracy in [0, 1] by eps.
    """
    curve = {}
    for eps in eps_values:
        generator = torch.Generator(device=x.device).manual_seed(seed)
        x_adv = attack.with_eps(eps)(model, x, y, generator=generator, chunk_size=chunk_size)
        curve[eps] = _is_right(model, x_adv, y).double().mean().item()
    return curve


def check_attacks(attacks: Mapping[str, Attack]) -> None:
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


def _is_right(model: Model, x: Tensor, y: Tensor) -> Tensor:
    with no_trace(model, x.device), torch.no_grad():
        logits = logits_of(model(x))
    if logits.ndim != 2 or y.ndim != 1:
        raise InputError(
            "Expected logits of shape [N, classes] and class indices of shape [N], got "
            f"{tuple(logits.shape)} and {tuple(y.shape)}. Only classifiers can be evaluated."
        )
    # argmax of NaN is class 0: a model that has diverged would be right about it.
    return (logits.argmax(1) == y) & logits.isfinite().all(1)
