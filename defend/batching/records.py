"""A logical batch as one batch a record, each put together alone."""

from collections.abc import Callable
from typing import Any


class RecordBatches(list[Any]):
    """The batches of the records of a logical batch, in order; each holds the views of one record.

    Training loops hand it on as it is: nothing looks into it but the step.
    """

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("_"):
            raise AttributeError(
                f"Expected what reads `{name}` of a batch to run within the step, got a list of "
                "one batch a record (engine='record'), which is not put together. Do it in the "
                "loss, in training_step or in the collate function."
            )
        raise AttributeError(name)


class RecordCollate:
    """Puts each record together alone: items → `RecordBatches`.

    Args:
        collate: the user's, or what stands for it: items → batch. May be pickled if that may.
        views: items of a record, next to each other.
        before: called before each record, in the process that loads.
    """

    def __init__(
        self, collate: Callable[[list[Any]], Any], views: int, before: Callable[[], Any]
    ) -> None:
        self.collate, self.views, self.before = collate, views, before

    def __call__(self, items: list[Any]) -> RecordBatches:
        """The batches of records that follow each other, `views` items each."""
        found = RecordBatches()
        for start in range(0, len(items), self.views):
            self.before()
            found.append(self.collate(items[start : start + self.views]))
        return found
