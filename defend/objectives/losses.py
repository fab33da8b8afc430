"""Losses of each record, from logits: what an attack increases and what a training decreases."""

import torch
import torch.nn.functional as F
from torch import Tensor

from defend.errors import InputError


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """−log softmax(z)_y of each record.

    Args:
        logits: z, `[N, classes]`.
        y: class indices `[N]`, or class probabilities `[N, classes]`.

    Returns:
        `[N]`.
    """
    return F.cross_entropy(logits, y, reduction="none")


def margin(logits: Tensor, y: Tensor) -> Tensor:
    r"""Difference of logits ratio (Croce & Hein 2020, arXiv 2003.01690), of each record.

        − (z_y − max_{i≠y} z_i) / (z_π1 − z_π3),    z_π1 ≥ z_π2 ≥ … being the sorted logits

    Positive where another class wins. Unlike cross-entropy it does not vanish for a model that is
    sure of itself, nor change when the logits are scaled. With fewer than four classes the
    denominator says nothing (or does not exist), and the margin is not divided.

    Args:
        logits: z, `[N, classes]`, classes ≥ 2.
        y: class indices `[N]`, or class probabilities, whose largest counts.

    Returns:
        `[N]`.
    """
    lead = _lead(logits, y)
    if logits.shape[1] < 4:
        return lead
    top = logits.topk(3, dim=1).values
    return lead / (top[:, 0] - top[:, 2]).clamp_min(1e-12)


def targeted_margin(logits: Tensor, y: Tensor) -> Tensor:
    r"""The difference of logits ratio for a target (Croce & Hein 2020), to be decreased.

        (max_{i≠t} z_i − z_t) / (z_π1 − (z_π3 + z_π4) / 2)

    Negative where the target wins. Divided as `margin` is, it would be the constant 1 wherever the
    target is third. Not divided with fewer than four classes.

    Args:
        logits: z, `[N, classes]`, classes ≥ 2.
        y: targets t, class indices `[N]`, or class probabilities, whose largest counts.

    Returns:
        `[N]`.
    """
    lead = _lead(logits, y)
    if logits.shape[1] < 4:
        return lead
    top = logits.topk(4, dim=1).values
    return lead / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2).clamp_min(1e-12)


def kl(clean_logits: Tensor, logits: Tensor) -> Tensor:
    """KL(softmax(clean) ‖ softmax(logits)) of each record, in nats; ≥ 0.

    Args:
        clean_logits: `[N, classes]`.
        logits: `[N, classes]`.

    Returns:
        `[N]`.
    """
    log_p, log_q = clean_logits.log_softmax(1), logits.log_softmax(1)
    p = log_p.exp()
    # A class that the clean input rules out (a logit of −inf, say) adds 0, not 0 · (∞ − ∞).
    return (p * (log_p - log_q).masked_fill(p == 0, 0.0)).sum(1)


def _lead(logits: Tensor, y: Tensor) -> Tensor:
    """max_{i≠y} z_i − z_y of each record."""
    if y.shape not in (logits.shape[:1], logits.shape):
        raise InputError(
            f"Expected class indices of shape ({len(logits)},) or class probabilities of shape "
            f"{tuple(logits.shape)}, got targets of shape {tuple(y.shape)}."
        )
    label = labels_of(y).unsqueeze(1)
    own = logits.gather(1, label).squeeze(1)
    return logits.scatter(1, label, float("-inf")).amax(1) - own


def labels_of(y: Tensor) -> Tensor:
    """Class indices `[N]`, from indices or from class probabilities `[N, classes]`."""
    return y if y.ndim == 1 else y.argmax(1)


def in_full_precision(logits: Tensor) -> Tensor:
    """Logits in at least float32: losses of half-precision logits round away small gradients."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
