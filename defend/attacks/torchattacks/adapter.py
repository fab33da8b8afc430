"""Any attack of torchattacks, made safe to train and to evaluate with; its only importer."""

import dataclasses
import functools
import inspect
import math
import threading
import warnings
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from defend.attacks.ascent import Model
from defend.attacks.attack import Attack
from defend.attacks.context import untouched
from defend.attacks.result import AttackResult
from defend.attacks.torchattacks.image_model import ImageModel, image_shape, raw_logits
from defend.attacks.torchattacks.requirements import (
    check_box,
    check_classes,
    check_images,
    check_name,
    check_settings,
    goes_back_again,
    needs_cpu,
)
from defend.attacks.torchattacks.seeding import seeded
from defend.batching.chunks import check_chunk_size, chunk_bounds
from defend.errors import InputError
from defend.threat.inputs import InputSpace, check_rows

_VERSION = "3.3.0"
_INSTALL = f"pip install torchattacks=={_VERSION}"
_TARGETS = 10  # classes that AutoAttack's targeted attacks try by default, the true one included

# torchattacks draws from the global RNGs, of which the threads of a process share one each.
_ONE_AT_A_TIME = threading.RLock()


@dataclasses.dataclass(frozen=True)
class TorchAttack(Attack):
    """An attack of torchattacks 3.3.0 (Kim 2020, arXiv 2010.01950), by name and settings.

        TorchAttack("AutoAttack", {"norm": "Linf", "eps": 8 / 255, "version": "standard"})

    torchattacks alone reseeds the global RNG, un-freezes frozen BatchNorm, fills gradients of the
    weights, loses its modes when the model raises, clamps normalized inputs to [0, 1], and fails
    under `inference_mode`, on channels_last and on tables. Here each call builds the attack anew
    around a wrapper of the model, which takes raw images in float32 and out of whose sight the
    model and its weights stay; an autocast in force holds for the model, not for the attack.

    All attacks of `torchattacks.__all__` work, untargeted, except LGV and MultiAttack. Where
    they need more than a classifier:

    - AutoAttack runs 10 steps of APGD, APGDT and FAB, where its authors take 100, and 5,000 queries
      of Square. For theirs name the four: `TorchAttack("APGD", {..., "steps": 100})` and so on.
    - APGDT and AutoAttack need 4 classes, the loss "dlr" and AutoAttack's version "rand" 3.
      `n_classes`, left out, is what the model has, at most 10.
    - DIFGSM, TIFGSM and Pixle need square images; TIFGSM and Pixle 3 channels; Square and
      AutoAttack with norm "L2" images of at least 5 × 5 that are about square.
    - APGD, APGDT, FAB, Square and AutoAttack return the clean input of a record that they do not
      fool: mind that in training.
    - VANILA, GN, CW, DeepFool, SparseFool, OnePixel and Pixle know no radius.

    Inputs of other ranks are seen as images: `[N, D]` as one row of D pixels, `[N, C, L]` as C
    channels of one row, `[N, C, D, H, W]` as C channels of D rows.

    Args:
        name: the attack's name in torchattacks.
        settings: its own settings by name, in raw units of [0, 1]. Not `seed`, as random numbers
            come from the generator, nor `verbose`.
        inputs: mean and std where batches are normalized; the box must be [0, 1].

    Raises:
        InputError: if torchattacks 3.3.0 is not installed, for a name or a setting that it does
            not have, or for another box than [0, 1]; on call, for inputs that are not floating
            point or lie outside the box, targets that are not class indices, a model with too few
            classes, images of a shape that the attack cannot take, and a result that is not
            finite or leaves the box.

    *Guarantees.* x_adv is finite and in the box, with the shape, dtype, device and layout of x;
    values that the attack did not touch are those of x to the last bit. Equal generators give
    equal results. The model (modes, gradients, buffers) and the global RNGs of torch, NumPy and
    Python are left as they were, also when the model raises. How far x_adv lies from x is the
    attack's own promise, to the rounding of float32. Row i depends on the other rows where
    `couples_records` says so.
    """

    name: str
    # Not hashed: dicts cannot be.
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    _: dataclasses.KW_ONLY
    inputs: InputSpace = InputSpace()

    def __post_init__(self) -> None:
        if not isinstance(self.settings, Mapping):
            raise InputError(
                "Expected `settings` to be a mapping such as {'eps': 8 / 255}, got "
                f"{self.settings!r}."
            )
        object.__setattr__(self, "settings", dict(self.settings))
        check_name(self.name, _torchattacks().__all__)
        check_settings(self.name, self.settings, _defaults(self.name))
        check_box(self.inputs)
        try:
            self._build(ImageModel(nn.Identity(), torch.device("cpu")), self.settings)
        except Exception as error:
            raise InputError(
                f"Expected settings that torchattacks' {self.name} takes, got "
                f"{self.settings}: {str(error) or type(error).__name__}"
            ) from error

    @property
    def eps(self) -> float | None:
        """The radius, in raw units; None for an attack that knows none."""
        return self._resolved.get("eps")

    @property
    def radius(self) -> float | None:
        return None if self.eps is None else float(self.eps)

    @property
    def couples_records(self) -> bool:
        """Whether x_adv of a record depends on the other records of its chunk.

        CW stops a whole batch as soon as the sum of its losses grows; APGDT with norm "L2" (and
        AutoAttack, which runs it) moves all records by the step size of the first. With
        `chunk_size=1` they do not. Under DP such an attack would let one record move the
        gradients of others. Which random numbers a record gets may depend on the others in any
        attack, but not how they are distributed.
        """
        if self.name == "AutoAttack" and self._resolved["version"] == "rand":
            return False
        l2 = self._resolved.get("norm") == "L2"
        return self.name == "CW" or (self.name in ("APGDT", "AutoAttack") and l2)

    def with_eps(self, eps: float) -> Self:
        """The same attack at another radius, its step size `alpha` scaled along.

        Raises:
            InputError: for an attack that knows no radius.
        """
        now = self._resolved
        if "eps" not in now:
            raise InputError(
                f"Expected an attack with a radius, got torchattacks' {self.name}, which has no "
                "`eps`. Take another attack for ε warm-up and robustness curves."
            )
        settings = {**self.settings, "eps": eps}
        if "alpha" in now and now["eps"] > 0 and eps > 0:
            settings["alpha"] = now["alpha"] * eps / now["eps"]
        return dataclasses.replace(self, settings=settings)

    def perturb(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        *,
        generator: torch.Generator | None = None,
        chunk_size: int | str | None = "auto",
        eps: float | None = None,
    ) -> AttackResult:
        """Attack a batch; arguments that are not explained here are those of `Attack.perturb`.

        Args:
            y: class indices `[N]`.
            generator: seeds all random numbers of the attack; None seeds them from OS entropy.
            chunk_size: most rows to attack at once; None and "auto" mean all. Random numbers are
                drawn chunk by chunk, so the result depends on it.
        """
        if eps is not None:
            return self.with_eps(eps).perturb(
                model, x, y, generator=generator, chunk_size=chunk_size
            )
        _check_batch(x, y)
        check_chunk_size(chunk_size)
        if len(x) == 0:
            return AttackResult(x.detach().clone())
        with _ONE_AT_A_TIME, untouched(model, x.device), seeded(generator, x.device):
            # Clones made here are ordinary tensors even where x was made in inference mode.
            clean, labels = x.detach().clone(), y.detach().clone().long()
            raw = self.inputs.to_raw(clean.to(torch.promote_types(x.dtype, torch.float32)))
            self.inputs.check(raw, x.dtype)
            if self.eps == 0:  # nowhere to go, and PGDL2 would divide 0 by 0 on its way
                return AttackResult(clean)
            images = raw.clamp(0, 1).float().reshape(len(x), *image_shape(x)).contiguous()
            home = torch.device("cpu") if needs_cpu(self.name, self._resolved) else x.device
            logits = raw_logits(model, clean, self.inputs)
            image_model = ImageModel(logits, home, retain=goes_back_again(self.name))
            with torch.autocast(x.device.type, enabled=False), warnings.catch_warnings():
                # Its own warnings, no one else's.
                warnings.filterwarnings("ignore", module=r"torchattacks\.")
                attack = self._build(image_model, self._fitted(image_model, images))
                cuts = chunk_bounds(len(x), self._most_rows(chunk_size))
                found = torch.cat([attack(images[a:b], labels[a:b]).detach() for a, b in cuts])
            found = found.to(x.device)
            _check_result(found, self.name)
            return AttackResult(self._result(found, images, clean))

    _perturb = perturb  # which leaves no trace by itself

    @property
    def _resolved(self) -> dict[str, Any]:
        """All settings, torchattacks' defaults included."""
        return {**_defaults(self.name), **self.settings}

    def _build(self, image_model: ImageModel, settings: Mapping[str, Any]) -> Any:
        return getattr(_torchattacks(), self.name)(image_model, **settings)

    def _fitted(self, image_model: ImageModel, images: Tensor) -> dict[str, Any]:
        """The settings, with what follows from the model and the images."""
        check_images(self.name, self._resolved, tuple(images.shape[1:]))
        settings = dict(self.settings)
        if "n_classes" in self._resolved or self._resolved.get("loss") == "dlr":
            classes = image_model(images[:1]).shape[1]
            if "n_classes" in self._resolved:
                settings.setdefault("n_classes", min(classes, _TARGETS))
            check_classes(self.name, {**self._resolved, **settings}, classes)
        if "batch_max" in self._resolved:
            settings["batch_max"] = math.inf  # cut by `_most_rows`: PGDRS stops when it cuts
        return settings

    def _most_rows(self, chunk_size: int | str | None) -> int | None:
        """Rows for one call: as many as asked for, and as the attack can take."""
        limits = [chunk_size] if isinstance(chunk_size, int) else []
        if "batch_max" in self._resolved:
            copies = self._resolved["noise_batch_size"]
            limits.append(max(int(self._resolved["batch_max"] // copies), 1))
        if self._resolved.get("update_each_iteration"):  # Pixle then takes one image
            limits.append(1)
        return min(limits, default=None)

    def _result(self, found: Tensor, images: Tensor, clean: Tensor) -> Tensor:
        """Raw images → x_adv as x came; where nothing changed, x itself."""
        compute = torch.promote_types(clean.dtype, torch.float32)
        raw = found.clamp(0, 1).to(compute).reshape(clean.shape)
        moved = (found != images).reshape(clean.shape)
        x_adv = torch.where(moved, self.inputs.to_model(raw).to(clean.dtype), clean)
        return torch.empty_like(clean).copy_(x_adv)  # in the layout of x


def _torchattacks() -> Any:
    """The package, in the version that this file knows."""
    try:
        import torchattacks
    except ImportError as error:
        raise InputError(f"Expected torchattacks {_VERSION}, got none. {_INSTALL}") from error
    if torchattacks.__version__ != _VERSION:
        raise InputError(
            f"Expected torchattacks {_VERSION}, got {torchattacks.__version__}, which needs other "
            f"packages than MLflow 3 and whose attacks were not tried. {_INSTALL}"
        )
    return torchattacks


@functools.cache
def _defaults(name: str) -> dict[str, Any]:
    """The settings of an attack and their defaults."""
    parameters = inspect.signature(getattr(_torchattacks(), name)).parameters
    return {key: p.default for key, p in parameters.items() if key != "model"}


def _check_batch(x: Tensor, y: Tensor) -> None:
    check_rows(x)
    if y.ndim != 1 or y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise InputError(
            f"Expected class indices of shape [{len(x)}], got {y.dtype} of shape "
            f"{tuple(y.shape)}. Take PGD where targets are class probabilities."
        )
    if len(x) != len(y):
        raise InputError(f"Expected one target a record, got {len(x)} inputs, {len(y)} targets.")


def _check_result(found: Tensor, name: str) -> None:
    smallest, largest = (v.item() for v in found.aminmax())
    if smallest >= -1e-5 and largest <= 1 + 1e-5:
        return
    raise InputError(
        f"Expected torchattacks' {name} to return finite values in [0, 1], got values from "
        f"{smallest:.4g} to {largest:.4g}. Check that the model's outputs and their gradients are "
        "finite, or take another attack."
    )
