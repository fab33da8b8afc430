"""Which records the self-test takes."""

import torch
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from defend.privacy.checks.dry_run_records import labels_of, positions_to_try


def labelled(labels):
    return TensorDataset(torch.rand(len(labels), 2), torch.tensor(labels))


class Listed(Dataset):
    def __init__(self, n, targets):
        self.n, self.targets = n, targets

    def __len__(self):
        return self.n


def test_without_labels_positions_are_spread():
    plain = TensorDataset(torch.rand(61, 2))
    assert positions_to_try(plain, 7) == [0, 10, 20, 30, 40, 50, 60]
    assert len(set(positions_to_try(plain, 7, turn=1)) - {0, 10, 20, 30, 40, 50, 60}) >= 5
    assert positions_to_try(TensorDataset(torch.rand(2, 2)), 7) == [0, 1]


def test_a_class_of_one_record_is_always_there():
    data = labelled([0] * 50 + [1] + [2] * 49)
    for turn in range(5):
        chosen = positions_to_try(data, 7, turn)
        assert 50 in chosen
        assert len(set(chosen)) == 7
        assert set(data.tensors[1][chosen].tolist()) == {0, 1, 2}


def test_of_many_classes_the_rarest_and_the_most_common():
    labels = [c for c in range(20) for _ in range(c + 1)]
    found = torch.tensor(labels)[positions_to_try(labelled(labels), 7)].tolist()
    assert set(found) == {0, 1, 2, 16, 17, 18, 19}


def test_other_records_at_the_next_turn():
    data = labelled([0, 1] * 50)
    assert set(positions_to_try(data, 7, 0)) != set(positions_to_try(data, 7, 1))


def test_labels_are_found_where_data_sets_keep_them():
    first, second = labelled([3, 1, 2]), Listed(2, [5, 6])
    assert labels_of(ConcatDataset([first, second])).tolist() == [3, 1, 2, 5, 6]
    assert labels_of(Subset(first, [2, 0])).tolist() == [2, 3]
    assert labels_of(Listed(2, ["cat", "dog"])) is None
    assert labels_of(Listed(3, [1, 2])) is None
    assert labels_of(TensorDataset(torch.rand(3, 2))) is None
    assert labels_of(ConcatDataset([first, TensorDataset(torch.rand(1, 2))])) is None
