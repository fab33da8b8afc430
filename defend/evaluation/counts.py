"""What an evaluation counts: named, summable over batches and processes."""

import dataclasses
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class AttackCounts:
    """Counts under one attack.

    Attributes:
        right: records answered rightly under it.
        useless: its input gradients that were zero or not finite.
        gradients: all its input gradients; 0 where it does not count them.
    """

    right: Tensor | int = 0
    useless: Tensor | int = 0
    gradients: Tensor | int = 0

    def __add__(self, other: "AttackCounts") -> "AttackCounts":
        return AttackCounts(
            self.right + other.right,
            self.useless + other.useless,
            self.gradients + other.gradients,
        )


@dataclasses.dataclass(frozen=True)
class Counts:
    """Counts of an evaluation; those of several batches or processes add up with `+`.

    Attributes:
        records: all.
        clean: those answered rightly without an attack.
        worst_case: those answered rightly without an attack and under every attack.
        attacked: for each attack by name.
    """

    records: Tensor | int
    clean: Tensor | int
    worst_case: Tensor | int
    attacked: Mapping[str, AttackCounts]

    @classmethod
    def none(cls, attacks: Iterable[str]) -> "Counts":
        """Nothing counted so far."""
        return cls(0, 0, 0, {name: AttackCounts() for name in attacks})

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            self.records + other.records,
            self.clean + other.clean,
            self.worst_case + other.worst_case,
            {name: counts + other.attacked[name] for name, counts in self.attacked.items()},
        )

    def to_tensor(self, device: torch.device) -> Tensor:
        """int64 `[3 + 3 · attacks]`, to sum over processes."""
        parts: list[Counts | AttackCounts] = [self, *self.attacked.values()]
        values = [getattr(part, name) for part in parts for name in _names(part)]
        return torch.stack([torch.as_tensor(v, dtype=torch.int64, device=device) for v in values])

    def from_tensor(self, values: Tensor) -> "Counts":
        """Back from `to_tensor` of counts of the same attacks, as Python numbers."""
        numbers = iter(values.tolist())
        own = {name: next(numbers) for name in _names(self)}
        attacked = {
            attack: AttackCounts(**{name: next(numbers) for name in _names(counts)})
            for attack, counts in self.attacked.items()
        }
        return Counts(**own, attacked=attacked)


def _names(counts: Counts | AttackCounts) -> list[str]:
    """The fields that are numbers."""
    return [f.name for f in dataclasses.fields(counts) if f.name != "attacked"]
