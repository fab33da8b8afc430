"""What each attack of torchattacks needs, checked before it stops half-way or goes wrong."""

import math
from collections.abc import Collection, Mapping
from typing import Any

from defend.errors import InputError
from defend.threat.inputs import InputSpace

_REFUSED = {
    "LGV": "It trains copies of the model on a data loader. Take BIM, which it runs in the end",
    "MultiAttack": (
        "It takes attacks, not settings. Evaluate each by its own name, and read the worst case"
    ),
}
_CHOICES = {
    "norm": ("Linf", "L2"),  # FAB lists L1 as well, and stops in the middle of it
    "noise_type": ("guassian", "uniform"),  # spelt as torchattacks spells it
}


def check_name(name: str, names: Collection[str]) -> None:
    """Refuse what is not an attack of torchattacks, or not one on a batch.

    Args:
        name: the name asked for.
        names: those that torchattacks has.
    """
    if name in _REFUSED:
        raise InputError(f"Expected an attack on one batch, got {name!r}. {_REFUSED[name]}.")
    if name not in names:
        known = ", ".join(sorted(set(names) - set(_REFUSED)))
        raise InputError(f"Expected `name` to be one of {known}, got {name!r}.")


def check_settings(name: str, settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Refuse settings that the attack does not have, or would trip over later.

    Args:
        name: of the attack.
        settings: those given.
        defaults: all of the attack's settings, with their defaults.
    """
    allowed = sorted(set(defaults) - {"seed", "verbose"})
    for key in settings:
        if key not in allowed:
            raise InputError(
                f"Expected the settings of torchattacks' {name}, which are "
                f"{', '.join(allowed) or 'none'}, got {key!r}. Random numbers come from the "
                "generator of the call, and attacks are silent."
            )
    resolved = {**defaults, **settings}
    for key, choices in _CHOICES.items():
        if key in resolved and resolved[key] not in choices:
            raise InputError(f"Expected `{key}` to be one of {choices}, got {resolved[key]!r}.")
    if "eps" in resolved:
        _check_eps(resolved["eps"], most=1.0 if _norm(name, resolved) == "Linf" else math.inf)


def needs_cpu(name: str, resolved: Mapping[str, Any]) -> bool:
    """Whether the attack's own tensors must be on the CPU, wherever the model is.

    CW and UPGD's loss "margin" look up labels of the model's device in a matrix on the CPU, and
    OnePixel in a NumPy array.
    """
    return name in ("CW", "OnePixel") or (name == "UPGD" and resolved["loss"] == "margin")


def goes_back_again(name: str) -> bool:
    """Whether the attack goes backward through one forward more than once, class by class."""
    return name in ("DeepFool", "SparseFool", "FAB", "AutoAttack")


def _norm(name: str, resolved: Mapping[str, Any]) -> str:
    return resolved.get("norm", "L2" if name.endswith("L2") else "Linf")


def _check_eps(eps: Any, most: float) -> None:
    if isinstance(eps, int | float) and 0 <= eps <= most and math.isfinite(eps):
        return
    raise InputError(
        f"Expected `eps` to be a number ≥ 0{' and ≤ 1' if most == 1 else ''}, in units of [0, 1] "
        f"such as 8 / 255, got {eps!r}."
    )


def check_box(inputs: InputSpace) -> None:
    """Refuse another box than [0, 1], and channels that must stay."""
    low, high = inputs.low, inputs.high
    lows, highs = (set(v) if isinstance(v, tuple) else {v} for v in (low, high))
    if lows != {0} or highs != {1}:
        raise InputError(
            f"Expected the box [0, 1], which is the only one torchattacks knows, got [{low}, "
            f"{high}]. Give mean and std where batches are normalized, or attack with PGD."
        )
    if inputs.immutable:
        raise InputError(
            f"Expected no immutable channels, got {inputs.immutable}: torchattacks would change "
            "them. Attack with PGD."
        )


def check_images(name: str, resolved: Mapping[str, Any], shape: tuple[int, ...]) -> None:
    """Refuse shapes in which torchattacks would stop half-way.

    Args:
        name: of the attack.
        resolved: all its settings.
        shape: (C, H, W) of an image.
    """
    channels, height, width = shape
    if name in ("TIFGSM", "Pixle") and channels != 3:
        raise InputError(
            f"Expected images of 3 channels for torchattacks' {name}, got {channels}. Take DIFGSM "
            "or OnePixel."
        )
    # Pixle mixes up rows and columns.
    if name in ("DIFGSM", "TIFGSM", "Pixle") and height != width:
        raise InputError(
            f"Expected square images for torchattacks' {name}, got {height} × {width}. Take "
            "MIFGSM or OnePixel."
        )
    if "resize_rate" in resolved and not 1 <= int(width * resolved["resize_rate"]) < width:
        raise InputError(
            "Expected a `resize_rate` that makes the images smaller, got "
            f"{resolved['resize_rate']} for {height} × {width}."
        )
    runs_square = name == "Square" or (name == "AutoAttack" and resolved["version"] != "rand")
    if runs_square and resolved["norm"] == "L2":
        window = max(round(math.sqrt(resolved.get("p_init", 0.8) * height * width)), 3)
        window += 1 - window % 2
        if height < 5 or window > min(height, width):
            raise InputError(
                f"Expected about square images of at least 5 × 5 for torchattacks' {name} with "
                f"norm 'L2', got {height} × {width}. Take APGD and FAB, or PGD with an L2 ball."
            )


def _fewest_classes(name: str, resolved: Mapping[str, Any]) -> int:
    """Classes below which a loss of the attack has no value; 0 where any number will do."""
    if name == "APGDT":
        return 4
    if name == "AutoAttack":
        return 3 if resolved["version"] == "rand" else 4
    return 3 if resolved.get("loss") == "dlr" else 0


def check_classes(name: str, resolved: Mapping[str, Any], found: int) -> None:
    """Refuse a model of too few classes for a loss of the attack, or for the targets asked for.

    Args:
        name: of the attack.
        resolved: all its settings.
        found: classes of the model.
    """
    fewest = _fewest_classes(name, resolved)
    if found < fewest:
        raise InputError(
            f"Expected at least {fewest} classes for torchattacks' {name}, got {found}: the "
            "difference of logits ratio has no value below. Take APGD with loss 'ce', FAB and "
            "Square instead."
        )
    targets = resolved.get("n_classes", found)
    if not 2 <= targets <= found:
        raise InputError(
            f"Expected `n_classes` from 2 to the {found} classes of the model, got {targets}. "
            "Leave it out."
        )
