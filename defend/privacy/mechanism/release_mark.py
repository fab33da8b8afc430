"""Is a gradient the one that was released, or a multiple of it?"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

_SAMPLED = 2**12  # numbers of each parameter
_ROUNDING = 1e-3


class ReleaseMark:
    """Remembers norms and a part of the gradients that were released.

    What is done to them afterwards is free as long as it knows nothing but them. A multiple of the
    whole, with the gradients of some parameters left out, is taken for that (clipping once more,
    freezing); nobody can tell it of anything else.

    Args:
        parameters: with the released gradient in every `p.grad`.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = parameters
        self._norms, self._parts = self._now()

    def is_kept(self) -> bool:
        """Whether the gradients are c ≥ 0 times the released ones by now, some perhaps zero."""
        norms, parts = self._now()
        if torch.equal(norms, self._norms) and torch.equal(parts, self._parts):
            return True
        alive = norms > 0
        factors = alive * norms.norm() / self._norms[alive].norm().clamp_min(1e-30)
        sizes = torch.tensor([len(range(0, p.numel(), _stride(p))) for p in self._parameters])
        each = factors.repeat_interleave(sizes.to(factors.device))
        pairs = [(norms, factors * self._norms), (parts, each * self._parts)]
        return all(
            torch.allclose(a, b, rtol=_ROUNDING, atol=1e-6 * float(norms.max()), equal_nan=True)
            for a, b in pairs
        )

    @torch.no_grad()
    def _now(self) -> tuple[Tensor, Tensor]:
        """The norm of each gradient, and some of its numbers; on one device."""
        device = self._parameters[0].device
        norms, parts = [], []
        for p in self._parameters:
            gradient = (torch.zeros_like(p) if p.grad is None else p.grad).detach().flatten()
            norms.append(gradient.norm().double().to(device))
            parts.append(gradient[:: _stride(p)].double().to(device))
        return torch.stack(norms), torch.cat(parts)


def _stride(parameter: Tensor) -> int:
    return max(-(-parameter.numel() // _SAMPLED), 1)
