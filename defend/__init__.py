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

from importlib import import_module
from typing import TYPE_CHECKING, Any

from defend.attacks import PGD, Free, TorchAttack, fgsm_rs, n_fgsm
from defend.errors import BudgetError, DefendError, InputError, PrivacyError
from defend.evaluation import OverfittingAlarm, RobustnessReport, evaluate
from defend.objectives import AWP, MART, TRADES, Madry
from defend.threat import L1, L2, InputSpace, Linf

if TYPE_CHECKING:
    from defend.callbacks import AdversarialTraining, DifferentialPrivacy, RobustnessEvaluation
    from defend.privacy import (
        AdaptiveClipping,
        Decay,
        FlatClipping,
        PerLayerClipping,
        StepUnderTest,
        selftest,
    )
    from defend.training import Adversarial, Privacy, make_adversarial, make_private

__all__ = [
    "AWP",
    "L1",
    "L2",
    "MART",
    "PGD",
    "TRADES",
    "AdaptiveClipping",
    "Adversarial",
    "AdversarialTraining",
    "BudgetError",
    "Decay",
    "DefendError",
    "DifferentialPrivacy",
    "FlatClipping",
    "Free",
    "InputError",
    "InputSpace",
    "Linf",
    "Madry",
    "OverfittingAlarm",
    "PerLayerClipping",
    "Privacy",
    "PrivacyError",
    "RobustnessEvaluation",
    "RobustnessReport",
    "StepUnderTest",
    "TorchAttack",
    "evaluate",
    "fgsm_rs",
    "make_adversarial",
    "make_private",
    "n_fgsm",
    "selftest",
]

__version__ = "0.1.0"

# Brought in on first use: Lightning is slow to import and pulls in what is installed.
_LATER = {
    "AdversarialTraining": "defend.callbacks",
    "DifferentialPrivacy": "defend.callbacks",
    "RobustnessEvaluation": "defend.callbacks",
    "AdaptiveClipping": "defend.privacy",
    "Decay": "defend.privacy",
    "FlatClipping": "defend.privacy",
    "PerLayerClipping": "defend.privacy",
    "StepUnderTest": "defend.privacy",
    "selftest": "defend.privacy",
    "Adversarial": "defend.training",
    "Privacy": "defend.training",
    "make_adversarial": "defend.training",
    "make_private": "defend.training",
}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(import_module(_LATER[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
