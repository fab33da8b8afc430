"""Before the first step: which engine takes it, in what chunks, and is it sound?"""

import contextlib
import copy
import logging
import warnings

from defend.batching.memory import rows_that_fit
from defend.errors import DefendError, IndistinctRowsError
from defend.privacy.checks.dry_run import DryRun
from defend.privacy.checks.preconditions import Setup, hidden_rows
from defend.privacy.checks.selftest import RECORDS, SelfTest
from defend.privacy.gradients.layers import trainable_layers
from defend.training.config import Privacy
from defend.training.private_data import PrivateData

_MAX_RECORDS_IN_SELFTEST = 64  # in its largest batch
_log = logging.getLogger("defend")


class TryOut:
    """Chooses the engine of a fit, measures its chunks, and runs the self-test.

    Args:
        settings: what was asked for.
        dry_run: runs the step on copies of the module; goes over to one record at a time here.
        data: of the fit; likewise.
        hooks_to_come: whether the step may not work yet. If it does not, it is tried out just
            before the first one that is taken.

    Attributes:
        engine: "hooks" or "record".
        selftest: what the self-test found; None where it is off, or still to come.
    """

    def __init__(
        self, settings: Privacy, dry_run: DryRun, data: PrivateData, *, hooks_to_come: bool
    ) -> None:
        self.engine = "hooks"
        self.selftest: SelfTest | None = None
        self._settings, self._dry_run, self._data = settings, dry_run, data
        self._hooks_to_come = hooks_to_come

    def decide(self) -> None:
        """Hooks; one record at a time where that was asked for, or has to be.

        Raises:
            PrivacyError: with everything that was found.
        """
        self._warn_of_equal_views()
        asked = self._settings.engine
        if asked == "record":
            self._isolate()
        try:
            if asked != "record":
                self._refuse_hidden_rows()
            self._measure_and_test()
        except IndistinctRowsError as error:
            if asked != "auto":
                raise
            self._isolate()
            reason = error.args[0].partition(". ")[0].rstrip(".")
            try:
                self._measure_and_test()
            except Exception as second:
                second.add_note(f"defend: one record at a time was tried. Why: {reason}.")
                raise
            self._tell(reason)

    def _refuse_hidden_rows(self) -> None:
        """What the set-up shows without a step."""
        module = self._dry_run.module
        hidden = hidden_rows(Setup(module=module, world_size=self._data.processes.world_size))
        if hidden is not None:
            raise IndistinctRowsError(hidden)
        trainable_layers(module)

    def _isolate(self) -> None:
        self.engine, self.selftest = "record", None
        self._data.isolate()
        self._dry_run.isolate(may_couple=self._settings.engine == "record")

    def _measure_and_test(self) -> None:
        try:
            self._measure()
            if self._settings.selftest:
                self.selftest = self._dry_run.selftest(self._rows_to_try())
        except DefendError:
            raise
        except Exception as error:
            if self._runs_alone():
                raise IndistinctRowsError(
                    "Expected a step that runs while hooks watch its layers, got "
                    f"{type(error).__name__} with them, and none without."
                ) from error
            if not self._hooks_to_come or not self._settings.selftest:
                raise
            self._dry_run.pending = True  # it may need what they set up
        if self.selftest is not None:
            self.selftest.require()

    def _measure(self) -> None:
        """Rows of a chunk, on a GPU."""
        data, dry_run = self._data, self._dry_run
        on_gpu = next(dry_run.module.parameters()).device.type == "cuda"
        if on_gpu and self._settings.chunk_size == "auto" and not data.isolated:
            most = 2 * data.ordinary_rows
            rows = rows_that_fit(dry_run.peak_bytes, dry_run.free_bytes(), most=most)
            data.sampler.chunk_size = data.processes.broadcast(rows)

    def _rows_to_try(self) -> int:
        views, chunk = self._data.views, self._data.chunk_size
        if self._data.isolated:  # a loss that meets many records is asked for all of them
            return min(2 * self._data.ordinary_rows, _MAX_RECORDS_IN_SELFTEST * views)
        if views > 1 and chunk is not None:  # no more rows at once than in training
            most = min(self._dry_run.records, RECORDS)
            self._dry_run.records = min(max(chunk // views + 1, 3), most)
        large = 2 * self._data.ordinary_rows  # a batch may have more rows than expected
        return min(large, chunk or large, _MAX_RECORDS_IN_SELFTEST * views)

    def _runs_alone(self) -> bool:
        """Whether a step that failed under the hooks of the layers runs without them."""
        if self._settings.engine != "auto" or self._dry_run.step.isolated:
            return False
        alone = copy.copy(self._dry_run)
        alone.isolate(may_couple=False)
        with contextlib.suppress(Exception):
            return alone.selftest() is not None
        return False

    def _warn_of_equal_views(self) -> None:
        views = self._settings.views
        if views == 1 or self._dry_run.step.attack is not None:
            return
        with contextlib.suppress(Exception):  # the step may not work yet
            if self._dry_run.views_are_alike():
                warnings.warn(
                    f"views={views} asks the data set for each record {views} times, and it gave "
                    "the same each time. Augment in the data set or in a batch hook, or leave "
                    "`views` out.",
                    stacklevel=2,
                )

    def _tell(self, reason: str) -> None:
        """Why training is slow: one line."""
        if self._data.processes.rank == 0:
            _log.warning(
                "defend takes one record at a time (engine='record'), which costs a forward and "
                "backward for each. Why: %s.",
                reason,
            )
