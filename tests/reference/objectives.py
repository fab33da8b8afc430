"""Objectives written from their papers, one record and one class at a time, and AWP by a proxy."""

import copy

import torch


def softmax(z):
    """Class probabilities of one record, as a list of numbers."""
    exponentials = [torch.exp(value) for value in z]
    return [e / sum(exponentials) for e in exponentials]


def cross_entropy(z, y):
    return -torch.log(softmax(z)[y])


def soft_cross_entropy(z, target):
    return -sum(t * torch.log(p) for t, p in zip(target, softmax(z), strict=True))


def divergence(clean, adv):
    """KL(p ‖ q) = Σ_k p_k log(p_k / q_k)."""
    pairs = zip(softmax(clean), softmax(adv), strict=True)
    return sum(p * torch.log(p / q) for p, q in pairs)


def madry(clean, adv, y):
    return cross_entropy(adv, y)


def trades(clean, adv, y, beta=6.0):
    return cross_entropy(clean, y) + beta * divergence(clean, adv)


def mart(clean, adv, y, beta=5.0):
    q = softmax(adv)
    wrong = max((k for k in range(len(q)) if k != y), key=lambda k: float(q[k]))
    bce = -torch.log(q[y]) - torch.log(1.0001 - q[wrong])
    return bce + beta * divergence(clean, adv) * (1 - softmax(clean)[y])


def batch(objective, clean, adv, y, **settings):
    """`objective` of each record, `[N]`."""
    rows = [objective(c, a, int(t), **settings) for c, a, t in zip(clean, adv, y, strict=True)]
    return torch.stack(rows)


def batch_soft(logits, targets):
    """Cross-entropy of each record with class probabilities, `[N]`."""
    rows = [soft_cross_entropy(z, t) for z, t in zip(logits, targets, strict=True)]
    return torch.stack(rows)


def dlr(z, y):
    """The difference of logits ratio of one record, from a list of numbers."""
    other = max(value for k, value in enumerate(z) if k != y)
    if len(z) < 4:
        return other - z[y]
    ordered = sorted(z, reverse=True)
    return -(z[y] - other) / (ordered[0] - ordered[2])


def proxy_perturbation(module, mean_loss, gamma, learning_rate=0.01):
    """v of AWP: a copy of the module takes one SGD step up; the way it went is scaled by layer.

    Args:
        module: left as it is.
        mean_loss: callable (module) -> scalar.
        gamma: γ.
        learning_rate: of the copy; it drops out.
    """
    proxy = copy.deepcopy(module)
    optimizer = torch.optim.SGD(proxy.parameters(), lr=learning_rate)
    optimizer.zero_grad()
    (-mean_loss(proxy)).backward()
    optimizer.step()
    perturbation = {}
    after = dict(proxy.named_parameters())
    for name, before in module.named_parameters():
        if before.requires_grad and before.ndim > 1:
            way = (after[name] - before).detach()
            perturbation[name] = gamma * before.detach().norm() * way / way.norm()
    return perturbation
