"""The runs of one attack on one batch: restarts, chunks, records that stop early."""

import dataclasses
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from defend.attacks.ascent import Ascent, Best, Problem
from defend.attacks.cuda_graphs import cache as graphs
from defend.attacks.sizing import ChunkSize
from defend.batching.memory import run_in_chunks


@dataclasses.dataclass
class Climb:
    """What is run, from where, and how often.

    Attributes:
        problem: the batch.
        start: draws δ₀ of every record of the batch.
        ascent: one run over some records, from a δ of its own.
        steps: in a run.
        restarts: runs.
        stop_when_fooled: whether records that fool the model are left where they are.
        graphed: whether to try CUDA graphs.
        size: the rows that fit.
        asked: chunk size that the user asked for.
        gradients: input gradients computed so far; written.
        counts: int64 `[2]`: those that were zero, and that were not finite; written.
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
    gradients: int = 0
    counts: Tensor = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.counts = torch.zeros(2, dtype=torch.int64, device=self.problem.x.device)

    def best(self) -> Tensor:
        """δ of every record, its best over all restarts."""
        best = self._run(self.problem, self.start())
        for _ in range(self.restarts - 1):
            # Drawn for all records, so that one record's start does not depend on the others.
            delta = self.start()
            rows: slice | Tensor = slice(None)
            if self.stop_when_fooled:
                if best.fooled.all():
                    break
                rows = (~best.fooled).nonzero().squeeze(1)
            known = best.rows(rows)
            known.see_(self._run(self.problem.rows(rows), delta[rows]))
            best.put_(rows, known)
        return best.delta

    def _run(self, problem: Problem, delta: Tensor) -> Best:
        """One run of all records of `problem` from `delta`, chunk by chunk."""
        outcome = Best.none(delta)
        step = partial(self._one_step, problem, delta)
        size = self.size.rows(self.asked, len(delta), step)
        fitted = run_in_chunks(partial(self._run_rows, problem, delta, outcome), len(delta), size)
        self.size.remember(size or len(delta), fitted)
        return outcome

    def _run_rows(
        self, problem: Problem, delta: Tensor, outcome: Best, start: int, stop: int
    ) -> None:
        """The rows start…stop. Writes into `outcome` at its end, so that it may fail before."""
        rows = slice(start, stop)
        ascent = self.ascent(problem.rows(rows), delta[rows].clone())
        if self.stop_when_fooled:
            found, gradients = self._climb_standing(ascent)
        else:
            if not (self.graphed and graphs.climb(ascent, self.steps)):
                for _ in range(self.steps):
                    ascent()
            found = ascent.end(judged=self.restarts > 1)
            gradients = (stop - start) * self.steps
        outcome.put_(rows, found)
        self.counts += ascent.counts
        self.gradients += gradients

    def _one_step(self, problem: Problem, delta: Tensor, rows: int) -> None:
        """One step on the first so many rows, to measure its memory."""
        self.ascent(problem.rows(slice(0, rows)), delta[:rows].clone())()

    def _climb_standing(self, ascent: Ascent) -> tuple[Best, int]:
        """Steps on the records that do not fool the model yet; the others stay where they did.

        Returns:
            Where each record ended, and how many gradients that took.
        """
        outcome = Best.none(ascent.delta)
        standing = torch.arange(len(ascent.delta), device=ascent.delta.device)
        gradients = 0
        for _ in range(self.steps):
            adv, logits, losses = ascent.forward()
            now = ascent.seen(logits, losses)
            outcome.put_(standing, now)
            keep = (~now.fooled).nonzero().squeeze(1)
            if len(keep) == 0:
                return outcome, gradients
            if 2 * len(keep) <= len(standing):
                # A new forward of the few costs less than a backward of all.
                standing, ascent = standing[keep], ascent.rows(keep)
                keep = torch.arange(len(keep), device=keep.device)
                adv, _, losses = ascent.forward()
            gradients += len(standing)
            ascent.climb(adv, losses)
            if len(keep) < len(standing):
                standing, ascent = standing[keep], ascent.rows(keep)
        outcome.put_(standing, ascent.end(judged=True))
        return outcome, gradients
