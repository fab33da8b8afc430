"""One DP-SGD step without noise: a loop over records, one backward each. Slow and obvious."""

import torch


def clipped_sum(module, loss, records, max_grad_norm):
    """Σ_i clip(g_i), as a list of tensors in the order of the trainable parameters.

    Args:
        module: the model, in the mode it trains in.
        loss: callable (x, y) -> scalar loss of a batch of one.
        records: pairs (x [1, ...], y [1]).
        max_grad_norm: C.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    total = [torch.zeros_like(p) for p in parameters]
    for x, y in records:
        gradient = torch.autograd.grad(loss(x, y), parameters, allow_unused=True)
        gradient = [
            torch.zeros_like(p) if g is None else g
            for g, p in zip(gradient, parameters, strict=True)
        ]
        norm = sum(float((g.abs() ** 2).sum()) for g in gradient) ** 0.5
        scale = max_grad_norm / norm if norm > max_grad_norm else 1.0
        total = [t + scale * g for t, g in zip(total, gradient, strict=True)]
    return total
