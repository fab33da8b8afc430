"""Every row of the README's table, against what is found by running it."""

import pytest
import torch

from defend import BudgetError, PrivacyError
from tests.contracts import defend_does, opacus_alone, table
from tests.contracts.defend_does import yardstick
from tests.contracts.defend_does.yardstick import breaks, expected, judge, largest_move, measure
from tests.contracts.outcomes import Outcome
from tests.contracts.rows import ROWS, SAME_AS
from tests.contracts.small import batch, loss, net
from tests.contracts.verdicts import defend, opacus

KEYS = [key for rows in ROWS.values() for _, key in rows]


@pytest.mark.parametrize("key", [*KEYS, *SAME_AS])
def test_no_break_is_let_through(key):
    outcome = defend(key)
    assert outcome.verdict in ("refused", "self-test", "safe"), outcome
    assert outcome.detail


def test_every_break_has_its_row_or_a_reason():
    assert len(KEYS) == len(set(KEYS)) >= 45
    named = {*KEYS, *SAME_AS, *defend_does.NOT_APPLICABLE}
    assert named == {*opacus_alone.BREAKS, *defend_does.BREAKS}
    assert set(defend_does.BREAKS) == {*KEYS, *SAME_AS}
    assert set(SAME_AS.values()) <= set(KEYS)


def test_what_opacus_accepts_defend_refuses_or_detects():
    won = [
        key
        for key in KEYS
        if key in opacus_alone.BREAKS
        and opacus(key).verdict == "accepts"
        and defend(key).verdict in ("refused", "self-test")
    ]
    assert len(won) >= 25, won


def test_the_self_test_finds_what_only_it_can_see():
    for key in ("weighted_cross_entropy", "mixup_in_step", "in_batch_negatives", "sum_reduction"):
        assert defend(key).verdict == "self-test"
        assert "each record's gradient" in defend(key).detail


def test_the_readme_holds_exactly_this_table():
    text = table.README.read_text()
    assert text.count(table.BEGIN) == text.count(table.END) == 1
    found = table.BEGIN + text.split(table.BEGIN)[1].split(table.END)[0] + table.END
    assert found == table.section(), "run `python -m tests.contracts.table`"


def test_the_section_is_written_once_and_rewritten_in_its_place():
    text = f"# a\n\n{table.NEXT}\n\nb\n"
    once = table.write(text, f"{table.BEGIN}\n1\n{table.END}")
    assert once == (
        f"# a\n\n{table.HEADING}\n\n{table.BEGIN}\n1\n{table.END}\n\n{table.NEXT}\n\nb\n"
    )
    assert table.write(once, f"{table.BEGIN}\n2\n{table.END}") == once.replace("\n1\n", "\n2\n")


# --- the yardstick itself -------------------------------------------------------------------------


def test_an_ordinary_module_is_safe_and_reaches_C():  # noqa: N802
    value = largest_move(norms=(0.1,))
    assert 0.999 < value <= 1 + yardstick.ROUNDING
    assert judge(value).verdict == "safe"


def test_the_yardstick_rejects_a_clip_to_one_percent_more(monkeypatch):
    """A planted wrong answer, in the clipping itself."""
    from defend.privacy.mechanism import clipping
    from defend.training import config

    monkeypatch.setattr(config, "check_clipping", lambda rule: None)  # which would refuse it
    right = clipping.clip_factors
    monkeypatch.setattr(clipping, "clip_factors", lambda n, c: 1.01 * right(n, c))
    monkeypatch.setattr(yardstick, "dp", lambda **s: _dp(**{**s, "selftest": False}))
    assert measure(norms=(0.1,)) == Outcome("open", "sensitivity 1.010 C")


_dp = yardstick.dp


def test_the_yardstick_sees_what_the_self_test_is_told_to_pass_over(monkeypatch):
    """Records that see each other, with the self-test off: the measurement finds it by itself."""
    monkeypatch.setattr(yardstick, "dp", lambda **s: _dp(**{**s, "selftest": False}))
    outcome = measure(net, lambda m, x, y: loss(m, x - x.mean(0), y))
    assert outcome.verdict == "open"


def test_a_refusal_after_the_weights_were_moved_is_no_refusal():
    class Early(yardstick.Plain):
        def setup(self, stage):
            with torch.no_grad():
                self.network[0].weight += 1.0
            raise PrivacyError("Expected nothing.")

    with pytest.raises(AssertionError):
        yardstick.fit(Early())


def test_errors_of_others_are_not_verdicts():
    def broken():
        raise RuntimeError("not ours")

    table_of_one = breaks()
    table_of_one.add(broken)
    with pytest.raises(RuntimeError, match="not ours"):
        table_of_one["broken"]()


@pytest.mark.parametrize(
    ("text", "short"),
    [
        ("This run would not be private. Expected a, got b. Cure.", "a"),
        (
            "This run would not be private, for 2 reasons:\nExpected a, got b.\nExpected c, got d.",
            "a; c",
        ),
        ("Expected the ledger of an earlier run at /x/y.jsonl, got no file. Cure.", None),
        ("Expected to stop at ε = 2.0, got a further step.", "to stop at ε = 2.0"),
    ],
)
def test_what_an_error_expected(text, short):
    assert expected(BudgetError(text)) == (short or "the ledger of an earlier run")


def test_the_data_is_what_the_opacus_half_uses():
    x, y = batch()
    assert torch.equal(yardstick.records(8).tensors[0], x)
    assert torch.equal(yardstick.records(8).tensors[1], y)
