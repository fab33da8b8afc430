"""What changes between two steps beside the weights that train: it would be kept without noise."""

import contextlib
import itertools
import secrets
import types
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from defend.batching.digest import sum_of_bits
from defend.privacy.mechanism.generators import is_users, names_in, objects_in

# Of a buffer or a frozen weight: of larger ones a part, each time another. What else is kept is
# looked at rarely, and whole.
_MOST_NUMBERS = 2**18
_MOST_ITEMS = 1_000
_ATTRIBUTES = ""  # stands among the names of what has attributes

Key = tuple[int, str]  # of an object, and a name on it
Kept = dict[Key, Any]
Numbers = Tensor | np.ndarray


class StateWatch:
    """Notices that code of the user's writes to something that is no weight that trains.

    Buffers and frozen weights, which are published, are looked at before and after each step. What
    else the user's code keeps (tensors, arrays and fractions, as attributes and in built-in
    containers) takes longer to find, and is looked at where it is asked for. Whole numbers, and
    what is added to containers, are no finding: counters, and lists of losses. Lists of tensors
    that grow are one.

    Args:
        module: whose parameters that require a gradient train.
        code: the user's objects beside it: data set, callbacks, loss.
        skip: objects that are not entered, such as a trainer.

    Attributes:
        written: tensors and arrays of the user's that changed before the last `take`, under what
            holds them; of more than one number, and no views of weights that train.
        inside: names of what changed within steps, where that was asked for.
    """

    def __init__(
        self, module: nn.Module, code: Iterable[Any] = (), skip: Iterable[Any] = ()
    ) -> None:
        self._module, self._code, self._skip = module, tuple(code), tuple(skip)
        self._published: _Fingerprint | None = None  # after a step, or a pause
        self._before_step: _Fingerprint | None = None
        self._kept: Kept | None = None
        self._changed: list[str] = []
        self._kept_before: Kept | None = None
        self.written: dict[Key, list[Numbers]] = {}
        self._written: dict[Key, list[Numbers]] = {}
        self.inside: set[str] = set()
        self._deep = self._paused = False

    def note(self, *, deep: bool = False) -> list[str]:
        """A step is over, its user's part at least: from here on only the optimizer works.

        Args:
            deep: whether to look at all that the user's code keeps.

        Returns:
            Names of what the step itself changed, since `take`.
        """
        before, self._before_step = self._before_step, None
        changed = [] if before is None else before.changed(self._module)
        self._deep, self._published = deep, _Fingerprint(self._module)
        self._kept = {key: number for key, number, _ in self._all_kept()} if deep else None
        if self._kept_before is not None:
            found = _differing(self._kept_before, self._all_kept())
            self.inside |= {*changed, *(key[1] for key, _ in found)}
            self._kept_before = None
        return changed

    def deepen(self) -> None:
        """Between two steps: from here on all that the user's code keeps is looked at."""
        if self._published is not None and self._kept is None:
            self.pause()
            self.note(deep=True)

    def pause(self) -> None:
        """What changes from here to `go_on` is no concern."""
        self._paused = self._published is not None
        if self._published is not None:
            self._changed += self._published.changed(self._module)
        if self._kept is not None:
            weights = {_place(p) for p in self._module.parameters() if p.requires_grad}
            for key, value in _differing(self._kept, self._all_kept()):
                self._changed.append(key[1])
                numbers = [v for v in _numbers_of(value) if _place(v) not in weights]
                self._written.setdefault(key, []).extend(numbers)
        self._published = self._kept = None

    def go_on(self) -> None:
        """After a pause, as before it."""
        if self._paused:
            self.note(deep=self._deep)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, what changes is no concern."""
        self.pause()
        try:
            yield
        finally:
            self.go_on()

    def take(self, *, inside: bool = False) -> list[str]:
        """A step begins: names of what changed between `note` and here, each once.

        Args:
            inside: whether to note, too, all that changes within the step.
        """
        self.pause()
        changed, self._changed = list(dict.fromkeys(self._changed)), []
        self.written, self._written = self._written, {}
        self._before_step = _Fingerprint(self._module)
        if inside:
            self._kept_before = {key: number for key, number, _ in self._all_kept()}
        return changed

    @property
    def published(self) -> set[str]:
        """The names of buffers and frozen weights."""
        return set(_published(self._module))

    def _all_kept(self) -> Iterator[tuple[Key, Any, Any]]:
        tables = [t for m in self._module.modules() for t in (m._parameters, m._buffers)]
        roots = (self._module, *self._code)
        objects = objects_in(roots, (*self._skip, *tables), users_only=True)
        return (kept for owner in objects for kept in _kept_by(owner))


class _Fingerprint:
    """The bits of a module's buffers and frozen weights, in a number each."""

    def __init__(self, module: nn.Module, part: float | None = None) -> None:
        self._part = secrets.randbelow(2**20) / 2**20 if part is None else part
        tensors = _published(module)
        self._names = list(tensors)
        sums = [_bits(t, self._part) for t in tensors.values()]
        # One number on each device that is waited for, not one for each tensor.
        self._sums = {d: torch.stack([s for s in sums if s.device == d]) for d in _devices(sums)}
        self._each = sums

    def changed(self, module: nn.Module) -> list[str]:
        """Names under which something else stands by now; new ones do not count."""
        now = _Fingerprint(module, self._part)
        same_names = self._names == now._names and self._sums.keys() == now._sums.keys()
        if same_names and all(torch.equal(s, now._sums[d]) for d, s in self._sums.items()):
            return []
        others = dict(zip(now._names, now._each, strict=True))
        pairs = [(n, s) for n, s in zip(self._names, self._each, strict=True) if n in others]
        return [name for name, s in pairs if not torch.equal(s.cpu(), others[name].cpu())]


def _devices(tensors: Iterable[Tensor]) -> set[torch.device]:
    return {t.device for t in tensors}


def _published(module: nn.Module) -> dict[str, Tensor]:
    frozen = {n: p for n, p in module.named_parameters() if not p.requires_grad}
    return {**dict(module.named_buffers()), **frozen}


@torch.no_grad()
def change_published(module: nn.Module, names: Iterable[str]) -> set[str]:
    """Give those of a module's buffers and frozen weights other values; returns their names."""
    tensors = _published(module)
    found = {name: tensors[name] for name in names if name in tensors}
    for tensor in found.values():
        tensor.data = tensor.logical_not() if tensor.dtype is torch.bool else tensor + 1
    return set(found)


def _kept_by(owner: Any) -> Iterator[tuple[Key, Any, Any]]:
    """What an object of the user's holds directly: its key, a number that tells it, and itself."""
    items: list[tuple[Any, Any]]
    if isinstance(owner, types.FunctionType):
        if not is_users(owner):
            return
        items = _of_function(owner)
    elif isinstance(owner, dict):
        items = list(owner.items())[:_MOST_ITEMS]
    elif isinstance(owner, list | deque):
        items = list(enumerate(itertools.islice(owner, _MOST_ITEMS)))
        if items and isinstance(items[-1][1], Tensor | np.ndarray):
            yield (id(owner), "length"), len(owner), owner  # a queue, no list of losses
    elif is_users(owner if isinstance(owner, type) else type(owner)):
        items = list(getattr(owner, "__dict__", {}).items())
    elif isinstance(owner, _OPEN):
        items = [(name, value) for name, value in vars(owner).items() if name[0] != "_"]
    else:
        return
    prefix = "" if isinstance(owner, dict | list | deque) else f"{_name_of(owner)}."
    attributes = not isinstance(owner, dict | list | deque)
    if attributes:
        yield (id(owner), _ATTRIBUTES), None, None
    for name, value in items:
        for place, part in enumerate(value if isinstance(value, tuple) else (value,)):
            frozen = isinstance(part, nn.Parameter) and not part.requires_grad
            number = _bits(part) if attributes and frozen else _number_of(part)
            if attributes and isinstance(part, dict | list):  # another one may take its place
                contents = [_number_of(v) for v in _some_of(part)]
                key = f"{prefix}{name} of {len(part)}"
                yield (id(owner), key), hash(tuple(map(_plain, contents))), part
            if number is not None or attributes:
                label = f"{prefix}{name}" if attributes else f"[{name!r}]"  # no name of a buffer
                yield (id(owner), f"{label}{f'[{place}]' if place else ''}"), number, part


_OPEN = nn.Module, Dataset, types.SimpleNamespace  # users write to those of libraries, too


def _of_function(function: types.FunctionType) -> list[tuple[str, Any]]:
    """What it closes over, its defaults, its attributes, and the globals that its code names."""
    space, defaults = function.__globals__, function.__defaults__ or ()
    items = {name: space[name] for name in names_in(function.__code__) if name in space}
    items |= vars(function) | (function.__kwdefaults__ or {}) | dict(_closed_over(function))
    return [*items.items(), *((f"default {i}", value) for i, value in enumerate(defaults))]


def _numbers_of(value: Any) -> list[Numbers]:
    """The tensors and arrays of more than one number that a value is, or holds."""
    parts = _some_of(value) if isinstance(value, dict | list | deque) else [value]
    return [
        part
        for part in parts
        if isinstance(part, Tensor | np.ndarray) and int(np.prod(part.shape)) > 1
    ]


def _place(value: Numbers) -> int:
    """Where its memory is; itself where nobody knows."""
    with contextlib.suppress(RuntimeError):  # of a sparse tensor
        if isinstance(value, Tensor):
            return value.untyped_storage().data_ptr()
        while isinstance(value.base, np.ndarray):
            value = value.base
        return int(value.__array_interface__["data"][0])
    return id(value)


def _closed_over(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # an empty one
            yield name, cell.cell_contents


def _some_of(container: Any) -> list[Any]:
    values = container.values() if isinstance(container, dict) else container
    return list(itertools.islice(values, _MOST_ITEMS))


def _plain(number: Any) -> Any:
    return int(number) if isinstance(number, Tensor) else number


def _name_of(owner: Any) -> str:
    return getattr(owner, "__name__", type(owner).__name__)


def _number_of(value: Any) -> Any:
    """What tells a number, or many, from others; None where there is none."""
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        return _bits(value)
    if isinstance(value, np.ndarray) and not isinstance(value, np.memmap):
        return zlib.crc32(value.tobytes()) if value.dtype.kind in "biufc" else None
    if isinstance(value, float | np.floating):
        return float(value)
    return None


def _differing(before: Kept, now: Iterable[tuple[Key, Any, Any]]) -> Iterator[tuple[Key, Any]]:
    """Keys under which another number stands than before, and what does.

    Nothing that was added to a container; but attributes that are new.
    """
    for key, number, value in now:
        attribute = (key[0], _ATTRIBUTES) in before and not isinstance(value, dict | list)
        if (attribute or key in before) and _differ(before.get(key), number):
            yield key, value


def _differ(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return int(one) != int(other)
    if other is None or one is None:
        return one is not other and other is not None
    return bool(one != other) and not (one != one and other != other)  # NaN is no change


@torch.no_grad()
def _bits(tensor: Tensor, part: float | None = None) -> Tensor:
    """`sum_of_bits` of any tensor.

    Args:
        tensor: of any kind.
        part: where to look at a tensor that is large, in [0, 1); None for all of it.
    """
    odd = tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized
    if odd or type(tensor) not in (Tensor, nn.Parameter):
        return torch.tensor(tensor._version)
    tensor = tensor.detach()
    flat = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).reshape(-1)
    if part is not None:
        start = int(part * max(len(flat) - _MOST_NUMBERS, 0))
        flat = flat[start : start + _MOST_NUMBERS]
    return sum_of_bits(flat.contiguous())
