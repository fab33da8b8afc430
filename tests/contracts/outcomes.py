"""What came of a break, and the tables that breaks are kept in."""

import functools
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Outcome:
    """What came of a break: a verdict, and a short detail."""

    verdict: str
    detail: str


Break = Callable[[], Outcome]


class Table(dict[str, Break]):
    """Breaks by name. Each runs from RNG 0, and an error in it is a verdict.

    Args:
        judge: error → its outcome.
    """

    def __init__(self, judge: Callable[[Exception], Outcome]) -> None:
        super().__init__()
        self._judge = judge

    def add(self, function: Break) -> Break:
        """Decorator: put a break into the table."""

        @functools.wraps(function)
        def run() -> Outcome:
            with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.manual_seed(0)
                try:
                    return function()
                except Exception as error:
                    return self._judge(error)

        self[function.__name__] = run
        return run


def first_words(error: Exception, most: int = 8) -> str:
    """The beginning of an error's text."""
    return " ".join(re.findall(r"[^\s\\]+", str(error))[:most])
