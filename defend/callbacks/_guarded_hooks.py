"""Hooks around a private step: one that changes something has to show in trials what it does."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from defend.batching.digest import digest, same
from defend.callbacks._hooks import UsersHooks
from defend.errors import PrivacyError
from defend.privacy.checks.state_watch import StateWatch
from defend.training.private import PrivateFit


class GuardedHooks:
    """Watches what hooks do to batches and to what is kept, and has them tried out.

    Args:
        hooks: of the user's.
        asked: whether there is to be a self-test at all.
    """

    def __init__(self, hooks: UsersHooks, *, asked: bool) -> None:
        self._hooks, self._asked = hooks, asked
        self._given: list[Any] | None = None  # digest of the batch as it was loaded
        self._inside: set[str] = set()  # what hooks around a backward wrote to, of the published

    def begin(self, batch: Any, batch_idx: int) -> None:
        """A batch is there, and no hook has seen it yet."""
        self._hooks.note_batch(batch_idx)
        self._given = digest(batch) if self._asked and self._hooks.see_batches() else None

    def check(self, batch: Any, fit: PrivateFit) -> None:
        """The batch goes into the step: is it what was loaded, and is nothing kept?

        Raises:
            PrivacyError: if a hook changed something that trials find unsound, or do not show.
        """
        if not self._asked:
            return
        given, self._given = self._given, None
        if given is not None and not self._hooks.before and not same(given, digest(batch)):
            self._hooks.before = True
            fit.look(whole=True)
            if self._hooks.untried or not self._hooks.changes:
                fit.doubt()
                raise PrivacyError(
                    "Expected batches that reach the step as they were loaded, or as hooks that "
                    "can be tried out leave them, got one that `on_train_batch_start` changed, "
                    f"which trials do not show ({self._hooks.untried or 'they change nothing'}). "
                    "Do it in on_after_batch_transfer or in training_step; selftest=False leaves "
                    "you to answer for it."
                )
        self._check_state(fit)

    @contextmanager
    def around_backward(self, module: nn.Module, loss: Tensor) -> Iterator[None]:
        """Around the backward of a chunk, and the hooks before and after it.

        Raises:
            PrivacyError: if a hook changed the loss itself.
        """
        before = _graph_of(loss)
        watch = StateWatch(module) if self._asked and self._hooks.run_inside() else None
        if watch is not None:
            watch.note()
        yield
        if watch is not None:
            self._inside |= set(watch.take())
        if before != _graph_of(loss):
            raise PrivacyError(
                "Expected the loss to go into the backward as `training_step` returned it, got one "
                "that `on_before_backward` changed: it may scale the gradient of each record by "
                "all others. Change the loss in training_step, where it is tried out."
            )

    def check_end(self, fit: PrivateFit) -> None:
        """The fit is over; the last look at what is kept.

        Raises:
            PrivacyError: as `check` does.
        """
        if self._asked and not self._hooks.averages:
            self._hooks.ended = True
            self._check_state(fit)

    def _check_state(self, fit: PrivateFit) -> None:
        inside = self._hooks.run_inside()
        names = (set(fit.take_state(inside=inside)) | self._inside) - self._hooks.after
        new = names | (fit.watch.inside - self._hooks.after if inside else set())
        if not new:
            return
        self._hooks.after |= new
        fit.look(whole=True)
        published = names & fit.watch.published
        hidden = published - self._hooks.kept or (published if self._hooks.untried else set())
        if hidden:
            fit.doubt()
            raise PrivacyError(
                f"Expected nothing to be kept from one step to the next, got `{min(hidden)}`, "
                "which something changed after the step, and which trials of the hooks do not show "
                f"({self._hooks.untried or 'it stays as it is'}). If it depends on the records, it "
                "is published without noise. Do it in training_step, where it is tried out, or on "
                "public data; selftest=False leaves you to answer for it."
            )


def _graph_of(loss: Tensor) -> tuple[Any, ...]:
    """What a change in place, or a hook on it, changes of a loss."""
    return loss._version, loss.grad_fn, len(loss._backward_hooks or ())
