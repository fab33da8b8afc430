"""Is a gradient the one that was released, or a multiple of it?"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from defend.privacy.gradients.sums import as_real

_SUMS = 2**12  # of each parameter
_BLOCK = 64  # numbers that are added in float32 before float64 goes on: twelve times as fast


class ReleaseMark:
    """Remembers sums over the gradients that were released, in which every number takes part.

    What is done to them afterwards is free as long as it knows nothing but them. A multiple of the
    whole, with the gradients of some parameters left out, is taken for that (clipping once more,
    freezing); nobody can tell it of anything else. Sums of a multiple are the multiple of the sums,
    but for rounding; what was added shows in them, unless it adds up to nothing in each.

    Args:
        parameters: with the released gradient in every `p.grad`.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = parameters
        self._sums = self._now()

    def is_kept(self) -> bool:
        """Whether the gradients are c ≥ 0 times the released ones by now, some perhaps zero."""
        pairs = list(zip(self._now(), self._sums, strict=True))
        if all(torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) for a, b in pairs):
            return True
        alive = [(a, b, p) for (a, b), p in zip(pairs, self._parameters, strict=True) if a.any()]
        product = sum(float(a @ b) for a, b, _ in alive)
        factor = product / max(sum(float(b @ b) for _, b, _ in alive), 1e-300)
        return factor >= 0 and all(_close(a, factor * b, p.dtype) for a, b, p in alive)

    @torch.no_grad()
    def _now(self) -> list[Tensor]:
        return [_sums(torch.zeros_like(p) if p.grad is None else p.grad) for p in self._parameters]


def _sums(gradient: Tensor) -> Tensor:
    """Sums over every 4096th number; of a small one its numbers."""
    flat = as_real(gradient.detach()).flatten()
    if len(flat) <= _SUMS:
        return flat.double()
    rows = flat[: len(flat) // _SUMS * _SUMS].view(-1, _SUMS)
    rest, blocks = flat[rows.numel() :], rows[: len(rows) // _BLOCK * _BLOCK]
    wide = torch.promote_types(flat.dtype, torch.float32)
    sums = blocks.unflatten(0, (-1, _BLOCK)).sum(1, dtype=wide).sum(0, dtype=torch.float64)
    sums += rows[len(blocks) :].sum(0, dtype=torch.float64)
    sums[: len(rest)] += rest
    return sums


def _close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Equal but for rounding: of each number, and of sums (about 2 eps of their size, 5 times)."""
    least = 1e-9 if dtype is torch.float64 else 64 * torch.finfo(torch.float32).eps
    slack = max(8 * torch.finfo(dtype).eps, least)
    size = float(expected.square().mean().sqrt())
    return bool(((found - expected).abs() <= slack * (expected.abs() + size)).all())
