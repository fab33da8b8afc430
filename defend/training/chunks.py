"""One logical batch through a private step, in chunks that fit into memory."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch

from defend.batching.chunks import count_rows, even_bounds, slice_rows
from defend.errors import PrivacyError
from defend.privacy.mechanism.sampling import PoissonBatchSampler
from defend.privacy.mechanism.step import PrivateStep
from defend.training.processes import Processes


class LogicalBatch:
    """A batch that the sampler drew, and what it drew it as.

    Args:
        batch: what the private loader gave, in any container.
        step: clips and sums its chunks.
        sampler: drew it; its chunk size shrinks where a chunk does not fit.
        processes: this process among all.

    Raises:
        PrivacyError: if the batch does not hold its rows for each sampled record.
    """

    def __init__(
        self, batch: Any, step: PrivateStep, sampler: PoissonBatchSampler, processes: Processes
    ) -> None:
        if not sampler.drawn:
            raise PrivacyError(
                "Expected a batch of the private loader, got one that its sampler did not draw: "
                "the loader was replaced during the fit, or a batch was used twice. Leave both "
                "to the training loop."
            )
        self.batch, self.step, self.sampler, self.processes = batch, step, sampler, processes
        self.drawn, self.views = sampler.drawn.popleft(), sampler.views
        rows, views = count_rows(batch), self.views
        if rows is None or rows != self.drawn.slots * views:
            raise PrivacyError(
                f"Expected {self.drawn.slots * views} rows, {'one' if views == 1 else views} for "
                f"each sampled record, got {rows}. The collate function or a batch hook drops, "
                "adds or merges records; let it keep one row for each item of the data set."
            )

    def run(self, compute: Callable[[Any, int], None]) -> None:
        """Forward and backward chunk by chunk; each is clipped, summed and forgotten.

        Args:
            compute: (chunk, rows) → None, with a backward from the sum of the rows' losses.
        """
        start = 0
        while start < self.drawn.slots:
            stop = self._next_stop(start)
            if self._run_records(start, stop, compute):
                start = stop

    def _next_stop(self, start: int) -> int:
        """The end of the chunk that starts at a record: the rest in even parts that fit."""
        size = math.ceil(self.drawn.slots / self.drawn.chunks)
        most = self.sampler.records_in_a_chunk
        if most is not None:  # it may have shrunk since the batch was drawn
            size = min(size, most)
        left = self.drawn.slots - start
        return start + even_bounds(left, math.ceil(left / size))[0][1]

    def _run_records(self, start: int, stop: int, compute: Callable[[Any, int], None]) -> bool:
        """Records start…stop; False if they did not fit: nothing counted, and smaller chunks."""
        drawn, views, step = self.drawn, self.views, self.step
        held, rows = stop - start, (stop - start) * views
        chunk = self.batch
        if held < drawn.slots:
            chunk = slice_rows(chunk, start * views, stop * views, drawn.slots * views)
        step.expect(rows, min(max(drawn.records - start, 0), held))
        try:
            compute(chunk, rows)
            if step.pending:
                step.fold()
            return True
        except torch.OutOfMemoryError as error:
            if held == 1 or self.processes.world_size > 1:
                if views > 1:
                    error.add_note(f"The {views} views of a record run at once: lower `views`.")
                raise
            step.discard()
            message = str(error).splitlines()[0] if str(error) else "out of memory"
        # Outside the handler: the traceback would keep the tensors that did not fit.
        self.sampler.chunk_size = math.ceil(held / 2) * views
        warnings.warn(
            f"{rows} rows did not fit ({message}); going on with {self.sampler.chunk_size} at a "
            "time. What the chunk logged before it failed is in the log twice.",
            stacklevel=2,
        )
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return False
