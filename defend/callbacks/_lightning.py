"""Lightning has two names: `lightning.pytorch` and `pytorch_lightning` are the same code twice.

A Trainer, its module and its loggers are of one of them, and the other one may not be installed. So
nothing in defend imports either by its name, but for types: what has to be known of Lightning's
classes is asked here, and what a trainer needs comes from the package that the trainer is of.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeGuard

from defend.errors import InputError
from defend.privacy.mechanism.libraries import lightning_kinds

if TYPE_CHECKING:
    import lightning.pytorch as pl

PACKAGES = ("lightning.pytorch", "pytorch_lightning")
VERSION = "2.6"  # pip holds `lightning` to it, and cannot hold a package that nobody asked for


def callback_bases() -> tuple[type, ...]:
    """`Callback` of each package that is imported by now, or of each that is installed.

    A Trainer calls hooks by their names, whatever package they are of. But a callback without a
    list around it, and one that LightningCLI builds, have to be a `Callback` of the Trainer's own.
    Where none is imported yet, nobody knows which it will be, so both are taken: what is slow to
    import they share, and the second one takes 0.2 s.

    Raises:
        ImportError: if none can be imported.
    """
    found = [sys.modules[name] for name in PACKAGES if sys.modules.get(name)]
    problems = []
    for name in () if found else PACKAGES:
        try:
            found.append(import_module(name))
        except Exception as problem:  # not there; or there, and too old for the torch that is
            problems.append(problem)
    if not found:
        raise ImportError(
            "Expected `lightning` or `pytorch_lightning` to be installed for defend's callbacks, "
            f"got neither. pip install 'lightning>={VERSION}'."
        ) from problems[0]
    return tuple(package.Callback for package in found)


def package_of(trainer: Any) -> str:
    """Which of both a Trainer, or what is made from one, is of."""
    names = [f"{kind.__module__}." for kind in lightning_kinds(type(trainer))]
    return next(p for name in names for p in PACKAGES if name.startswith(f"{p}."))


def check_version(trainer: pl.Trainer) -> None:
    """Refuse a Trainer that works in other ways than the one that defend is made for.

    Raises:
        InputError: if its package has another version.
    """
    package = package_of(trainer)
    version = import_module(package).__version__
    if not version.startswith(f"{VERSION}."):
        raise InputError(
            f"Expected a Trainer of {package} {VERSION}, got one of {version}: defend wraps "
            f"methods of its strategy, and knows those of {VERSION}. Install {VERSION}."
        )


def _part(trainer: pl.Trainer, name: str) -> Any:
    """What a name within a Trainer's package stands for, such as "loggers.logger.DummyLogger"."""
    module, _, part = name.rpartition(".")
    return getattr(import_module(f"{package_of(trainer)}.{module}"), part)


def silent_logger(trainer: pl.Trainer, part: type | None = None) -> Any:
    """A logger that swallows everything.

    Args:
        trainer: that it is for.
        part: a class that goes before the logger's own.
    """
    kind = _part(trainer, "loggers.logger.DummyLogger")
    return (kind if part is None else before(part, kind))()


@functools.cache
def before(part: type, kind: type) -> type[Any]:
    """A class in which one goes before another, whose package is known at run time only."""
    return type(part.__name__, (part, kind), {})


def takes_batch_idx(trainer: pl.Trainer, step: Callable[..., Any]) -> bool:
    """Whether the Trainer hands the number of the batch to a `training_step`."""
    takes = _part(trainer, "utilities.signature_utils.is_param_in_hook_signature")
    return takes(step, "batch_idx", min_args=2)


def is_made_from(thing: Any, *names: str) -> bool:
    """Whether an object's class is, or is made from, one of Lightning's classes of these names."""
    return any(kind.__name__ in names for kind in lightning_kinds(type(thing)))


def is_module(thing: Any) -> TypeGuard[pl.LightningModule]:
    """Whether it is a LightningModule."""
    return is_made_from(thing, "LightningModule")


def overrides(module: pl.LightningModule, method: str) -> bool:
    """Whether a module has a method of its own in the place of LightningModule's."""
    kinds = lightning_kinds(type(module))
    own = next(kind for kind in kinds if kind.__name__ == "LightningModule")
    return getattr(type(module), method) is not getattr(own, method)
