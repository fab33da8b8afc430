"""Errors that defend raises on purpose.

Every message says what was expected, what came, and what to do about it.
"""


class DefendError(Exception):
    """Base of all errors raised by defend."""


class InputError(DefendError, ValueError):
    """An argument, a batch or a tensor is not of the expected form."""


class PrivacyError(DefendError, RuntimeError):
    """Going on would break the privacy guarantee in silence, so training stops instead."""


class BudgetError(PrivacyError):
    """The next private step would spend more than the target ε."""
