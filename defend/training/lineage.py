"""One model, one data set, one account: a model that was trained privately goes on with its ε."""

import weakref
from collections.abc import Callable, MutableMapping

from torch import nn

from defend.errors import PrivacyError
from defend.privacy.accounting.budget import Budget

# Models that were trained privately in this process: their fits, the digest of their data, and ε.
_TRAINED: MutableMapping[nn.Module, tuple[set[str], str, Callable[[], float]]] = (
    weakref.WeakKeyDictionary()
)


def claim(module: nn.Module, digest: str, budget: Budget) -> None:
    """Note that `module` is trained on data of this digest under this account.

    Raises:
        PrivacyError: if another account, whose fits this one does not hold, trained the same model
            on the same data before. Only an exact digest ("sha256:") can tell.
    """
    earlier = _TRAINED.get(module)
    if earlier is not None and digest.startswith("sha256:"):
        fits, data, epsilon = earlier
        if data == digest and not fits <= budget.fit_names:
            raise PrivacyError(
                f"Expected the account of this model to go on (ε = {epsilon():.4g} on the same "
                "data so far), got a new one that starts at 0. Go on with the same callback, "
                "pass that run's state, or give both the same `ledger`."
            )
    _TRAINED[module] = (budget.fit_names, digest, lambda: budget.epsilon)
