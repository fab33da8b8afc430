"""Figures for reviewers. matplotlib is imported where it is used."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

_LABELS = {"linf": "L∞", "l2": "L2"}


def robustness_curve_figure(curves: Mapping[str, Mapping[float, float]]) -> "Figure":
    """Accuracy under attack against the attacker's radius, one line a ball.

    Args:
        curves: for each name, accuracy in [0, 1] by eps.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    for name, curve in curves.items():
        points = sorted(curve.items())
        axes.plot(*zip(*points, strict=True), marker="o", label=_LABELS.get(name, name))
    axes.set(xlabel="eps of the attack", ylabel="accuracy", ylim=(-0.02, 1.02))
    axes.set_title("Accuracy under attack")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def adversarial_examples_figure(
    rows: Mapping[str, "Tensor"], captions: Mapping[str, list[str]] | None = None
) -> "Figure":
    """Images in rows, the originals beside what attacks made of them.

    Args:
        rows: for each row's title, images `[n, H, W]` or `[n, 1, H, W]` with values in [0, 1].
        captions: for each row's title, a caption an image (the predicted label, say).
    """
    from matplotlib.figure import Figure

    count = max(len(images) for images in rows.values())
    figure = Figure(figsize=(1 + 0.9 * count, 1.15 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), count, squeeze=False)
    for axes, (title, images) in zip(grid, rows.items(), strict=True):
        for i, axis in enumerate(axes):
            axis.set(xticks=[], yticks=[])
            if i < len(images):
                picture = images[i].detach().float().cpu().reshape(images[i].shape[-2:]).numpy()
                axis.imshow(picture, cmap="gray", vmin=0, vmax=1)
                if captions and title in captions:
                    axis.set_title(captions[title][i], fontsize=8, pad=2)
        axes[0].set_ylabel(title, rotation=0, ha="right", va="center", fontsize=9)
    return figure
