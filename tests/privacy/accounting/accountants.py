"""Accountants of others, to compare ours with."""

import numpy as np


def second_opinion(history, delta, interval=1e-4):
    """ε by Google's dp-accounting (privacy loss distributions), independent of Opacus."""
    import dp_accounting
    from dp_accounting.pld import PLDAccountant

    relation = dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
    accountant = PLDAccountant(relation, value_discretization_interval=interval)
    for sigma, rate, steps in history:
        event = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(sigma))
        accountant.compose(event, steps)
    return accountant.get_epsilon(delta)


def opacus_epsilon(history, delta, mechanism):
    """ε by the accountant "rdp" or "prv" of Opacus."""
    from opacus.accountants import create_accountant

    accountant = create_accountant(mechanism)
    accountant.history = list(history)
    with np.errstate(divide="ignore"):  # log(1 − q) at q = 1
        return accountant.get_epsilon(delta=delta)
