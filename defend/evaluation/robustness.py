"""Accuracy clean, under each attack, and in the worst case over all of them."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from defend.attacks.ascent import Model
from defend.attacks.attack import Attack
from defend.attacks.context import logits_of, no_trace
from defend.attacks.pgd import PGD
from defend.batching.chunks import check_chunk_size
from defend.batching.fields import get_field
from defend.batching.memory import run_in_chunks
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
    model is left as it was (`no_trace`), and the batch too.

    Args:
        attacks: attacks by name; a name becomes part of a metric's name.
        seed: seeds the attacks' random starts, so that two evaluations of the same model on the
            same batches agree.
        chunk_size: most rows at once. "auto": what fits for PGD, whole batches for other attacks.

    Attributes:
        counts: right answers `[clean, *attacks, worst case]`, records, then for each attack the
            gradients that led nowhere, and all it counted; add up the counts of several processes
            to get those of all.
    """

    def __init__(
        self,
        attacks: Mapping[str, Attack],
        *,
        seed: int = 0,
        chunk_size: int | str | None = "auto",
    ) -> None:
        check_attacks(attacks)
        check_chunk_size(chunk_size)
        self.attacks = {name: _strongest(attack) for name, attack in attacks.items()}
        self.seed = seed
        self.chunk_size = chunk_size
        self.batches = 0
        self.counts = torch.zeros(3 * len(attacks) + 3, dtype=torch.float64)
        # What is known to fit of a forward alone; it shrinks where memory ran out.
        self._rows = chunk_size if isinstance(chunk_size, int) else None

    def update(self, model: Model, x: Tensor, y: Tensor) -> None:
        """Evaluate one batch: inputs `[N, ...]`, class indices `[N]`."""
        right, gradients = [self._is_right(model, x, y)], []
        for i, attack in enumerate(self.attacks.values()):
            key = hash((self.seed, self.batches, i)) % 2**62
            generator = torch.Generator(device=x.device).manual_seed(key)
            x_adv, useless, computed = self._run(attack, model, x, y, generator)
            gradients.append((useless, computed))
            right.append(self._is_right(model, x_adv, y))
        worst = torch.stack(right).all(0)
        counts = [*(r.sum() for r in (*right, worst)), len(x)]
        counts += [count for pair in zip(*gradients, strict=True) for count in pair]
        # One transfer, of whole numbers.
        whole = [torch.as_tensor(count, dtype=torch.int64, device=x.device) for count in counts]
        self.counts += torch.stack(whole).to("cpu", torch.float64)
        self.batches += 1

    def _run(
        self, attack: Attack, model: Model, x: Tensor, y: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor | int, int]:
        """x_adv, gradients that led nowhere, and all gradients; 0 of 0 where none are counted."""
        size = self.chunk_size
        if not isinstance(attack, PGD):
            rows = size if isinstance(size, int) else None
            with no_trace(model, x.device):
                # Copies: some attacks write into their inputs, and autograd refuses tensors that
                # were made in inference mode.
                x, y = x.detach().clone(), y.clone()
                return attack(model, x, y, generator=generator, chunk_size=rows), 0, 0
        result = attack.run(model, x, y, generator=generator, chunk_size=size)
        useless = result.zero_gradients + result.nonfinite_gradients
        return result.x_adv, useless, result.gradients

    def _is_right(self, model: Model, x: Tensor, y: Tensor) -> Tensor:
        right, fitted = _is_right(model, x, y, self._rows)
        if fitted < min(len(x), self._rows or len(x)):
            self._rows = fitted
        return right

    @property
    def records(self) -> int:
        """Records seen so far by this meter."""
        return int(self.counts[len(self.attacks) + 2])

    def report(self, counts: Tensor | None = None) -> RobustnessReport:
        """The accuracies so far.

        Args:
            counts: use these instead of the meter's own (the sum over processes, say).

        Raises:
            InputError: if no record was seen.
        """
        n = len(self.attacks)
        figures = (self.counts if counts is None else counts).tolist()
        right, records, gradients = figures[: n + 2], figures[n + 2], figures[n + 3 :]
        if records == 0:
            raise InputError("Expected at least one record to evaluate, got none.")
        clean, *attacked, worst = (r / records for r in right)
        pairs = zip(self.attacks, gradients[:n], gradients[n:], strict=True)
        return RobustnessReport(
            int(records),
            clean,
            dict(zip(self.attacks, attacked, strict=True)),
            worst,
            {name: useless / computed for name, useless, computed in pairs if computed},
        )


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


def robustness_curve(
    model: Model,
    x: Tensor,
    y: Tensor,
    attack: PGD,
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
    attack: PGD,
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
            answers, fitted = _is_right(model, x_adv, y, most)
            if fitted < min(len(x), most or len(x)):
                most = fitted
            right += int(answers.sum())
        curve[eps] = right / records
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
        if getattr(attack, "targeted", False) is True:
            raise InputError(
                f"Expected `attacks[{name!r}]` to be untargeted, got targeted=True: the targets of "
                "the data are the true classes, not an attacker's. Use targeted=False."
            )


def _strongest(attack: Attack) -> Attack:
    """The attack as it is to be measured with: PGD returns its best iterate."""
    return attack.for_evaluation() if hasattr(attack, "for_evaluation") else attack


def _is_right(model: Model, x: Tensor, y: Tensor, rows: int | None) -> tuple[Tensor, int]:
    """Which records are answered rightly, `[N]`; and how many rows at once it took in the end."""

    def run(start: int, stop: int) -> None:
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
        return right, run_in_chunks(run, len(x), rows) if len(x) else 0
