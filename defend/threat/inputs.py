"""The legal box of inputs, and the mean/std under which the model sees them."""

import dataclasses

import torch
from torch import Tensor

from defend.errors import InputError

# Normalizing in float32 (or reading half precision) moves a legal value by rounding only. What
# is further outside the box than this share of its width is data in other units.
_ROUNDING = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@dataclasses.dataclass(frozen=True)
class InputSpace:
    """Raw inputs live in the box [low, high]; the model is fed (raw − mean) / std.

    `eps` and `step_size` of an attack are always in raw units. Where batches arrive normalized,
    give the `mean` and `std` that normalized them: one unit of raw change is then 1/std units of
    model change, channel by channel.

    Args:
        low: smallest legal raw value.
        high: largest legal raw value.
        mean: one number a channel (dimension 1), or None where batches are not normalized.
        std: likewise, each > 0; `mean` and `std` are given together.

    Raises:
        InputError: if low ≥ high, if only one of `mean` and `std` is given, if their lengths
            differ or if a std is not positive.
    """

    low: float = 0.0
    high: float = 1.0
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise InputError(f"Expected `low` < `high`, got low={self.low}, high={self.high}.")
        if (self.mean is None) != (self.std is None):
            raise InputError(
                "Expected `mean` and `std` together or not at all, got only "
                f"{'mean' if self.std is None else 'std'}."
            )
        if self.mean is None or self.std is None:
            return
        # Lists (from YAML, say) are welcome; tuples keep the object hashable.
        object.__setattr__(self, "mean", tuple(float(m) for m in self.mean))
        object.__setattr__(self, "std", tuple(float(s) for s in self.std))
        if len(self.mean) != len(self.std):
            raise InputError(
                "Expected `mean` and `std` of the same length, got "
                f"{len(self.mean)} and {len(self.std)}."
            )
        if min(self.std) <= 0:
            raise InputError(f"Expected every `std` to be > 0, got {self.std}.")

    def moments(self, like: Tensor) -> tuple[Tensor, Tensor] | None:
        """(mean, std) shaped `[1, C, 1, ...]` to broadcast over `like`; None if not normalized."""
        if self.mean is None or self.std is None:
            return None
        if len(self.mean) not in (1, like.shape[1]):
            raise InputError(
                f"Expected one mean and std for each of the {like.shape[1]} channels of the "
                f"input of shape {tuple(like.shape)}, got {len(self.mean)}."
            )
        shape = (1, -1) + (1,) * (like.ndim - 2)
        mean, std = (like.new_tensor(v).view(shape) for v in (self.mean, self.std))
        return mean, std

    def to_raw(self, x: Tensor) -> Tensor:
        """Model units → raw units: x · std + mean."""
        moments = self.moments(x)
        return x if moments is None else x * moments[1] + moments[0]

    def to_model(self, raw: Tensor) -> Tensor:
        """Raw units → model units: (raw − mean) / std."""
        moments = self.moments(raw)
        return raw if moments is None else (raw - moments[0]) / moments[1]

    def check(self, raw: Tensor, dtype: torch.dtype) -> None:
        """Refuse data outside the box.

        Args:
            raw: inputs in raw units.
            dtype: the dtype that the batch came in; sets how much rounding is forgiven.

        Raises:
            InputError: if a value is outside [low, high] by more than rounding, or not finite.
        """
        if raw.numel() == 0:
            return
        smallest, largest = (v.item() for v in torch.aminmax(raw))
        slack = _ROUNDING[dtype] * (self.high - self.low)
        if self.low - slack <= smallest and largest <= self.high + slack:
            return
        raise InputError(
            f"Expected inputs inside the box [{self.low}, {self.high}], got values from "
            f"{smallest:.4g} to {largest:.4g}. If the batches are normalized, pass "
            "inputs=InputSpace(mean=..., std=...); if raw values have another range, pass "
            "inputs=InputSpace(low=..., high=...)."
        )
