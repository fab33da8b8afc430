"""One logical batch, in chunks that fit into memory."""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from defend.batching.chunks import even_bounds, holds_rows, slice_rows
from defend.batching.records import RecordBatches
from defend.errors import PrivacyError
from defend.privacy.mechanism.sampling import Drawn
from defend.privacy.mechanism.step import PrivateStep
from defend.training.private_data import PrivateData


def chunks_of(batch: Any, drawn: Drawn, step: PrivateStep, data: PrivateData) -> Iterator["Chunk"]:
    """The chunks of a logical batch; each is to be run within `with chunk:`.

        for chunk in chunks_of(batch, drawn, step, data):
            with chunk:
                backward(loss(chunk.batch) * chunk.rows)

    At its end a chunk is clipped, summed and forgotten. One that runs out of memory counts for
    nothing, and comes again in halves.

    Args:
        batch: what the private loader gave, in any container.
        drawn: what it was drawn as, from `drawn_as`.
        step: clips and sums.
        data: its chunk size shrinks where a chunk does not fit.
    """
    start = 0
    while start < drawn.slots:
        stop = start + 1 if data.isolated else _next_stop(start, drawn, data)
        chunk = Chunk(batch, drawn, (start, stop), step, data)
        yield chunk
        if chunk.did_not_fit is None:
            start += chunk.records
        else:
            _halve(chunk, data)


class Chunk:
    """Some records of a logical batch.

    Attributes:
        batch: their rows, in the container of the whole.
        records: how many, padding included.
        rows: how many, views included.
        did_not_fit: why, where memory ran out; None otherwise.
    """

    def __init__(
        self,
        batch: Any,
        drawn: Drawn,
        bounds: tuple[int, int],
        step: PrivateStep,
        data: PrivateData,
    ) -> None:
        start, stop = bounds
        views, self.records = data.views, stop - start
        self.rows = self.records * views
        self.batch = batch
        if isinstance(batch, RecordBatches):
            self.batch = batch[start]
        elif self.records < drawn.slots:
            self.batch = slice_rows(batch, start * views, stop * views, drawn.slots * views)
        self.did_not_fit: str | None = None
        counted = min(max(drawn.records - start, 0), self.records)  # the rest is padding
        self._context = self._folding(step, data, counted)

    def __enter__(self) -> None:
        self._context.__enter__()

    def __exit__(self, *error: Any) -> bool | None:
        return self._context.__exit__(*error)

    @contextmanager
    def _folding(self, step: PrivateStep, data: PrivateData, counted: int) -> Iterator[None]:
        step.expect(self.rows, counted)
        try:
            yield
            if step.pending:  # a hook after the backward may have folded it
                step.fold()
        except torch.OutOfMemoryError as error:
            if self.records == 1 or data.processes.world_size > 1:
                if data.views > 1:
                    views = f"{data.views} views of a record"
                    error.add_note(f"The {views} run at once: lower `views`.")
                raise
            step.discard()
            self.did_not_fit = str(error).splitlines()[0] if str(error) else "out of memory"


def drawn_as(batch: Any, data: PrivateData) -> Drawn:
    """What the sampler drew a batch as.

    Raises:
        PrivacyError: if the batch does not hold its rows for each sampled record.
    """
    sampler, views = data.sampler, data.views
    if not sampler.drawn:
        raise PrivacyError(
            "Expected a batch of the private loader, got one that its sampler did not draw: "
            "the loader was replaced during the fit, or a batch was used twice. Leave both "
            "to the training loop."
        )
    drawn = sampler.drawn.popleft()
    if data.isolated:
        _refuse_others(batch, drawn)
        return drawn
    rows = holds_rows(batch, drawn.slots * views)
    if rows is None or rows != drawn.slots * views:
        raise PrivacyError(
            f"Expected {drawn.slots * views} rows, {'one' if views == 1 else views} for "
            f"each sampled record, got {rows}. The collate function or a batch hook drops, "
            "adds or merges records; let it keep one row for each item of the data set."
        )
    return drawn


def _refuse_others(batch: Any, drawn: Drawn) -> None:
    if not isinstance(batch, RecordBatches) or len(batch) != drawn.slots:
        raise PrivacyError(
            f"Expected the list of one batch a record, {drawn.slots} of them, as the loader gave "
            f"it, got a {type(batch).__name__}. Hand it on as it is; what is done to records "
            "belongs into the data set, the collate function or the step."
        )


def _halve(chunk: Chunk, data: PrivateData) -> None:
    """Go on in smaller chunks. Nothing holds what did not fit any more."""
    size = data.sampler.chunk_size = math.ceil(chunk.records / 2) * data.views
    warnings.warn(
        f"{chunk.rows} rows did not fit ({chunk.did_not_fit}); going on with {size} at a "
        "time. What the chunk logged before it failed is in the log twice.",
        stacklevel=3,
    )
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _next_stop(start: int, drawn: Drawn, data: PrivateData) -> int:
    """The end of the chunk that starts at a record: the rest in even parts that fit."""
    size = math.ceil(drawn.slots / drawn.chunks)
    most = data.sampler.records_in_a_chunk
    if most is not None:  # it may have shrunk since the batch was drawn
        size = min(size, most)
    left = drawn.slots - start
    return start + even_bounds(left, math.ceil(left / size))[0][1]
