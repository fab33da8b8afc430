"""What must hold of a step that runs on one record at a time: nothing goes from one to another."""

from typing import Any

import torch

from defend.errors import PrivacyError
from defend.privacy.checks.comparisons import Comparisons
from defend.privacy.checks.coupling import finite
from defend.privacy.checks.module_copy import tensors_by_name
from defend.privacy.checks.records_on_copy import RecordsOnCopy


class RecordComparisons(Comparisons):
    """The parts of the self-test where each record has a batch of its own.

    No row can meet another one there, and no random number two records. What is left is what a
    step keeps: while it runs, and until the next one.
    """

    # The last record's state is what a step leaves.
    _others = slice(None, -1)

    def all_parts(self, rows: int | None) -> float:
        """The whole test; returns 1: a record that is alone moves the clipped sum by C at most."""
        self._refuse_single()
        for turn in range(2):
            self._after_others(turn)
        self._replace_one()
        return 1.0

    def _refuse_single(self) -> None:
        """A step that fails on one record, and not on several; or that gives no gradient."""
        copy = self.copy
        assert isinstance(copy, RecordsOnCopy)
        try:
            gradients = [copy.gradient_alone(self.records[0], 0)]
        except PrivacyError:
            raise
        except Exception as error:
            copy.gradient_together(self.records, 0)  # else it fails anyway
            raise PrivacyError(
                f"Expected a step that works on one record, got {type(error).__name__} there and "
                "none on several. Poisson batches have any size: keep the batch dimension (no "
                "squeeze()), use no statistics of the batch, and let the collate function take one "
                "record."
            ) from error
        gradients += [copy.gradient_alone(record, 0) for record in self.records[1:]]
        if not copy.trains or not any(map(finite, gradients)):
            raise PrivacyError(
                "Expected `training_step` to return a loss that depends on the parameters, got no "
                f"finite gradient of {len(self.records)} records. Return a loss with a graph, that "
                "is a number for one record, too."
            )
        first, *others = gradients
        alike = all(all(map(torch.equal, first, g)) for g in others)
        if others and alike and any(bool(g.any()) for g in first):
            raise PrivacyError(
                f"Expected another gradient for another record, got the same for {len(gradients)}. "
                "The step or a hook of the transfer trains on something else than the batch that "
                "it is given; whose records that are, nobody knows. Train on the batch."
            )

    def later_parts(self, turn: int) -> None:
        """What may turn out otherwise later in training."""
        self._after_others(turn)
        self._replace_one()

    def _with(self, one: Any, others: list[Any]) -> list[Any]:
        return [*others, one]

    def _after_others(self, turn: int) -> None:
        """A record after others, against that record alone; and what they leave."""
        number = turn % len(self.records)
        others = self.records[number + 1 :] + self.records[:number]
        after = [g[-1] for g in self.copy.seeded_gradients([*others, self.records[number]], turn)]
        alone = self.copy.gradient_alone(self.records[number], turn)
        left = self._refuse_moved(tensors_by_name(self.copy.module))
        worst = self.copy.difference(after, alone, same_shapes=True)
        if worst is not None:
            raise PrivacyError(
                "Expected a record's gradient to be the same whatever record the step ran on "
                f"before, got one that differs by {worst[1]:.0%} at `{worst[0]}`. The step keeps "
                "something of a record that cannot be put back: a large tensor, an object of a "
                "library, a file. Keep nothing, or compute it on public data."
            )
        self.copy.gradient_alone(self.spare, turn)
        self._refuse_filled(left, self._refuse_moved(tensors_by_name(self.copy.module)))

    def _judge_attack(self, batch: Any, other: Any) -> None:
        """Each record is attacked alone."""

    def _refuse_known(self, attacked: Any, steps: int) -> None:
        """A record may draw what it likes: it tells nothing of another one."""
