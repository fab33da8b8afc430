import torch

from defend.evaluation.counts import AttackCounts, Counts

SOME = Counts(6, 5, 3, {"a": AttackCounts(4, 1, 12), "b": AttackCounts(3)})


def test_counts_add_up_by_name():
    more = Counts(2, 1, torch.tensor(1), {"b": AttackCounts(1), "a": AttackCounts(2, 0, 4)})
    assert SOME + more == Counts(8, 6, 4, {"a": AttackCounts(6, 1, 16), "b": AttackCounts(4)})
    assert Counts.none(["a", "b"]) + SOME == SOME


def test_sums_of_tensors_are_sums_of_counts():
    one = SOME.to_tensor(torch.device("cpu"))
    assert SOME.from_tensor(one) == SOME
    assert SOME.from_tensor(one + one) == SOME + SOME
