"""What a run's set-up shows: the facts, and what is wrong with them.

Each function looks at one thing and returns what it found, in words that fit after "got", or None.
`defend.privacy.checks.preconditions` says what was expected instead, and what to do.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
)

from defend.privacy.mechanism.libraries import lightning_kinds


@dataclasses.dataclass(frozen=True)
class Setup:
    """Facts about a training run, free of any framework's types.

    None (or an empty tuple) means not known yet, and is not judged.
    """

    module: nn.Module | None = None
    optimizers: tuple[Any, ...] | None = None
    resumed: bool = True
    loader: Any = None
    loaders: int | None = None
    accumulate_grad_batches: int = 1
    gradient_clip_val: float | None = None
    precision: str = "32-true"
    strategy: str | None = None
    automatic_optimization: bool = True
    takes_dataloader_iter: bool = False
    overrides_backward: bool = False
    compiled: bool = False
    reloads_data: bool = False
    overfits_batches: bool = False
    callbacks: tuple[type, ...] = ()
    world_size: int = 1


def layers(setup: Setup, wanted: Callable[[nn.Module], bool]) -> str | None:
    """The layers that are `wanted`, by type and name."""
    if setup.module is None:
        return None
    names = [
        f"{type(m).__name__} at `{n or '.'}`" for n, m in setup.module.named_modules() if wanted(m)
    ]
    return some(names)


def some(names: Iterable[str], most: int = 5) -> str | None:
    """The first few names, and how many more there are; None for none."""
    listed = list(names)
    if not listed:
        return None
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more


def _trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in module.named_parameters() if p.requires_grad}


def mixes_records(layer: nn.Module) -> bool:
    """BatchNorm, unless it is frozen: in eval mode, on stored statistics, without training."""
    if not isinstance(layer, _BatchNorm):
        return False
    frozen = not layer.training and layer.running_mean is not None
    return not frozen or any(p.requires_grad for p in layer.parameters())


def compiled_layers(setup: Setup) -> str | None:
    """A module that torch.compile took, whole or in parts."""
    if setup.compiled:
        return "a compiled module"
    # torch.compile(m) wraps m; m.compile() leaves its class and keeps a compiled call beside it.
    return layers(
        setup,
        lambda m: (
            type(m).__name__ == "OptimizedModule"
            or getattr(m, "_compiled_call_impl", None) is not None
        ),
    )


def computes_weights(layer: nn.Module) -> bool:
    """Whether a pre-hook makes a weight out of the layer's trainable parameters."""
    hooks = layer._forward_pre_hooks.values()
    return any(isinstance(hook, WeightNorm | SpectralNorm) for hook in hooks) and any(
        p.requires_grad for p in layer.parameters(recurse=False)
    )


def complex_weights(setup: Setup) -> str | None:
    """Trainable parameters of complex numbers."""
    if setup.module is None:
        return None
    trained = _trainable(setup.module).items()
    return some(f"`{n}` in {p.dtype}" for n, p in trained if p.is_complex())


def nothing_to_train(setup: Setup) -> str | None:
    """A module without trainable parameters."""
    return "none" if setup.module is not None and not _trainable(setup.module) else None


def direct_parameters(setup: Setup) -> str | None:
    """Trainable parameters on the top module, where DistributedDataParallel wraps it."""
    if setup.module is None or setup.world_size == 1:
        return None
    if next(setup.module.children(), None) is None:
        return None
    direct = setup.module.named_parameters(recurse=False)
    return some(f"`{n}`" for n, p in direct if p.requires_grad)


def is_fused(layer: nn.Module) -> bool:
    """Layers that compute several steps, or draw dropout, inside one call."""
    if not type(layer).__module__.startswith("torch."):
        return False
    if not any(p.requires_grad for p in layer.parameters()):
        return False
    if isinstance(layer, nn.MultiheadAttention):
        return layer.dropout > 0
    return isinstance(layer, nn.RNNBase)


def optimizer_count(setup: Setup) -> str | None:
    """Any number of optimizers but one."""
    if setup.optimizers is None or len(setup.optimizers) == 1:
        return None
    return str(len(setup.optimizers))


def parameters_left_out(setup: Setup) -> str | None:
    """Trainable parameters that no optimizer holds."""
    if setup.module is None or not setup.optimizers:
        return None
    held = {id(p) for o in setup.optimizers for g in o.param_groups for p in g["params"]}
    return some(f"`{n}` left out" for n, p in _trainable(setup.module).items() if id(p) not in held)


def foreign_parameters(setup: Setup) -> str | None:
    """Trainable parameters of an optimizer that the module does not have."""
    if setup.module is None or setup.optimizers is None:
        return None
    own = {id(p) for p in setup.module.parameters()}
    held = [p for o in setup.optimizers for g in o.param_groups for p in g["params"]]
    count = sum(p.requires_grad and id(p) not in own for p in held)
    return f"{count} that are not the module's" if count else None


def used_optimizer(setup: Setup) -> str | None:
    """An optimizer with a state, at the start of an account."""
    if setup.resumed:
        return None
    return some(f"a {type(o).__name__} that has" for o in setup.optimizers or () if o.state)


def parameter_hooks(setup: Setup) -> str | None:
    """Trainable parameters with hooks on their gradients."""
    if setup.module is None:
        return None
    return some(
        f"one on `{n}`"
        for n, p in _trainable(setup.module).items()
        if getattr(p, "_post_accumulate_grad_hooks", None) or getattr(p, "_backward_hooks", None)
    )


def several_closures(setup: Setup) -> str | None:
    """An optimizer that calls its closure many times a step."""
    return some(type(o).__name__ for o in setup.optimizers or () if type(o).__name__ == "LBFGS")


STRATEGIES = {"SingleDeviceStrategy", "DDPStrategy"}
PRECISIONS = {"32-true", "32", 32, "64-true", "64", 64, "bf16-mixed"}
_INCOMPATIBLE_CALLBACKS = {
    "LearningRateFinder",
    "BatchSizeFinder",
    "GradientAccumulationScheduler",
    "StochasticWeightAveraging",
    "ModelPruning",
    "BackboneFinetuning",
    "BaseFinetuning",
}


def is_incompatible(callback: type) -> bool:
    """Whether a callback, or what it derives from, cannot be part of a private run."""
    return any(base.__name__ in _INCOMPATIBLE_CALLBACKS for base in callback.__mro__)


def _is_plain_loader(loader: Any) -> bool:
    return type(loader) is DataLoader


def not_map_style(setup: Setup) -> str | None:
    """An iterable data set."""
    if isinstance(getattr(setup.loader, "dataset", None), IterableDataset):
        return f"the iterable data set {type(setup.loader.dataset).__name__}"
    return None


def loader_type(setup: Setup) -> str | None:
    """A loader that is no plain DataLoader."""
    if setup.loader is None or _is_plain_loader(setup.loader):
        return None
    return f"a {type(setup.loader).__module__}.{type(setup.loader).__qualname__}"


def batching(setup: Setup) -> str | None:
    """Batches that are not put together from batch_size, in order."""
    loader = setup.loader
    if not _is_plain_loader(loader) or not_map_style(setup):
        return None
    if loader.batch_sampler is None:
        return "batch_size=None"
    if type(loader.batch_sampler) is not BatchSampler:
        return f"the batch sampler {type(loader.batch_sampler).__name__}"
    if loader.batch_size is None:
        return "a batch sampler of its own"
    if not getattr(loader, "in_order", True):
        return "in_order=False"
    return None


def other_sampler(setup: Setup) -> str | None:
    """A sampler that is more than an order of all records."""
    loader = setup.loader
    if not _is_plain_loader(loader) or not_map_style(setup):
        return None
    sampler = loader.sampler
    known = type(sampler) in (RandomSampler, SequentialSampler) or (
        isinstance(sampler, DistributedSampler)
        # Lightning's own wrapper hides a custom sampler inside a DistributedSampler.
        and not hasattr(sampler.dataset, "_sampler")
    )
    if not known:
        inner = getattr(getattr(sampler, "dataset", None), "_sampler", sampler)
        return f"a {type(inner).__name__}"
    if type(sampler) is RandomSampler and (
        sampler.replacement or sampler.num_samples != len(loader.dataset)
    ):
        return (
            f"RandomSampler(replacement={sampler.replacement}, num_samples={sampler.num_samples})"
        )
    return None


def batch_beyond_data(setup: Setup) -> str | None:
    """An expected batch larger than the data set."""
    if not _is_plain_loader(setup.loader) or not_map_style(setup) or batching(setup):
        return None
    expected, size = setup.loader.batch_size * setup.world_size, len(setup.loader.dataset)
    return f"an expected batch of {expected} from {size} records" if expected > size else None


def repeated_records(setup: Setup) -> str | None:
    """Indices that lead to one record, through every Subset and ConcatDataset."""
    parts: dict[Any, list[tuple[Any, np.ndarray | None]]] = {}
    try:
        for base, indices in _parts(getattr(setup.loader, "dataset", None), None):
            parts.setdefault(_identity(base), []).append((base, indices))
    except (TypeError, ValueError, OverflowError):
        return "a Subset whose indices are not numbers"
    twice = sum(map(_repeats, parts.values()))
    return f"one with repeated indices: {twice} lead to a record again" if twice else None


def _parts(dataset: Any, wanted: np.ndarray | None) -> Iterator[tuple[Any, np.ndarray | None]]:
    """The data sets that lie under `dataset`, each with its part of the indices.

    Args:
        dataset: what is indexed.
        wanted: indices into it, int64, shape `[n]`; None stands for each record once.
    """
    if isinstance(dataset, Subset):
        indices = dataset.indices
        if isinstance(indices, Tensor):  # numpy reads those on the CPU alone
            indices = indices.cpu()
        inner = np.asarray(indices, dtype=np.int64).reshape(-1)
        yield from _parts(
            dataset.dataset, inner if wanted is None else inner[_wrapped(wanted, inner)]
        )
    elif isinstance(dataset, ConcatDataset):
        ends = np.asarray(dataset.cumulative_sizes, dtype=np.int64)
        places = None if wanted is None else _wrapped(wanted, dataset)
        owner = None if places is None else np.searchsorted(ends, places, side="right")
        for number, part in enumerate(dataset.datasets):
            if places is None:
                yield from _parts(part, None)
            else:
                start = ends[number - 1] if number else 0
                yield from _parts(part, places[owner == number] - start)
    else:
        yield dataset, wanted


def _wrapped(indices: np.ndarray, dataset: Any) -> np.ndarray:
    """Indices in [0, len(dataset)): −1 is the last record, as it is in any sequence."""
    return indices % max(len(dataset), 1) if hasattr(dataset, "__len__") else indices


def _identity(dataset: Any) -> Any:
    """Equal for data sets that hold the same records."""
    if isinstance(dataset, TensorDataset) and all(
        t.layout is torch.strided for t in dataset.tensors
    ):
        return tuple((t.data_ptr(), t.shape, t.stride(), t.dtype) for t in dataset.tensors)
    return id(dataset)


def _repeats(parts: list[tuple[Any, np.ndarray | None]]) -> int:
    """How many indices into one data set lead to a record that another one led to."""
    if len(parts) == 1 and parts[0][1] is None:
        return 0
    base = parts[0][0]
    wrapped = [
        np.arange(len(base)) if indices is None else _wrapped(indices, base) for _, indices in parts
    ]
    together = np.sort(np.concatenate(wrapped))  # np.unique hashes, which takes far longer
    return int((together[1:] == together[:-1]).sum())


def kind_of_strategy(strategy: type) -> str:
    """The name of Lightning's own strategy that one is, or is made from: Ray's DDP is Lightning's.

    The nearest one: DeepSpeed's is made from DDP's, and is no DDP.
    """
    return next(lightning_kinds(strategy), strategy).__name__
