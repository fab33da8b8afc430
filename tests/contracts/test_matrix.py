"""The matrix of places, whats and triggers: a part that holds every pair, and each guard off."""

import re
from contextlib import nullcontext

import pytest

from defend.callbacks._guarded_hooks import GuardedHooks
from defend.callbacks._hooks import UsersHooks
from defend.privacy.checks import dry_run, rare_records
from defend.privacy.checks.comparisons import Comparisons
from defend.privacy.checks.dry_run_records import Survey
from defend.privacy.checks.state_watch import StateWatch
from defend.privacy.checks.step_on_copy import StepOnCopy
from defend.privacy.mechanism.user_randomness import UserRandomness
from defend.training.looks import Looks
from defend.training.private import PrivateFit
from defend.training.recorded_loader import RecordedLoader
from tests.contracts.matrix.__main__ import TABLE
from tests.contracts.matrix.cells import SOUND, Cell, all_cells, pairs, pairwise
from tests.contracts.matrix.judge import DETECTED, PROMISE, REFUSED, SAFE, verdict

CELLS = pairwise(all_cells())


@pytest.mark.parametrize("place", dict.fromkeys(cell.place for cell in CELLS))
def test_no_cell_breaks_in_silence(place):
    for cell in CELLS:
        if cell.place == place:
            word, how = verdict(cell)
            wanted = {SAFE} if cell.what == SOUND else {REFUSED, DETECTED, SAFE, PROMISE}
            assert word in wanted, f"{cell}: {word} ({how})"


def test_there_are_many_cells_and_few_promises():
    cells = all_cells()
    assert len(cells) == len(set(cells)) >= 300
    assert set().union(*map(pairs, CELLS)) == set().union(*map(pairs, cells))


def test_the_table_is_of_these_cells():
    """Written by `make matrix`; what the guarantee says is read against it."""
    text = TABLE.read_text()
    assert f"{len(all_cells())} small programs" in text
    assert "0 others" in text
    assert "**!**" not in text
    promises = int(re.search(r"(\d+) promise", text)[1])
    assert promises <= 0.05 * len(all_cells())


def off(*replaced):
    """Switches guards off: each an owner, a name, and what stands there instead."""

    def switch(monkeypatch):
        for owner, name, value in replaced:
            monkeypatch.setattr(owner, name, value)

    return switch


plain_judge = Comparisons._judge_others


def only_the_first_step(self, found, expected, number):
    if number == 0:
        plain_judge(self, found, expected, number)


# What sees a batch and what is kept; each notices more than one break.
HOOKS = [(GuardedHooks, "check", lambda *_: None), (GuardedHooks, "check_end", lambda *_: None)]
LOOKS = (Looks, "are_due", lambda *_: False)
RARE = [
    (rare_records, "changes_of", lambda *_: []),
    (dry_run, "survey", lambda _: Survey([], [])),
]

GUARDS = {
    "hooks before the step": (
        off(*HOOKS),
        Cell("batch start, callback", "coupled", "always"),
    ),
    "secret numbers": (
        off((UserRandomness, "renew", lambda *_, **__: None)),
        Cell("batch end, module", "known numbers", "always"),
    ),
    "what is kept": (
        off((StateWatch, "take", lambda _, **__: [])),
        Cell("epoch end, callback", "published", "always"),
    ),
    "steps in a row": (
        off((Comparisons, "_judge_others", only_the_first_step)),
        Cell("training_step", "carried", "periodic"),
    ),
    "rare records": (
        off(*RARE, *HOOKS, LOOKS),
        Cell("training_step", "coupled", "rare label"),
    ),
    "looks": (
        off(LOOKS, *HOOKS),
        Cell("collate", "twice", "late"),
    ),
    "the batch of a loop": (
        off((RecordedLoader, "check", lambda *_: None)),
        Cell("own loop, before the step", "coupled", "always"),
    ),
    "what a loop keeps": (
        off((PrivateFit, "first_read", lambda _: None)),
        Cell("own loop, after the step", "carried", "always"),
    ),
    "hooks within the step": (
        off((UsersHooks, "run_inside", lambda _: False)),
        Cell("after backward, module", "carried", "always"),
    ),
    "the module's update": (
        off((UsersHooks, "_update", lambda _, trial, __: trial.clock.end_step())),
        Cell("optimizer_step", "carried", "always"),
    ),
    "what workers count": (
        off((PrivateFit, "_as_in_workers", lambda _: nullcontext())),
        Cell("collate, worker", "coupled", "late"),
    ),
    "weights outside": (
        off((StepOnCopy, "_refuse_foreign_weights", lambda *_: None)),
        Cell("loss", "outside", "always"),
    ),
}


@pytest.mark.parametrize("name", GUARDS)
def test_without_its_guard_a_cell_is_silent(name, monkeypatch):
    switch, cell = GUARDS[name]
    assert verdict(cell)[0] in (REFUSED, DETECTED, SAFE)
    switch(monkeypatch)
    assert verdict(cell)[0] == "silent"
