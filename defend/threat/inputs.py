"""The legal box of inputs, and the mean/std under which the model sees them."""

import dataclasses
import math
from collections.abc import Iterable

import torch
from torch import Tensor

from defend.errors import InputError
from defend.threat.balls import Ball
from defend.threat.region import Region

# Normalizing in float32 (or reading half precision) moves a legal value by rounding only. What
# is further outside the box than this share of the box's numbers is data in other units.
_ROUNDING = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def check_rows(x: Tensor) -> None:
    """Refuse inputs that are not floating point, or not one record a row."""
    if not x.is_floating_point():
        raise InputError(
            f"Expected floating point inputs, got {x.dtype}. Scale them into the box first, "
            "for example x.float() / 255."
        )
    if x.ndim < 2:
        raise InputError(
            f"Expected inputs of shape [N, ...] with one record a row, got {tuple(x.shape)}."
        )


@dataclasses.dataclass(frozen=True)
class InputSpace:
    """Raw inputs live in the box [low, high]; the model is fed (raw − mean) / std.

    `eps` and `step_size` of an attack are always in raw units. Where batches arrive normalized,
    give the `mean` and `std` that normalized them: one unit of raw change is then 1/std units of
    model change, channel by channel. A channel is an index of dimension 1: a colour of an image, a
    column of a table.

    Args:
        low: smallest legal raw value, one for all or one number a channel; −inf for no limit.
        high: largest legal raw value, likewise; inf for no limit.
        mean: one number a channel, or None where batches are not normalized.
        std: likewise, each > 0; `mean` and `std` are given together.
        immutable: channels that no attack may change, counted from 0: the column of an age or of
            an encoded category. Their values are not held against the box and may even be NaN.

    Raises:
        InputError: if low ≥ high, if only one of `mean` and `std` is given, if their lengths (or
            those of two other settings) differ or are 0, if a std is not positive, if an immutable
            channel is negative.
    """

    low: float | tuple[float, ...] = 0.0
    high: float | tuple[float, ...] = 1.0
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    immutable: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("low", "high", "mean", "std"):
            value = getattr(self, name)
            if name in ("mean", "std") and isinstance(value, int | float):
                value = (value,)
            if isinstance(value, Iterable):
                # Lists (from YAML, say) are welcome; tuples keep the object hashable.
                object.__setattr__(self, name, tuple(float(v) for v in value))
        held = self.immutable
        if not isinstance(held, Iterable) or any(type(i) is not int for i in held):
            raise InputError(
                f"Expected `immutable` to be indices of channels such as (0, 3), got {held!r}."
            )
        object.__setattr__(self, "immutable", tuple(held))
        if (self.mean is None) != (self.std is None):
            raise InputError(
                "Expected `mean` and `std` together or not at all, got only "
                f"{'mean' if self.std is None else 'std'}."
            )
        self._check_lengths()
        if not all(low < high for low, high in _boxes(self.low, self.high)):
            raise InputError(f"Expected `low` < `high`, got low={self.low}, high={self.high}.")
        if self.std is not None and not all(0 < s < math.inf for s in self.std):
            raise InputError(f"Expected every `std` to be > 0 and finite, got {self.std}.")
        if self.mean is not None and not all(map(math.isfinite, self.mean)):
            raise InputError(f"Expected every `mean` to be finite, got {self.mean}.")
        if min(self.immutable, default=0) < 0:
            raise InputError(
                f"Expected every `immutable` channel to be ≥ 0, got {self.immutable}. Count "
                "channels from the first."
            )

    def _check_lengths(self) -> None:
        """One number a channel, everywhere; a single number may stand for all."""
        for name in ("low", "high", "mean", "std"):
            if getattr(self, name) == ():
                raise InputError(f"Expected `{name}` to be one number for each channel, got none.")
        for name, other in (("mean", "std"), ("low", "high"), ("low", "mean"), ("high", "mean")):
            mine, theirs = getattr(self, name), getattr(self, other)
            if not isinstance(mine, tuple) or not isinstance(theirs, tuple):
                continue
            if len(mine) != len(theirs) and (name == "mean" or 1 not in (len(mine), len(theirs))):
                raise InputError(
                    f"Expected `{name}` and `{other}` of the same length, got {len(mine)} and "
                    f"{len(theirs)}. Give one number for each channel."
                )

    def check_radius(self, ball: Ball) -> None:
        """Refuse a radius in units other than the box's: 8 where 8 / 255 is meant.

        Raises:
            InputError: if an L∞ ball is more than four boxes wide in radius.
        """
        widest = max(high - low for low, high in _boxes(self.low, self.high))
        if ball.name == "linf" and ball.eps > 4 * widest:
            raise InputError(
                f"Expected `eps` in units of the input box, {widest:g} wide, got {ball.eps:g}: "
                "every input would be legal. For [0, 1] give 8 / 255, not 8."
            )

    def moments(self, like: Tensor) -> tuple[Tensor, Tensor] | None:
        """(mean, std) shaped `[1, C, 1, ...]` to broadcast over `like`; None if not normalized."""
        if self.mean is None or self.std is None:
            return None
        name = "mean and std"
        return _by_channel(self.mean, like, name), _by_channel(self.std, like, name)

    def bounds(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """(low, high) in raw units, `[1, C, 1, ...]`; −inf and inf in immutable channels."""
        low, high = _by_channel(self.low, like, "low"), _by_channel(self.high, like, "high")
        held = self._held(like)
        if held is None:
            return low, high
        return low.masked_fill(held, -math.inf), high.masked_fill(held, math.inf)

    def to_raw(self, x: Tensor) -> Tensor:
        """Model units → raw units: x · std + mean."""
        moments = self.moments(x)
        return x if moments is None else x * moments[1] + moments[0]

    def to_model(self, raw: Tensor) -> Tensor:
        """Raw units → model units: (raw − mean) / std."""
        moments = self.moments(raw)
        return raw if moments is None else (raw - moments[0]) / moments[1]

    def region(self, raw: Tensor, eps: float | Tensor, mask: Tensor | None = None) -> Region:
        """The legal δ of a batch: max(low − raw, −eps) ≤ δ ≤ min(high − raw, eps).

        Args:
            raw: clean inputs in raw units `[N, ...]`, inside the box.
            eps: radius of the ball, finite and ≥ 0, a number or `[N]` with one for each record.
            mask: True (or anything but 0) where δ may differ from 0, broadcastable to `raw`; None
                means everywhere. Immutable channels stay as they are in any case.

        Returns:
            The region, with tensors of raw's dtype and device and its bounds in raw's layout.

        Raises:
            InputError: if `eps` or `mask` has another form, or if the settings do not fit the
                number of channels.
        """
        radius = _radius(raw, eps)
        low, high = self.bounds(raw)
        free = _joined(self._held(raw), None if mask is None else _spread(mask, raw))
        # Rounding may leave x a hair outside the box: δ = 0 stays legal all the same.
        lower = (low - raw).clamp_max_(0.0).clamp_min_(-radius)
        upper = (high - raw).clamp_min_(0.0).clamp_max_(radius)
        if free is not None:
            lower.masked_fill_(~free, 0.0)
            upper.masked_fill_(~free, 0.0)
        return Region(lower, upper, radius, free)

    def _held(self, like: Tensor) -> Tensor | None:
        """True in immutable channels, `[1, C, 1, ...]`; None if there are none."""
        if not self.immutable:
            return None
        if max(self.immutable) >= like.shape[1]:
            raise InputError(
                f"Expected `immutable` channels below {like.shape[1]}, for inputs of shape "
                f"{tuple(like.shape)}, got {self.immutable}. Channels are counted along "
                "dimension 1, from 0."
            )
        held = torch.zeros(like.shape[1], dtype=torch.bool)
        held[list(self.immutable)] = True
        return held.to(like.device).view(1, -1, *(1,) * (like.ndim - 2))

    def check(self, raw: Tensor, dtype: torch.dtype) -> None:
        """Refuse data outside the box. Waits for the GPU once.

        Args:
            raw: inputs in raw units.
            dtype: the dtype that the batch came in; sets how much rounding is forgiven.

        Raises:
            InputError: if a value outside the immutable channels leaves [low, high] by more than
                rounding, or is not finite; if the settings do not fit the number of channels.
        """
        self.bounds(raw)  # for its refusals, which an empty batch shows as well
        if raw.numel() == 0:
            return
        alike = not self.immutable and len(_boxes(self.low, self.high)) == 1
        dims = tuple(i for i in range(raw.ndim) if i != 1)
        least, most = torch.aminmax(raw) if alike else (raw.amin(dims), raw.amax(dims))
        found = torch.stack([least, most]).view(2, -1).T.tolist()
        boxes = _boxes(self.low, self.high)
        for channel, (smallest, largest) in enumerate(found):
            low, high = boxes[channel % len(boxes)]
            slack = _ROUNDING[dtype] * _magnitude(low, high)
            inside = low - slack <= smallest and largest <= high + slack
            finite = math.isfinite(smallest) and math.isfinite(largest)
            if channel in self.immutable or (inside and finite):
                continue
            where = "" if alike else f" in channel {channel}"
            raise InputError(
                f"Expected inputs inside the box [{low}, {high}]{where}, got values from "
                f"{smallest:.4g} to {largest:.4g}. If the batches are normalized, pass "
                "inputs=InputSpace(mean=..., std=...); if raw values have another range, pass "
                "inputs=InputSpace(low=..., high=...)."
            )


def _boxes(
    low: float | tuple[float, ...], high: float | tuple[float, ...]
) -> list[tuple[float, float]]:
    """(low, high) of each channel, or a single pair for all."""
    lows, highs = (v if isinstance(v, tuple) else (v,) for v in (low, high))
    count = max(len(lows), len(highs))
    return [(lows[i % len(lows)], highs[i % len(highs)]) for i in range(count)]


def _magnitude(low: float, high: float) -> float:
    """The largest finite number of a box: what rounding is relative to."""
    return max((abs(v) for v in (low, high, high - low) if math.isfinite(v)), default=0.0)


def _by_channel(values: float | tuple[float, ...], like: Tensor, name: str) -> Tensor:
    """Settings as a tensor `[1, C, 1, ...]` of the dtype and device of `like`."""
    values = values if isinstance(values, tuple) else (values,)
    channels = like.shape[1]
    if len(values) not in (1, channels):
        raise InputError(
            f"Expected one {name} for each of the {channels} channels of the "
            f"input of shape {tuple(like.shape)}, got {len(values)}."
        )
    return like.new_tensor(values).expand(channels).view(1, -1, *(1,) * (like.ndim - 2))


def _radius(raw: Tensor, eps: float | Tensor) -> Tensor:
    """eps as a tensor, 0-dimensional or `[N, 1, ...]`."""
    radius = torch.as_tensor(eps, dtype=raw.dtype).detach()
    if not bool(((radius >= 0) & radius.isfinite()).all()):
        raise InputError(
            f"Expected `eps` to be finite and ≥ 0, got {eps}. Give the radius in units of the raw "
            "input box, for example 8 / 255."
        )
    column = (len(raw), *(1,) * (raw.ndim - 1))
    if radius.ndim and tuple(radius.shape) not in ((len(raw),), column):
        raise InputError(
            f"Expected `eps` to be a number or one number for each of the {len(raw)} records, got "
            f"shape {tuple(radius.shape)}. Give a tensor of shape ({len(raw)},)."
        )
    return (radius.view(column) if radius.ndim else radius).to(raw.device)


def _spread(mask: Tensor, raw: Tensor) -> Tensor:
    """A mask as booleans, with as many dimensions as the input: `[1 or N, ...]`."""
    try:
        fits = torch.broadcast_shapes(mask.shape, raw.shape) == raw.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise InputError(
            f"Expected `mask` to broadcast to inputs of shape {tuple(raw.shape)}, got shape "
            f"{tuple(mask.shape)}. A mask with one value a record needs the shape "
            f"({len(raw)}{', 1' * (raw.ndim - 1)})."
        )
    mask = mask.to(device=raw.device, dtype=torch.bool)
    return mask.reshape((1,) * (raw.ndim - mask.ndim) + mask.shape)


def _joined(held: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """Where δ is free: where the mask says so and no channel is held; None means everywhere."""
    if held is None or mask is None:
        return mask if held is None else ~held
    return mask & ~held
