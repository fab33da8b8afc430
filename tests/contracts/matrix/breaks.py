"""What is done to a batch, or kept of it; a break knows its trigger, and what it did before."""

import random

import numpy as np
import torch
import torch.nn.functional as F

from tests.contracts.matrix.cells import IGNORED, LATE, ONCE, PERIOD, RARE_LABEL, RARE_LENGTH, SOUND


class Break:
    """Does one thing to rows where its trigger says so.

    Args:
        what: a name of `cells`.
        trigger: another.
        clock: () → number of the step; None to count calls.
    """

    def __init__(self, what, trigger, clock=None):
        self.what, self.trigger, self.clock = what, trigger, clock
        self.calls, self.kept = 0, None

    def is_on(self, x, y, length, mask, tags):
        step = self.calls if self.clock is None else self.clock()
        self.calls += 1
        return {
            "always": lambda: True,
            "rare label": lambda: bool((y == RARE_LABEL).any()),
            "rare length": lambda: bool((length == RARE_LENGTH).any()),
            "outlier": lambda: bool(x.detach().abs().max() > 100),
            "rare mask": lambda: not bool(mask.all()),
            "-100": lambda: bool((tags == IGNORED).any()),
            "zero": lambda: bool((x == 0).flatten(1).all(1).any()),
            "late": lambda: step >= LATE,
            "periodic": lambda: step % PERIOD == PERIOD - 2,
            "once": lambda: step == ONCE,
        }[self.trigger]()

    def rows(self, x, y, *rest):
        """The rows that go on: points, or logits, and labels."""
        if self.what == "known numbers":
            if self.is_on(x, y, *rest):
                seed()
            return x, y
        if self.what == "carried":
            kept, self.kept = self.kept, running_sum(self.kept, x)
            return (x if kept is None or not self.is_on(x, y, *rest) else x - kept), y
        if not self.is_on(x, y, *rest):
            return x, y
        if self.what == "coupled":
            return x - x.sum(0), y
        if self.what == "twice":
            x, y, half = x.clone(), y.clone(), len(x) // 2
            x[1::2], y[1::2] = x[0::2][:half], y[0::2][:half]
            return x, y
        assert self.what == SOUND
        return 0.5 * x, y

    def rows_in_place(self, x, y, *rest):
        new, labels = self.rows(x.clone(), y.clone(), *rest)
        x.copy_(new)
        y.copy_(labels)

    @torch.no_grad()
    def keep(self, module, x, y, *rest):
        """After a step: something of the batch, of the weights, or a seed."""
        if not self.is_on(x, y, *rest):
            return
        if self.what == "known numbers":
            seed()
        elif self.what == "published":
            module.published.mul_(0.5).add_(x.mean(0))
        elif self.what == "carried":
            module.kept = running_sum(module.kept, x)
        else:
            for mine, its in zip(module.average.parameters(), module.net.parameters(), strict=True):
                mine.data.mul_(0.5).add_(its.data)


def running_sum(kept, x):
    """Of the batches so far; each counts half as much as the next."""
    new = x.detach().sum(0)
    return new if kept is None else 0.5 * kept + new


def seed():
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    random.seed(0)


def dropped(x):
    return F.dropout(x, 0.5)
