"""One attack on one batch: restarts, chunks, records that stop early."""

import dataclasses
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from defend.attacks.ascent import Ascent, Best, Problem
from defend.attacks.cuda_graphs import replay_steps
from defend.attacks.result import GradientCounts
from defend.attacks.sizing import ChunkSize
from defend.batching.memory import run_in_chunks


@dataclasses.dataclass
class Restarts:
    """Gradient ascent on a batch from several starts, each record keeping its best δ.

    Attributes:
        problem: the batch.
        start: draws δ₀ of every record of the batch.
        ascent: makes the ascent of some records, from a δ of its own.
        steps: of gradient ascent from each start.
        restarts: starts.
        stop_when_fooled: whether records that fool the model are left where they are.
        graphed: whether to try CUDA graphs.
        size: the rows that fit.
        asked: chunk size that the user asked for.
        counts: of input gradients so far; written.
    """

    problem: Problem
    start: Callable[[], Tensor]
    ascent: Callable[[Problem, Tensor], Ascent]
    steps: int
    restarts: int
    stop_when_fooled: bool
    graphed: bool
    size: ChunkSize
    asked: int | str | None
    counts: GradientCounts = dataclasses.field(default_factory=GradientCounts)

    def best(self) -> Tensor:
        """δ of every record, its best over all restarts."""
        best = self._ascend(self.problem, self.start())
        for _ in range(self.restarts - 1):
            # Drawn for all records, so that one record's start does not depend on the others.
            delta = self.start()
            rows: slice | Tensor = slice(None)
            if self.stop_when_fooled:
                if best.fooled.all():
                    break
                rows = (~best.fooled).nonzero().squeeze(1)
            known = best.rows(rows)
            known.see_(self._ascend(self.problem.rows(rows), delta[rows]))
            best.put_(rows, known)
        return best.delta

    def _ascend(self, problem: Problem, delta: Tensor) -> Best:
        """All steps of the records of `problem` from `delta`, chunk by chunk."""
        outcome = Best.none(delta)
        step = partial(self._one_step, problem, delta)
        size = self.size.rows(self.asked, len(delta), step)
        fitted = run_in_chunks(
            partial(self._ascend_rows, problem, delta, outcome), len(delta), size
        )
        self.size.remember(size or len(delta), fitted)
        return outcome

    def _ascend_rows(
        self, problem: Problem, delta: Tensor, outcome: Best, start: int, stop: int
    ) -> None:
        """The rows start…stop. `outcome` is written last: a failed chunk leaves it as it was."""
        rows = slice(start, stop)
        ascent = self.ascent(problem.rows(rows), delta[rows].clone())
        if self.stop_when_fooled:
            found, gradients = self._ascend_until_fooled(ascent)
        else:
            if not (self.graphed and replay_steps(ascent, self.steps)):
                for _ in range(self.steps):
                    ascent()
            found = ascent.end(judged=self.restarts > 1)
            gradients = (stop - start) * self.steps
        outcome.put_(rows, found)
        self.counts += GradientCounts(gradients, *ascent.counts)

    def _one_step(self, problem: Problem, delta: Tensor, rows: int) -> None:
        """One step on the first `rows` rows, to measure its memory."""
        self.ascent(problem.rows(slice(0, rows)), delta[:rows].clone())()

    def _ascend_until_fooled(self, ascent: Ascent) -> tuple[Best, int]:
        """Steps on the records that do not fool the model yet; the others stay where they are.

        Returns:
            Where each record ended, and how many gradients that took.
        """
        outcome = Best.none(ascent.delta)
        unfooled = torch.arange(len(ascent.delta), device=ascent.delta.device)
        gradients = 0
        for _ in range(self.steps):
            adv, logits, losses = ascent.forward()
            now = ascent.seen(logits, losses)
            outcome.put_(unfooled, now)
            keep = (~now.fooled).nonzero().squeeze(1)
            if len(keep) == 0:
                return outcome, gradients
            if 2 * len(keep) <= len(unfooled):
                # A new forward of the few costs less than a backward of all.
                unfooled, ascent = unfooled[keep], ascent.rows(keep)
                keep = torch.arange(len(keep), device=keep.device)
                adv, _, losses = ascent.forward()
            gradients += len(unfooled)
            ascent.update(adv, losses)
            if len(keep) < len(unfooled):
                unfooled, ascent = unfooled[keep], ascent.rows(keep)
        outcome.put_(unfooled, ascent.end(judged=True))
        return outcome, gradients
