"""What must hold of a step, compared on a copy of the module (`selftest` lists the four parts)."""

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from defend.errors import IndistinctRowsError, PrivacyError
from defend.privacy.checks.constant_randomness import ConstantRandomness
from defend.privacy.checks.coupling import AS_RECORDS, PARTS_AND_SEEDS, excess
from defend.privacy.checks.differences import mixture
from defend.privacy.checks.known_numbers import refuse_known_numbers, refuse_known_starts
from defend.privacy.checks.module_copy import rows_differ, same, tensors_by_name, tensors_of
from defend.privacy.checks.step_on_copy import StepOnCopy
from defend.privacy.gradients.sums import per_record_norms
from defend.privacy.mechanism.gaussian import clip_and_sum

_MOVE_ROUNDING = 1e-2
_MOVE_ROUNDING_ATTACKED = 5e-2  # a sign that flips by rounding moves a whole step of the attack


# Of a step that may do other things in others: all periods up to half as long show.
_STEPS_IN_A_ROW = 12
_SECONDS = 1.0  # for those behind the second; 12 take 0.3 on a slow machine


@dataclass(frozen=True)
class _Taken:
    """A step of some in a row.

    Attributes:
        batch: as the step got it.
        gradients: of all records but the first, in one combination.
        state: buffers and frozen weights of the copy afterwards.
    """

    batch: Any
    gradients: list[Tensor]
    state: dict[str, Tensor]


class Comparisons:
    """The parts of the self-test; each raises a `PrivacyError` for what it finds.

    Args:
        copy: the step on a copy of the module.
        records: all but the last are in a batch; the last one takes another's place.
        max_grad_norm: C.
        reload: loads the same records anew; None where nothing can change them.
    """

    _others = slice(1, None)  # rows of a batch in which one record may be another one

    def __init__(
        self,
        copy: StepOnCopy,
        records: list[Any],
        max_grad_norm: float,
        reload: Callable[[], list[Any]] | None = None,
    ) -> None:
        self.copy, self.step, self._reload = copy, copy.step, reload
        *self.records, self.spare = records
        self.max_grad_norm = max_grad_norm
        self._drawn = False  # whether the step was seen to draw random numbers
        # Gradients of the batch, and the copy's state after it, where it draws none.
        self._together: tuple[list[Tensor], dict[str, Tensor]] | None = None

    def all_parts(self, rows: int | None) -> float:
        """The whole test; returns how far one record moved the clipped sum, in units of C."""
        for turn, (part, seed) in enumerate(PARTS_AND_SEEDS):
            self._alone(turn, part, seed)
        if self._together is not None:  # no number was drawn: the other rows are cheap
            for turn in range(len(PARTS_AND_SEEDS), len(self.records)):
                self._alone(turn, *PARTS_AND_SEEDS[0])
        if rows is not None and rows // self.step.views > len(self.records):
            self._alone(0, *PARTS_AND_SEEDS[0], count=rows // self.step.views)
        largest = self._leave_one_out()
        self._replace_one()
        return largest

    def later_parts(self, turn: int) -> None:
        """What may turn out otherwise later in training, at other random numbers each turn."""
        self._alone(turn, (0.37 + 0.618 * turn) % 1, turn)
        self._replace_one()

    # --- 1: alone or together ---------------------------------------------------------------------

    def _alone(self, turn: int, part: float, seed: int, count: int | None = None) -> None:
        """The first of the records in a batch, against that record in a batch of its own."""
        number = turn % len(self.records)
        with ConstantRandomness(part) as constant:
            if self._together is not None and count is None:
                gradients, after = self._together
                together = [g[number] for g in gradients]
            else:
                # First, since only then does it draw the same numbers as alone.
                records = self.records[number:] + self.records[:number]
                if count is not None:
                    records = list(itertools.islice(itertools.cycle(records), count))
                gradients = self.copy.seeded_gradients(records, seed)
                after = tensors_by_name(self.copy.module)
                together = [g[0] for g in gradients]
                if not self.copy.drew:
                    self._judge_copies(gradients)
            try:
                alone = self.copy.gradient_alone(self.records[number], seed)
            except PrivacyError:  # it says itself what is wrong
                raise
            except Exception as error:
                raise PrivacyError(
                    "Expected a step that works on one record, as it does on several, got "
                    f"{type(error).__name__}. Poisson batches have any size; keep the batch "
                    "dimension (no squeeze()), and use no statistics of the batch."
                ) from error
        worst = self.copy.difference(together, alone)
        if worst is not None:
            if count is None:
                records = self.records[number:] + self.records[:number]
            self._refuse_apart(worst, records, part, seed)
        after = self._refuse_moved(after)
        self._refuse_filled(after, self._refuse_moved(tensors_by_name(self.copy.module)))
        self._drawn |= constant.drew or self.copy.drew
        if turn == 0 and count is None and not self._drawn:
            self._together = gradients, after
        self.copy.draws = self._drawn or self.step.attack is not None

    def _refuse_apart(
        self, worst: tuple[str, float], records: list[Any], part: float, seed: int
    ) -> None:
        """A record's gradient is another one in a batch, as the hooks see it: is it, too?"""
        name, difference = worst
        if excess(self.copy, records, part, seed) is None:
            raise IndistinctRowsError(
                "Expected rows of a batch that stay the records' own through every layer, got a "
                f"gradient that differs by {difference:.0%} at `{name}` from the record's own. "
                "Positions come before records, or rows change places between layers. Pass each "
                "record through as one row, records first."
            )
        raise PrivacyError(
            "Expected each record's gradient to be the same alone and in a batch, got one "
            f"that differs by {difference:.0%} at `{name}`. The forward or the loss mixes "
            "records (batch statistics, mixup, a loss weighted or normalized over the batch, "
            "padding that is not masked), or the loss is not the plain mean over rows. "
            f"{AS_RECORDS}"
        )

    def _judge_copies(self, gradients: list[Tensor]) -> None:
        """Rows of the same record have the same gradient, wherever they stand."""
        count, most = len(self.records), len(gradients[0])
        for start in range(count, most, count):
            stop = min(start + count, most)
            found = mixture([g[start:stop] for g in gradients])
            expected = mixture([g[: stop - start] for g in gradients])
            worst = self.copy.difference(found, expected)
            if worst is not None:
                raise PrivacyError(
                    "Expected each record's gradient to be the same alone and in a batch, got rows "
                    f"of one record that differ by {worst[1]:.0%} at `{worst[0]}` by their place. "
                    "Leaving one record out moves all that follow it. Let a row depend on its "
                    "record, not on its position."
                )

    # --- 2: leave one out -------------------------------------------------------------------------

    def _leave_one_out(self) -> float:
        """‖sum over all − sum without the last record‖ / C.

        The last, since the others then draw the same numbers as before, wherever they draw.
        """
        sums = []
        for records in (self.records, self.records[:-1]):
            with ConstantRandomness():
                with self.copy.seeded(0):
                    batch = self.copy.attacked(records)
                with self.copy.seeded(0):
                    gradients = self.copy.gradients(batch, len(records))
            sums.append(clip_and_sum(gradients, self.max_grad_norm))
        moves = per_record_norms([(a - b).unsqueeze(0) for a, b in zip(*sums, strict=True)])
        largest = float(moves) / self.max_grad_norm
        if largest > 1 + (_MOVE_ROUNDING if self.step.attack is None else _MOVE_ROUNDING_ATTACKED):
            raise PrivacyError(
                "Expected the clipped sum to move by at most C without one record, got "
                f"{largest:.2f} C: other records' gradients change with it, or it is counted more "
                "than once."
            )
        return largest

    # --- 3 and 4: replace one, no trace, nothing carried on ---------------------------------------

    def _replace_one(self) -> None:
        """Two runs of a few steps in a row, in which one record is another one.

        Late breaks show after some steps, and periodic ones in some: where the step can tell (it
        reads the number of the step, or keeps a count) the runs are longer.
        """
        most = _STEPS_IN_A_ROW if self.copy.keeps or self.step.reads_clock() else 2
        self.copy.draws |= most > 2  # it may begin to
        one = self._run(self.records[0], most, _SECONDS)
        other = self._run(self.spare, len(one))
        if self._drawn and _shapes(one[0].batch) != _shapes(other[0].batch):
            # Masks of another shape are other masks: padding to another length, say.
            with ConstantRandomness():
                one, other = (self._run(r, len(one)) for r in (self.records[0], self.spare))
        for number, (expected, found) in enumerate(zip(one, other, strict=False)):
            self._refuse_filled(expected.state, found.state)
            self._judge_attack(expected.batch, found.batch)
            self._judge_others(found.gradients, expected.gradients, number)
        self._drawn |= self.copy.drew
        self._refuse_known(other[0].batch, len(one) if most > 2 else 1)

    def _refuse_known(self, attacked: Any, steps: int) -> None:
        """Refuse random numbers that are not secret in a fit."""
        if self.step.attack is not None:
            refuse_known_starts(self.copy, [self.spare, *self.records[1:]], attacked)
        if self._drawn:
            refuse_known_numbers(self.copy, self.records, steps)

    def _run(self, first: Any, most: int, seconds: float = math.inf) -> list["_Taken"]:
        """Steps in a row, from the start; at least two, and further ones for some seconds."""
        taken: list[_Taken] = []
        batch, start, count = None, time.perf_counter(), len(self.records)

        def load() -> list[Any]:
            rest = self.records if self._reload is None else self._reload()[:count]
            return self._with(first, rest[1:])

        while len(taken) < most and (len(taken) < 2 or time.perf_counter() - start < seconds):
            try:
                with self.copy.seeded(1 + 2 * len(taken)):
                    if batch is None:
                        batch = self.copy.attacked(self._with(first, self.records[1:]))
                    else:
                        batch = self.copy.next_attacked(batch, load)
                with self.copy.seeded(2 + 2 * len(taken)):
                    gradients = self.copy.gradients(batch, count)
            except PrivacyError:
                raise
            except Exception:
                if not taken:
                    raise
                break  # what fails in a later step will do so by itself
            state = self._refuse_moved(tensors_by_name(self.copy.module))
            taken.append(_Taken(batch, mixture([g[self._others] for g in gradients]), state))
        return taken

    def _with(self, one: Any, others: list[Any]) -> list[Any]:
        """The records of such a batch."""
        return [one, *others]

    def _judge_attack(self, batch: Any, other: Any) -> None:
        views = self.step.views
        if self.step.attack is not None and rows_differ(
            batch, other, len(self.records) * views, first=views
        ):
            raise PrivacyError(
                "Expected the adversarial version of a record to depend on that record alone, got "
                "one that moves with another record of the batch. Attack each record by its own "
                "gradient, in eval mode, without statistics or stopping rules of the batch."
            )

    def _judge_others(self, found: list[Tensor], expected: list[Tensor], number: int) -> None:
        tight = number > 0 and self.step.attack is None
        worst = self.copy.difference(found, expected, same_shapes=tight)
        if worst is not None and number == 0:
            raise PrivacyError(
                "Expected the gradients of other records to stay when one record is replaced, got "
                f"a change of {worst[1]:.0%} at `{worst[0]}`. Something mixes records: mixup, a "
                "second forward with shuffled rows, statistics or label counts of the batch. "
                f"{AS_RECORDS}"
            )
        if worst is not None:
            raise PrivacyError(
                "Expected gradients of other records that do not depend on one record in the "
                f"batch, nor in the batch before, got a change of {worst[1]:.2%} at `{worst[0]}` "
                f"in step {number + 1} of some in a row. The step, the loss or a hook keeps "
                "something of the records (a running mean, the last losses, prototypes), without "
                "noise, or mixes them from some step on. Compute each row from its own record; "
                "keep nothing, or compute it on public data."
            )

    def _refuse_moved(self, after: dict[str, Tensor]) -> dict[str, Tensor]:
        """Refuse trained weights that moved; returns what else there is."""
        trained = self.copy.parameters
        moved = [n for n in trained if n in after and not same(self.copy.start[n], after[n])]
        if moved:
            raise PrivacyError(
                f"Expected the step to leave the weights alone, got `{moved[0]}` changed in "
                "`training_step` or forward, without noise. Leave updates to the optimizer."
            )
        start = self.copy.start
        rest = {name: tensor for name, tensor in after.items() if name not in trained}
        # What stayed as it was takes no memory of its own.
        return {n: start[n] if n in start and same(start[n], t) else t for n, t in rest.items()}

    def _refuse_filled(self, after: dict[str, Tensor], other: dict[str, Tensor]) -> None:
        filled = [n for n in after if n not in other or not same(after[n], other[n])]
        if filled:
            raise PrivacyError(
                "Expected buffers and frozen weights that do not depend on the data, got "
                f"`{filled[0]}`, which the step fills from the records (or a hook does); it is "
                "published without noise. Remove it, or compute it on public data before training."
            )


def _shapes(batch: Any) -> list[torch.Size]:
    return [t.shape for t in tensors_of(batch)]
