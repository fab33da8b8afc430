"""Whose code a class or a function is, by the name of its package."""

import sys
from collections.abc import Iterator
from typing import Any

# `lightning` holds what the two others are: the same code, under its older names.
LIGHTNING = frozenset({"lightning", "lightning_fabric", "pytorch_lightning"})
# Code of these draws from generators that it is given, or from the global ones.
LIBRARIES = sys.stdlib_module_names | LIGHTNING | {
    "defend", "numpy", "opacus", "torch", "torchattacks", "torchvision", "torchmetrics",
    "transformers", "timm", "peft", "scipy", "sklearn", "pandas", "matplotlib", "tqdm", "PIL",
    "huggingface_hub", "safetensors",
}  # fmt: skip
# Objects of these lead everywhere.
CLOSED = LIGHTNING | {"defend", "mlflow"}


def package(part: Any) -> str:
    """The package that a class or a function is of."""
    return (getattr(part, "__module__", None) or "").partition(".")[0]


def lightning_kinds(kind: type) -> Iterator[type]:
    """Lightning's own classes that a class is, or is made from; the nearest one first."""
    return (base for base in kind.__mro__ if package(base) in LIGHTNING)
