"""What the tests of the ledger share."""

import os

import pytest

from defend.privacy.accounting.history import total_steps
from defend.privacy.accounting.ledger import Ledger

STEP = {"noise_multiplier": 1.1, "sample_rate": 0.02, "max_grad_norm": 1.0}
posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and signals")


def filled(path, steps=3, **facts):
    """A ledger with one fit, closed; its anchor."""
    with Ledger.open(path) as ledger:
        ledger.begin("a", insecure=False, delta=1e-5, **facts)
        for _ in range(steps):
            ledger.charge("a", **STEP)
        return ledger.anchor


def count(path):
    with Ledger.open(path) as ledger:
        return sum(total_steps(history) for history in ledger.fits.values())
