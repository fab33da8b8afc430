"""Errors that defend raises on purpose.

Every message says what was expected, what came, and what to do about it.
"""


class DefendError(Exception):
    """Base of all errors raised by defend."""


class InputError(DefendError, ValueError):
    """An argument, a batch or a tensor is not of the expected form."""


class PrivacyError(DefendError, RuntimeError):
    """Going on would break the privacy guarantee in silence, so training stops instead."""


class IndistinctRowsError(PrivacyError):
    """The rows of a batch cannot be told apart in the gradients of a layer.

    Nothing is wrong with the model: one record at a time it trains (`engine="record"`).
    """

    def __str__(self) -> str:
        return (
            f"{super().__str__()} Or take engine='record', which trains any layer as it is, one "
            "record at a time and so more slowly."
        )


class BudgetError(PrivacyError):
    """The next private step would spend more than the target ε."""
