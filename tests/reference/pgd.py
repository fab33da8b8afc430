"""PGD record by record, value by value where it can be: slow, obvious, and in raw units."""

import torch
import torch.nn.functional as F

from tests.reference.projections import l1_box_by_bisection


def reference_pgd(model, x, y, *, steps, start, **settings):
    """The last iterate of every record; see `reference_iterates`."""
    return reference_iterates(model, x, y, steps=steps, start=start, **settings)[-1]


def reference_iterates(
    model, x, y, *, norm, eps, steps, step_size, start, mean=0.0, std=1.0,
    loss=F.cross_entropy, targeted=False, free=None, density=None,
):  # fmt: skip
    """Every iterate, start and end included: `[steps + 1, N, ...]`, in model units.

    x is in model units; `start`, eps and step_size in raw units, box [0, 1]. `eps` and `step_size`
    are numbers, or one for each record. `loss` takes the logits and target of a single record.
    """
    rows = []
    for i in range(len(x)):
        clean = (x[i : i + 1] * std + mean).double()
        delta = start[i : i + 1].double().clone()
        mine = torch.ones_like(clean, dtype=torch.bool) if free is None else free[i : i + 1]
        radius = eps if isinstance(eps, float) else eps[i].item()
        length = step_size if isinstance(step_size, float) else step_size[i].item()
        rows.append([((clean + delta - mean) / std).to(x.dtype)])
        for _ in range(steps):
            raw = (clean + delta).requires_grad_()
            value = loss(model(((raw - mean) / std).to(x.dtype)), y[i : i + 1]).sum()
            grad = torch.autograd.grad(-value if targeted else value, raw)[0] * mine
            low, high = (-clean).clamp(min=-radius) * mine, (1 - clean).clamp(max=radius) * mine
            delta = delta + length * steepest(norm, grad, delta, low, high, density)
            delta = nearest(norm, delta, low, high, radius)
            rows[-1].append(((clean + delta - mean) / std).to(x.dtype))
    return torch.stack([torch.cat(column) for column in zip(*rows, strict=True)]).detach()


def steepest(norm, grad, delta, low, high, density):
    if norm == "linf":
        return grad.sign()
    if norm == "l2":
        return grad / grad.norm() if grad.norm() > 0 else grad
    return sparse_step(*(t.flatten() for t in (grad, delta, low, high)), density).view_as(grad)


def sparse_step(grad, delta, low, high, density):
    """±1/k on the k largest gradients among the values that the box lets move that way."""
    able = [
        j
        for j in range(len(grad))
        if (grad[j] > 0 and delta[j] < high[j]) or (grad[j] < 0 and delta[j] > low[j])
    ]
    able.sort(key=lambda j: -abs(float(grad[j])))
    chosen = able[: max(1, round(density * len(grad)))]
    step = torch.zeros_like(grad)
    for j in chosen:
        step[j] = grad[j].sign() / len(chosen)
    return step


def nearest(norm, delta, low, high, eps):
    """Into the ball, then into the box; for L1 into both at once."""
    if norm == "l1":
        row = [t.flatten().tolist() for t in (delta, low, high)]
        moved = l1_box_by_bisection(*row, eps)
        return torch.tensor(moved, dtype=delta.dtype).view_as(delta)
    if norm == "l2" and delta.norm() > eps:
        delta = delta * (eps / delta.norm())
    return torch.minimum(torch.maximum(delta, low), high)


def reference_best(model, iterates, y, *, loss, targeted=False):
    """The best iterate of each record: one that fools before one that does not, then by loss."""
    best = []
    for i in range(iterates.shape[1]):

        def key(candidate, i=i):
            logits = model(candidate)
            gain = float(loss(logits, y[i : i + 1]).detach())
            return fools(logits, y[i], targeted), -gain if targeted else gain

        best.append(max((iterate[i : i + 1] for iterate in iterates), key=key))
    return torch.cat(best)


def reference_stopped(model, iterates, y, *, targeted=False):
    """The first iterate of each record that fools the model, or else its last."""
    stopped = []
    for i in range(iterates.shape[1]):
        path = [iterate[i : i + 1] for iterate in iterates]
        stopped.append(next((c for c in path if fools(model(c), y[i], targeted)), path[-1]))
    return torch.cat(stopped)


def fools(logits, label, targeted):
    label = label if label.ndim == 0 else label.argmax()
    return bool((logits.argmax() == label) == targeted)
