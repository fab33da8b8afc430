"""What adversarial training cannot be combined with."""

from defend.attacks.free import Free
from defend.errors import InputError, PrivacyError
from defend.evaluation.overfitting import OverfittingAlarm
from defend.training.adversarial import AdversarialSettings


def refuse_beside_manual_optimization(settings: AdversarialSettings) -> None:
    """A module that steps by itself lets nobody between its loss and its backward.

    Raises:
        InputError: if more than the inputs would have to change.
    """
    if _joins_the_step(settings):
        raise InputError(
            f"Expected automatic optimization with {_method(settings)}, got a module that steps by "
            "itself: what it does with its loss is not known. Use Madry() with PGD."
        )


def refuse_beside_privacy(
    settings: AdversarialSettings, alarm: OverfittingAlarm | str | None
) -> None:
    """What one record moves must stay within its one clip.

    Raises:
        PrivacyError: for what would let it move more, or show a record without noise.
    """
    settings.refuse_beside_privacy()
    if isinstance(alarm, OverfittingAlarm):
        raise PrivacyError(
            "Expected no alarm beside DifferentialPrivacy, got one: it looks at training records "
            "without noise. Look at validation records, with RobustnessEvaluation."
        )


def _joins_the_step(settings: AdversarialSettings) -> bool:
    """Whether it takes part in the training step, beyond the batch that the step sees."""
    return settings.changes_loss or isinstance(settings.attack, Free)


def _method(settings: AdversarialSettings) -> str:
    return "Free" if isinstance(settings.attack, Free) else settings.objective.name
