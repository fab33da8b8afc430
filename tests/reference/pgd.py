"""PGD record by record, value by value where it can be: slow, obvious, and in raw units."""

import torch
import torch.nn.functional as F


def reference_pgd(model, x, y, *, norm, eps, steps, step_size, start, mean=0.0, std=1.0):
    """x and the result are in model units; `start`, eps and step_size in raw units, box [0, 1]."""
    rows = []
    for i in range(len(x)):
        clean = (x[i : i + 1] * std + mean).double()
        delta = start[i : i + 1].double().clone()
        for _ in range(steps):
            raw = (clean + delta).requires_grad_()
            loss = F.cross_entropy(model(((raw - mean) / std).to(x.dtype)), y[i : i + 1])
            grad = torch.autograd.grad(loss, raw)[0]
            if norm == "linf":
                delta = delta + step_size * grad.sign()
                delta = torch.minimum(torch.maximum(delta, clean * 0 - eps), clean * 0 + eps)
            else:
                delta = delta + step_size * grad / grad.norm()
                if delta.norm() > eps:
                    delta = delta * (eps / delta.norm())
            delta = (clean + delta).clamp(0, 1) - clean
        rows.append(((clean + delta - mean) / std).to(x.dtype))
    return torch.cat(rows).detach()
