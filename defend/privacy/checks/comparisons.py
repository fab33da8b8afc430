"""What must hold of a step, compared on a copy of the module (`selftest` lists the four parts)."""

import contextlib
import itertools
from typing import Any

import torch
from torch import Tensor

from defend.errors import PrivacyError
from defend.privacy.checks.constant_randomness import ConstantRandomness
from defend.privacy.checks.ignored_seeds import ignored_seeds
from defend.privacy.checks.module_copy import rows_differ, same, state_of
from defend.privacy.checks.step_on_copy import StepOnCopy
from defend.privacy.gradients.sums import per_record_norms
from defend.privacy.mechanism.gaussian import clip_and_sum

# Random numbers at several places of their range, and seeds whose first numbers (numpy's and
# Python's) lie there too: what is done with a chance of 2% or 98% is met as well.
_PARTS_AND_SEEDS = ((0.37, 35), (0.01, 1751), (0.99, 1470))

# Structure breaks a gradient by its own size; rounding stays far below these.
_ROUNDING = {torch.float64: 1e-4, torch.float32: 1e-2, torch.half: 1e-1}  # half of any kind
_MOVE_ROUNDING = 1e-2
_MOVE_ROUNDING_ATTACKED = 5e-2  # a sign that flips by rounding moves a whole step of the attack

# A step or an attack that tosses a coin of 20% for each of two records draws alike twice with a
# chance of (0.8² + 0.2²)², and in all of these attempts with one of 1e-8.
_RESEEDED_ATTEMPTS = 24


class Comparisons:
    """The parts of the self-test; each raises a `PrivacyError` for what it finds.

    Args:
        copy: the step on a copy of the module.
        records: all but the last are in a batch; the last one takes another's place.
        max_grad_norm: C.
    """

    def __init__(self, copy: StepOnCopy, records: list[Any], max_grad_norm: float) -> None:
        self.copy, self.step = copy, copy.step
        *self.records, self.spare = records
        self.max_grad_norm = max_grad_norm

    def all_parts(self, rows: int | None) -> float:
        """The whole test; returns how far one record moved the clipped sum, in units of C."""
        for turn, (part, seed) in enumerate(_PARTS_AND_SEEDS):
            self._alone(turn, part, seed)
        if rows is not None and rows // self.step.views > len(self.records):
            self._alone(0, *_PARTS_AND_SEEDS[0], count=rows // self.step.views)
        largest = self._leave_one_out()
        self._replace_one()
        return largest

    def later_parts(self, turn: int) -> None:
        """What may turn out otherwise later in training, at other random numbers each turn."""
        self._alone(turn, (0.37 + 0.618 * turn) % 1, turn)
        if self.step.attack is not None:
            self._replace_one()

    # --- 1: alone or together ---------------------------------------------------------------------

    def _alone(self, turn: int, part: float, seed: int, count: int | None = None) -> None:
        """The first of the records in a batch, against that record in a batch of its own."""
        first = turn % len(self.records)
        records = self.records[first:] + self.records[:first]
        if count is not None:
            records = list(itertools.islice(itertools.cycle(records), count))
        with ConstantRandomness(part):
            together = [g[0] for g in self.copy.seeded_gradients(records, seed)]
            after = state_of(self.copy.module)
            try:
                alone = self.copy.gradient_alone(records[0], seed)
            except Exception as error:
                raise PrivacyError(
                    "Expected a step that works on one record, as it does on several, got "
                    f"{type(error).__name__}: {error} Poisson batches have any size; keep the "
                    "batch dimension (no squeeze()), and use no statistics of the batch."
                ) from error
        worst = self._difference(together, alone)
        if worst is not None:
            raise PrivacyError(
                "Expected each record's gradient to be the same alone and in a batch, got one "
                f"that differs by {worst[1]:.0%} at `{worst[0]}`. The forward or the loss "
                "mixes records (batch statistics, mixup, a loss weighted or normalized over "
                "the batch, padding that is not masked), or the loss is not the plain mean "
                "over rows. Compute each row from its own record, and take the mean."
            )
        self._judge_state(after, state_of(self.copy.module))

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

    # --- 3 and 4: replace one, no trace -----------------------------------------------------------

    def _replace_one(self) -> None:
        outcomes = []
        for first in (self.records[0], self.spare):
            records = [first, *self.records[1:]]
            with self.copy.seeded(1):
                batch = self.copy.attacked(records)
            with self.copy.seeded(2):
                gradients = self.copy.gradients(batch, len(records))
            outcomes.append((batch, gradients, state_of(self.copy.module)))
        (batch, gradients, after), (other_batch, other_gradients, other_after) = outcomes
        self._judge_state(after, other_after)
        if self.step.attack is not None and rows_differ(
            batch, other_batch, len(self.records) * self.step.views, first=self.step.views
        ):
            raise PrivacyError(
                "Expected the adversarial version of a record to depend on that record alone, got "
                "one that moves with another record of the batch. Attack each record by its own "
                "gradient, in eval mode, without statistics or stopping rules of the batch."
            )
        rest = ([g[1:] for g in gradients], [g[1:] for g in other_gradients])
        worst = self._difference(*rest)
        if worst is not None:
            raise PrivacyError(
                "Expected the gradients of other records to stay when one record is replaced, got "
                f"a change of {worst[1]:.0%} at `{worst[0]}`. Something mixes records: mixup, a "
                "second forward with shuffled rows, statistics or label counts of the batch."
            )
        if self.step.attack is not None:
            self._secret_attack(other_batch)
        self._secret()

    def _secret_attack(self, before: Any) -> None:
        """Random numbers of the attack come from the generator that it is given, or the globals.

        An attack that draws known numbers gives the same rows from any secret ones, but others
        when all random numbers are constant. So may one that tosses a coin for each record, by
        chance: it has many attempts to show that it can do otherwise.
        """
        if self.step.attack_reseeded is None:
            return
        records = [self.spare, *self.records[1:]]

        def draws_the_same(number: int) -> bool:
            again = self.copy.attacked_reseeded(records, number)
            return not rows_differ(before, again, len(records) * self.step.views, first=0)

        with ConstantRandomness():
            if draws_the_same(0):
                return
        if all(draws_the_same(number) for number in range(_RESEEDED_ATTEMPTS)):
            raise PrivacyError(
                "Expected random starts from the generator that the attack is given, which is "
                "secret in a private fit, got an attack that draws the same numbers whatever that "
                "is seeded with. Leaving one record out would change the starts of all others by "
                "a known amount. Draw from `generator`."
            )

    def _secret(self) -> None:
        """Random numbers of the step, on clean rows, come from where a fit keeps them secret."""
        seen, other = (self.copy.seeded_gradients(self.records, seed) for seed in (2, 4))
        known = False
        for seed, found in ((2, seen), (4, other)):  # coins for few records may agree by chance
            with contextlib.suppress(Exception), ignored_seeds(self.copy.generators):
                unseeded = self.copy.seeded_gradients(self.records, seed)  # an error proves nothing
                known |= self._difference(found, unseeded) is not None
        with ConstantRandomness():
            constant = self.copy.seeded_gradients(self.records, 4)
        if self._difference(other, constant) is not None:  # are they from where no seed is ignored?
            known |= not any(
                self._difference(seen, self.copy.seeded_gradients(self.records, seed)) is not None
                for seed in range(4, 4 + _RESEEDED_ATTEMPTS)
            )
        if known:
            raise PrivacyError(
                "Expected random numbers from the global generators, which are secret in a "
                "private fit, got a step that draws known ones: it seeds them, or makes a "
                "generator from a seed, or hides one. Leaving one record out would change those of "
                "all others by a known amount. Drop the seed; what is to be the same each time, "
                "draw once, and keep it as a buffer."
            )

    def _difference(self, found: list[Tensor], expected: list[Tensor]) -> tuple[str, float] | None:
        """Where two gradients differ most, relative to the whole of it; None if by rounding."""
        whole = torch.stack([e.float().nan_to_num().norm() for e in expected]).norm()
        parts = [_distance(f, e) for f, e in zip(found, expected, strict=True)]
        kinds = {torch.half} if self.step.half else {e.dtype for e in expected}
        slack = max(_ROUNDING.get(kind, _ROUNDING[torch.half]) for kind in kinds)
        if not torch.stack(parts).norm() > slack * whole + 1e-12:
            return None
        name, worst = max(
            zip(self.copy.parameters, parts, strict=True), key=lambda pair: float(pair[1])
        )
        return name, float(worst / whole.clamp_min(1e-12))

    def _judge_state(self, after: dict[str, Tensor], other: dict[str, Tensor]) -> None:
        parameters = dict(self.copy.module.named_parameters())
        moved = [n for n in parameters if not same(self.copy.start[n], after[n])]
        if moved:
            raise PrivacyError(
                f"Expected the step to leave the weights alone, got `{moved[0]}` changed in "
                "`training_step` or forward, without noise. Leave updates to the optimizer."
            )
        filled = [n for n in after if n not in parameters and not same(after[n], other[n])]
        if filled:
            raise PrivacyError(
                f"Expected buffers that do not depend on the data, got `{filled[0]}`, which the "
                "step fills from the records; it is published without noise. Remove it, or "
                "compute it on public data before training."
            )


def _distance(found: Tensor, expected: Tensor) -> Tensor:
    """‖found − expected‖; infinite where one is finite and the other is not."""
    difference = (found.float() - expected.float()).nan_to_num(0.0, 0.0, 0.0)
    odd = found.isfinite() != expected.isfinite()
    return torch.where(odd.any(), torch.inf, difference.norm())
