"""Adversarial training and DP-SGD for an unmodified Lightning module.

Add callbacks to a Trainer and change no line of the module:

    trainer = L.Trainer(
        callbacks=[
            defend.AdversarialTraining(defend.PGD(defend.Linf(8 / 255), steps=10)),
            defend.DifferentialPrivacy(target_epsilon=3.0, delta=1e-5, max_grad_norm=1.0),
            defend.RobustnessEvaluation({"pgd20": defend.PGD(defend.Linf(8 / 255), steps=20)}),
        ],
    )
"""

from typing import TYPE_CHECKING, Any

from defend.attacks import PGD
from defend.errors import BudgetError, DefendError, InputError, PrivacyError
from defend.evaluation import RobustnessReport, evaluate
from defend.threat import L2, InputSpace, Linf

if TYPE_CHECKING:
    from defend.callbacks import AdversarialTraining, DifferentialPrivacy, RobustnessEvaluation

__all__ = [
    "L2",
    "PGD",
    "AdversarialTraining",
    "BudgetError",
    "DefendError",
    "DifferentialPrivacy",
    "InputError",
    "InputSpace",
    "Linf",
    "PrivacyError",
    "RobustnessEvaluation",
    "RobustnessReport",
    "evaluate",
]

__version__ = "0.1.0"

_CALLBACKS = ("AdversarialTraining", "DifferentialPrivacy", "RobustnessEvaluation")


def __getattr__(name: str) -> Any:
    """The callbacks, on first use: Lightning is slow to import and pulls in what is installed."""
    if name in _CALLBACKS:
        from defend import callbacks

        return getattr(callbacks, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
