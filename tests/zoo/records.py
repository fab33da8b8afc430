"""Numbers for the data sets of the zoo: fixed, and different from record to record."""

import torch
from torch.utils.data import Dataset, TensorDataset


class Records(Dataset):
    """Records that are made beforehand."""

    def __init__(self, records):
        self.records = list(records)

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        return self.records[index]


def numbers(seed=0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def points(records=12, features=6, classes=3, seed=0) -> TensorDataset:
    """(x [features], class)."""
    g = numbers(seed)
    x = torch.randn(records, features, generator=g)
    return TensorDataset(x, torch.randint(classes, (records,), generator=g))


def regression(records=12, features=6, outputs=1, seed=0) -> TensorDataset:
    """(x [features], y [outputs])."""
    g = numbers(seed)
    x = torch.randn(records, features, generator=g)
    return TensorDataset(x, x[:, :outputs].sin() + 0.1 * torch.randn(records, outputs, generator=g))


def images(records=12, channels=3, size=16, classes=3, seed=0) -> TensorDataset:
    """(image [channels, size, size] in [0, 1], class)."""
    g = numbers(seed)
    x = torch.rand(records, channels, size, size, generator=g)
    return TensorDataset(x, torch.randint(classes, (records,), generator=g))


def texts(records=12, words=60, classes=3, shortest=3, longest=9, seed=0) -> Records:
    """{"input_ids": words from 5 up [length], "label": class}, of different lengths."""
    g = numbers(seed)

    def draw(low, high, *shape):
        return torch.randint(low, high, shape, generator=g)

    return Records(
        {"input_ids": draw(5, words, shortest + (3 * i) % (longest - shortest + 1)),
         "label": draw(0, classes).item()}
        for i in range(records)
    )  # fmt: skip


def series(records=12, features=4, classes=3, shortest=3, longest=8, seed=0) -> Records:
    """(x [length, features], class), of different lengths."""
    g = numbers(seed)
    return Records(
        (
            torch.randn(shortest + (3 * i) % (longest - shortest + 1), features, generator=g),
            torch.randint(classes, (), generator=g),
        )
        for i in range(records)
    )
