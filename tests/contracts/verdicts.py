"""Each break is run once a session, however many tests and tables ask for its verdict."""

import functools

from tests.contracts import defend_does, opacus_alone
from tests.contracts.outcomes import Outcome


@functools.cache
def opacus(key: str) -> Outcome:
    """What Opacus does alone."""
    return opacus_alone.BREAKS[key]()


@functools.cache
def defend(key: str) -> Outcome:
    """What defend does."""
    return defend_does.BREAKS[key]()
