"""What the self-test does with a copy of the user's module, part by part."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from defend.errors import PrivacyError
from defend.privacy.checks.constant_randomness import StillRandomness, seeded
from defend.privacy.checks.module_copy import (
    changed,
    generators_of,
    restore,
    rows_differ,
    same,
    state_of,
    trace,
)
from defend.privacy.gradients.per_record import PerRecordGradients
from defend.privacy.mechanism.gaussian import clip_and_sum

# Random numbers at several places of their range, and seeds whose first numbers (numpy's and
# Python's) lie there too: what is done with a chance of 2% or 98% is met as well.
_LOOKS = ((0.37, 35), (0.01, 1751), (0.99, 1470))

# Structure breaks a gradient by its own size; rounding stays far below these.
_SLACK = {torch.float64: 1e-4, torch.float32: 1e-2}
_SLACK_HALF = 1e-1
_MOVE_SLACK = 1e-2
_MOVE_SLACK_ATTACKED = 5e-2  # a sign that flips by rounding moves a whole step of the attack

_TRIES = 24  # (0.8² + 0.2²)² for two records with a coin of 20%, to this power: 1e-8

Loss = Callable[[nn.Module, Any], Tensor]
Attack = Callable[[nn.Module, Any], Any]
Anew = Callable[[nn.Module, Any, int], Any]
Backward = Callable[[Tensor], None]


class ProbedStep:
    """A step on a copy of the module, and what must hold of it (`selftest` lists the parts).

    Args are those of `selftest`; `module` is the copy, and moves.
    """

    def __init__(
        self,
        module: nn.Module,
        records: list[Any],
        loss: Loss,
        collate: Callable[[list[Any]], Any],
        attack: Attack | None,
        attack_anew: Anew | None,
        backward: Backward,
        max_grad_norm: float,
        views: int,
        half: bool,
    ) -> None:
        self.module, self.loss, self.collate, self.attack = module, loss, collate, attack
        self.attack_anew = attack_anew
        self.backward, self.views = backward, views
        *self.records, self.spare = records
        self.max_grad_norm, self.half = max_grad_norm, half
        self.findings: list[str] = []
        self.parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self.devices = sorted({p.device for p in module.parameters()}, key=str)
        self.before, self.generators = state_of(module), generators_of(module)

    def run(self, rows: int | None) -> tuple[list[str], float]:
        """The whole test: findings, and how far one record moved the clipped sum."""
        with self._watched() as per_record:
            for turn, (part, seed) in enumerate(_LOOKS):
                self._alone(per_record, turn, part, seed)
            if rows is not None and rows // self.views > len(self.records):
                self._alone(per_record, 0, *_LOOKS[0], count=rows // self.views)
            largest = self._leave_one_out(per_record)
            self._replace_one(per_record)
            return self.findings, largest
        return self.findings, 0.0

    def look_again(self, turn: int) -> list[str]:
        """The parts that may turn out otherwise later, at other random numbers each turn."""
        with self._watched() as per_record:
            self._alone(per_record, turn, (0.37 + 0.618 * turn) % 1, turn)
            if self.attack is not None:
                self._replace_one(per_record)
        return self.findings

    @contextmanager
    def _watched(self) -> Iterator[PerRecordGradients]:
        """Hooks on the copy; the first finding ends the block."""
        per_record = PerRecordGradients(self.module, views=self.views, loss_reduction="sum")
        try:
            yield per_record
        except PrivacyError as error:  # ours, or what reading the gradients found by itself
            self.findings.append(str(error))
        finally:
            per_record.remove()

    def _gradients(
        self, per_record: PerRecordGradients, records: list[Any], seed: int
    ) -> list[Tensor]:
        """Gradients `[records, *shape]` of one batch, from the state that the copy started in."""
        with seeded(seed, self.devices):
            return self._step(per_record, self.collate(list(records)), len(records))

    def _attacked(self, per_record: PerRecordGradients, batch: Any) -> Any:
        """The adversarial batch.

        Raises:
            PrivacyError: if the attack left anything behind.
        """
        if self.attack is None:
            return batch
        restore(self.module, self.before, self.generators)
        before = trace(self.module, self.devices, per_record)
        batch = self.attack(self.module, batch)
        left = changed(before, trace(self.module, self.devices, per_record))
        if left is not None:
            raise PrivacyError(
                f"Expected an attack that leaves no trace on the module, got a changed {left}. "
                "Run it in `defend.attacks.no_trace`, or restore what it changes."
            )
        return batch

    def _step(self, per_record: PerRecordGradients, batch: Any, records: int) -> list[Tensor]:
        rows = records * self.views
        restore(self.module, self.before, self.generators)
        per_record.expect(rows)
        with torch.enable_grad():
            self.backward(self.loss(self.module, batch) * rows)
        try:
            return [g.detach().clone() for g in per_record.read(rows)]
        finally:
            per_record.clear()

    # --- 1: alone or together ---------------------------------------------------------------------

    def _alone(
        self,
        per_record: PerRecordGradients,
        turn: int,
        part: float,
        seed: int,
        count: int | None = None,
    ) -> None:
        """The first of the records in a batch, against that record in a batch of its own."""
        first = turn % len(self.records)
        records = self.records[first:] + self.records[:first]
        if count is not None:
            records = list(itertools.islice(itertools.cycle(records), count))
        with StillRandomness(part):
            together = [g[0] for g in self._gradients(per_record, records, seed)]
            after = state_of(self.module)
            try:
                alone = self._autograd(per_record, records[0], seed)
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
        self._judge_state(after, state_of(self.module))

    def _autograd(self, per_record: PerRecordGradients, record: Any, seed: int) -> list[Tensor]:
        """The gradient of one record in a batch of its own, without hooks."""
        restore(self.module, self.before, self.generators)
        with seeded(seed, self.devices), per_record.paused(), torch.enable_grad():
            # Not `autograd.grad`: reentrant checkpoints forbid it.
            self.backward(self.loss(self.module, self.collate([record])))
        return [
            torch.zeros_like(p) if p.grad is None else p.grad.to_dense()
            for p in self.parameters.values()
        ]

    # --- 2: leave one out -------------------------------------------------------------------------

    def _leave_one_out(self, per_record: PerRecordGradients) -> float:
        """‖sum over all − sum without the first record‖ / C."""
        sums = []
        for records in (self.records, self.records[1:]):
            with StillRandomness(), seeded(0, self.devices):
                batch = self._attacked(per_record, self.collate(list(records)))
                gradients = self._step(per_record, batch, len(records))
            sums.append(clip_and_sum(gradients, self.max_grad_norm))
        moves = torch.stack([(a - b).float().norm() for a, b in zip(*sums, strict=True)])
        largest = float(moves.norm()) / self.max_grad_norm
        if largest > 1 + (_MOVE_SLACK if self.attack is None else _MOVE_SLACK_ATTACKED):
            raise PrivacyError(
                "Expected the clipped sum to move by at most C without one record, got "
                f"{largest:.2f} C: other records' gradients change with it, or it is counted more "
                "than once."
            )
        return largest

    # --- 3 and 4: replace one, no trace -----------------------------------------------------------

    def _replace_one(self, per_record: PerRecordGradients) -> None:
        outcomes = []
        for first in (self.records[0], self.spare):
            records = [first, *self.records[1:]]
            with seeded(1, self.devices):
                batch = self._attacked(per_record, self.collate(list(records)))
            with seeded(2, self.devices):
                gradients = self._step(per_record, batch, len(records))
            outcomes.append((batch, gradients, state_of(self.module)))
        (batch, gradients, after), (other_batch, other_gradients, other_after) = outcomes
        self._judge_state(after, other_after)
        if self.attack is not None and rows_differ(
            batch, other_batch, len(self.records) * self.views, first=self.views
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
        if self.attack is not None:
            self._secret_attack(other_batch)
            gradients = self._gradients(per_record, self.records, 2)  # of clean rows, as below
        self._secret(per_record, gradients)

    def _secret_attack(self, before: Any) -> None:
        """Random numbers of the attack come from the generator that it is given, or the globals.

        An attack that draws known numbers gives the same rows from any secret ones, but others
        when all random numbers stand still. So may one that tosses a coin for each record, by
        chance: it has many tries to show that it can do otherwise.
        """
        anew = self.attack_anew
        if anew is None:
            return

        def same(number: int) -> bool:
            restore(self.module, self.before, self.generators)
            with seeded(4 + number, self.devices):
                batch = self.collate([self.spare, *self.records[1:]])
                again = anew(self.module, batch, number)
            return not rows_differ(before, again, len(self.records) * self.views, first=0)

        with StillRandomness():
            if same(0):
                return
        if all(same(number) for number in range(_TRIES)):
            raise PrivacyError(
                "Expected random starts from the generator that the attack is given, which is "
                "secret in a private fit, got an attack that draws the same numbers whatever that "
                "is seeded with. Leaving one record out would change the starts of all others by "
                "a known amount. Draw from `generator`."
            )

    def _secret(self, per_record: PerRecordGradients, before: list[Tensor]) -> None:
        """Random numbers of the step come from where a fit keeps them secret."""
        before = [g[1:] for g in before]
        other_seed = [g[1:] for g in self._gradients(per_record, self.records, 4)]
        if self._difference(before, other_seed) is not None:
            return
        with StillRandomness():
            still = [g[1:] for g in self._gradients(per_record, self.records, 4)]
        if self._difference(other_seed, still) is not None:
            raise PrivacyError(
                "Expected random numbers from the global generators, which are secret in a "
                "private fit, got a step that draws the same ones whatever they are seeded "
                "with: a generator of its own, or manual_seed in the step. Leaving one record "
                "out would change those of all others by a known amount. Drop the generator."
            )

    def _difference(self, found: list[Tensor], expected: list[Tensor]) -> tuple[str, float] | None:
        """Where two gradients differ most, relative to the whole of it; None if by rounding."""
        whole = torch.stack([e.float().norm() for e in expected]).norm()
        parts = [(f - e).float().norm() for f, e in zip(found, expected, strict=True)]
        slack = (
            _SLACK_HALF if self.half else max(_SLACK.get(e.dtype, _SLACK_HALF) for e in expected)
        )
        if not torch.stack(parts).norm() > slack * whole + 1e-12:
            return None
        name, worst = max(zip(self.parameters, parts, strict=True), key=lambda pair: float(pair[1]))
        return name, float(worst / whole.clamp_min(1e-12))

    def _judge_state(self, after: dict[str, Tensor], other: dict[str, Tensor]) -> None:
        parameters = dict(self.module.named_parameters())
        moved = [n for n in parameters if not same(self.before[n], after[n])]
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
