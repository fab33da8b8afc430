"""Every refusal in one table: what would break the guarantee in silence, and its cure.

Each `Refusal` looks at plain facts (`Setup`) and returns what it found, or None. They are checked
together before the first step, so that a user sees all of them at once.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
)

from defend.errors import PrivacyError


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


@dataclasses.dataclass(frozen=True)
class Refusal:
    """One row: `expected` … got `found(setup)` … `cure`."""

    name: str
    expected: str
    found: Callable[[Setup], str | None]
    cure: str

    def message(self, setup: Setup) -> str | None:
        """The error text, or None where there is nothing to refuse."""
        found = self.found(setup)
        return None if found is None else f"Expected {self.expected}, got {found}. {self.cure}"


def check(setup: Setup) -> None:
    """Raise one `PrivacyError` that lists every refusal that applies to `setup`."""
    messages = [m for m in (refusal.message(setup) for refusal in REFUSALS) if m]
    if messages:
        lead = (
            "This run would not be private. "
            if len(messages) == 1
            else (f"This run would not be private, for {len(messages)} reasons:\n")
        )
        raise PrivacyError(lead + "\n".join(messages))


# --- what each row looks for -------------------------------------------------------------------


def _layers(setup: Setup, wanted: Callable[[nn.Module], bool]) -> str | None:
    if setup.module is None:
        return None
    names = [
        f"{type(m).__name__} at `{n or '.'}`" for n, m in setup.module.named_modules() if wanted(m)
    ]
    return _some(names)


def _some(names: Iterable[str], most: int = 5) -> str | None:
    listed = list(names)
    if not listed:
        return None
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more


def _trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in module.named_parameters() if p.requires_grad}


def _mixes_records(layer: nn.Module) -> bool:
    """BatchNorm, unless it is frozen: in eval mode, on stored statistics, without training."""
    if not isinstance(layer, _BatchNorm):
        return False
    frozen = not layer.training and layer.running_mean is not None
    return not frozen or any(p.requires_grad for p in layer.parameters())


def _compiled(setup: Setup) -> str | None:
    if setup.compiled:
        return "a compiled module"
    return _layers(setup, lambda m: type(m).__name__ == "OptimizedModule")


def _repeated(setup: Setup) -> str | None:
    """Indices of one data set that lead to the same record."""

    def look(dataset: Any) -> str | None:
        if isinstance(dataset, Subset):
            indices = list(dataset.indices)
            twice = len(indices) - len({int(i) for i in indices})
            return f"a Subset with {twice} repeated indices" if twice else look(dataset.dataset)
        if isinstance(dataset, ConcatDataset):
            parts = dataset.datasets
            if len({id(part) for part in parts}) < len(parts):
                return "a ConcatDataset that holds one data set twice"
            return next((found for found in map(look, parts) if found), None)
        return None

    return look(getattr(setup.loader, "dataset", None))


def _nothing_to_train(setup: Setup) -> str | None:
    return "none" if setup.module is not None and not _trainable(setup.module) else None


def _direct_parameters(setup: Setup) -> str | None:
    if setup.module is None or setup.world_size == 1:
        return None
    if next(setup.module.children(), None) is None:
        return None
    direct = setup.module.named_parameters(recurse=False)
    return _some(f"`{n}`" for n, p in direct if p.requires_grad)


def _is_fused(layer: nn.Module) -> bool:
    """Layers that compute several steps, or draw dropout, inside one call."""
    if not type(layer).__module__.startswith("torch."):
        return False
    if isinstance(layer, nn.MultiheadAttention):
        return layer.dropout > 0
    return isinstance(layer, nn.RNNBase)


def _optimizer_count(setup: Setup) -> str | None:
    if setup.optimizers is None or len(setup.optimizers) == 1:
        return None
    return str(len(setup.optimizers))


def _left_out(setup: Setup) -> str | None:
    if setup.module is None or not setup.optimizers:
        return None
    held = {id(p) for o in setup.optimizers for g in o.param_groups for p in g["params"]}
    return _some(
        f"`{n}` left out" for n, p in _trainable(setup.module).items() if id(p) not in held
    )


def _foreign(setup: Setup) -> str | None:
    if setup.module is None or setup.optimizers is None:
        return None
    own = {id(p) for p in setup.module.parameters()}
    held = [p for o in setup.optimizers for g in o.param_groups for p in g["params"]]
    count = sum(p.requires_grad and id(p) not in own for p in held)
    return f"{count} that are not the module's" if count else None


def _used_optimizer(setup: Setup) -> str | None:
    if setup.resumed:
        return None
    return _some(f"a {type(o).__name__} that has" for o in setup.optimizers or () if o.state)


def _parameter_hooks(setup: Setup) -> str | None:
    if setup.module is None:
        return None
    return _some(
        f"one on `{n}`"
        for n, p in _trainable(setup.module).items()
        if getattr(p, "_post_accumulate_grad_hooks", None) or getattr(p, "_backward_hooks", None)
    )


def _many_closures(setup: Setup) -> str | None:
    return _some(type(o).__name__ for o in setup.optimizers or () if type(o).__name__ == "LBFGS")


_STRATEGIES = {"SingleDeviceStrategy", "DDPStrategy"}
_PRECISIONS = {"32-true", "32", 32, "64-true", "64", 64, "bf16-mixed"}
_SPOILERS = {
    "LearningRateFinder",
    "BatchSizeFinder",
    "GradientAccumulationScheduler",
    "StochasticWeightAveraging",
    "ModelPruning",
    "BackboneFinetuning",
    "BaseFinetuning",
}


def _is_spoiler(callback: type) -> bool:
    return any(base.__name__ in _SPOILERS for base in callback.__mro__)


def _is_plain_loader(loader: Any) -> bool:
    return type(loader) is DataLoader


def _map_style(setup: Setup) -> str | None:
    if isinstance(getattr(setup.loader, "dataset", None), IterableDataset):
        return f"the iterable data set {type(setup.loader.dataset).__name__}"
    return None


def _loader_type(setup: Setup) -> str | None:
    if setup.loader is None or _is_plain_loader(setup.loader):
        return None
    return f"a {type(setup.loader).__module__}.{type(setup.loader).__qualname__}"


def _batching(setup: Setup) -> str | None:
    loader = setup.loader
    if not _is_plain_loader(loader) or _map_style(setup):
        return None
    if loader.batch_sampler is None:
        return "batch_size=None"
    if type(loader.batch_sampler) is not BatchSampler:
        return f"the batch sampler {type(loader.batch_sampler).__name__}"
    if not getattr(loader, "in_order", True):
        return "in_order=False"
    return None


def _sampler(setup: Setup) -> str | None:
    loader = setup.loader
    if not _is_plain_loader(loader) or _map_style(setup):
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


def _batch_beyond_data(setup: Setup) -> str | None:
    if not _is_plain_loader(setup.loader) or _map_style(setup) or _batching(setup):
        return None
    expected, size = setup.loader.batch_size * setup.world_size, len(setup.loader.dataset)
    return f"an expected batch of {expected} from {size} records" if expected > size else None


REFUSALS = (
    Refusal(
        "batch_norm",
        "layers that treat each record alone",
        lambda s: _layers(s, _mixes_records),
        "BatchNorm mixes the records of a batch, also without affine parameters or when partly "
        "frozen. Use GroupNorm, or `opacus.validators.ModuleValidator.fix(module)`. With public "
        "statistics, freeze it: requires_grad=False on its parameters, and eval mode.",
    ),
    Refusal(
        "instance_norm_statistics",
        "layers without running statistics of the data",
        lambda s: _layers(s, lambda m: isinstance(m, _InstanceNorm) and m.track_running_stats),
        "Running statistics are published without noise. Set track_running_stats=False.",
    ),
    Refusal(
        "fused_layer",
        "layers that have per-record gradients",
        lambda s: _layers(s, _is_fused),
        "Use the drop-in layers of opacus.layers, or "
        "`opacus.validators.ModuleValidator.fix(module)`; attention also works with dropout=0.",
    ),
    Refusal(
        "compiled",
        "a module that is not compiled",
        _compiled,
        "torch.compile hides the layers from the per-record hooks, which would then miss "
        "gradients. Train it uncompiled; compile it afterwards.",
    ),
    Refusal(
        "direct_parameters",
        "parameters inside submodules, under several processes",
        _direct_parameters,
        "A parameter directly on the top module makes its whole forward one layer, which "
        "DistributedDataParallel calls in its own way. Put it in a small nn.Module of its own.",
    ),
    Refusal(
        "nothing_to_train",
        "at least one trainable parameter",
        _nothing_to_train,
        "Set requires_grad=True on what should be trained.",
    ),
    Refusal(
        "one_optimizer",
        "exactly one optimizer",
        _optimizer_count,
        "Put all trainable parameters into one optimizer; parameter groups may have their own "
        "settings.",
    ),
    Refusal(
        "parameters_left_out",
        "every trainable parameter in the optimizer",
        _left_out,
        "Its gradient would be clipped with the others but never noised and stepped. Add it, or "
        "set requires_grad=False on it.",
    ),
    Refusal(
        "foreign_parameters",
        "only the module's own parameters in the optimizer",
        _foreign,
        "They would be trained without clipping and noise. Make them part of the module.",
    ),
    Refusal(
        "used_optimizer",
        "an optimizer that has not stepped yet, at the start of an account",
        _used_optimizer,
        "Its steps may have used the data without noise, and its state may hold raw gradients. "
        "Make a new one; to go on with a private run, pass that run's state.",
    ),
    Refusal(
        "several_closures",
        "an optimizer that computes one gradient a step",
        _many_closures,
        "Each evaluation would be a release that is not charged. Use SGD, Adam or the like.",
    ),
    Refusal(
        "parameter_hooks",
        "no gradient hooks on parameters",
        _parameter_hooks,
        "They see gradients before clipping and noise, and may step on them (optimizer in "
        "backward). Remove them.",
    ),
    Refusal(
        "own_backward",
        "Lightning's own `backward`",
        lambda s: "a module that overrides it" if s.overrides_backward else None,
        "It sees gradients before clipping and noise. Remove the override.",
    ),
    Refusal(
        "gradient_accumulation",
        "accumulate_grad_batches=1",
        lambda s: f"{s.accumulate_grad_batches}" if s.accumulate_grad_batches != 1 else None,
        "Raise the loader's batch_size instead: large batches are split into chunks that fit "
        "(chunk_size=...), at the same memory.",
    ),
    Refusal(
        "gradient_clipping",
        "gradient_clip_val=None",
        lambda s: f"{s.gradient_clip_val}" if s.gradient_clip_val else None,
        "Each record's gradient is clipped to max_grad_norm already; a second clip would cut the "
        "noise. Remove it from the Trainer.",
    ),
    Refusal(
        "precision",
        "precision 32-true, 64-true or bf16-mixed",
        lambda s: f"{s.precision!r}" if s.precision not in _PRECISIONS else None,
        "A gradient scaler scales the norms that are clipped, and half-precision weights round "
        "the noise. Use one of the three.",
    ),
    Refusal(
        "strategy",
        "one device or the DDP strategy",
        lambda s: s.strategy if s.strategy is not None and s.strategy not in _STRATEGIES else None,
        "FSDP, DeepSpeed and the like shard gradients before they can be clipped per record. Use "
        "strategy='ddp'.",
    ),
    Refusal(
        "manual_optimization",
        "automatic optimization",
        lambda s: "automatic_optimization=False" if not s.automatic_optimization else None,
        "With manual optimization a step may be taken outside the mechanism. Return the loss from "
        "`training_step` and let Lightning step.",
    ),
    Refusal(
        "dataloader_iter",
        "a `training_step` that takes a batch",
        lambda s: "one that takes `dataloader_iter`" if s.takes_dataloader_iter else None,
        "It could consume batches that are never charged. Take `batch` instead.",
    ),
    Refusal(
        "callbacks",
        "no callback that steps, sums or rewires behind the mechanism",
        lambda s: _some(c.__name__ for c in s.callbacks if _is_spoiler(c)),
        "LearningRateFinder and BatchSizeFinder take raw steps on the data, others change "
        "gradients or trainable parameters midway. Remove it; tune on public data.",
    ),
    Refusal(
        "reloading",
        "one data set for the whole fit",
        lambda s: "reload_dataloaders_every_n_epochs > 0" if s.reloads_data else None,
        "The sampling rate is fixed when training starts. Set it to 0.",
    ),
    Refusal(
        "overfit_batches",
        "overfit_batches=0",
        lambda s: "overfit_batches > 0" if s.overfits_batches else None,
        "Poisson sampling draws from the whole data set. Pass a smaller data set instead.",
    ),
    Refusal(
        "one_loader",
        "one training loader",
        lambda s: str(s.loaders) if s.loaders is not None and s.loaders != 1 else None,
        "A record in two loaders would be counted twice. Use one loader over one data set in which "
        "each record has one index.",
    ),
    Refusal(
        "repeated_records",
        "a data set in which each record has one index",
        _repeated,
        "A record that joins twice counts twice, and ε is for one. Keep each record once; to weigh "
        "records differently, weigh their loss by a function of the record alone.",
    ),
    Refusal(
        "map_style",
        "a data set with a length and an index",
        _map_style,
        "Poisson sampling has to choose each record on its own. Use a map-style data set.",
    ),
    Refusal(
        "loader_type",
        "a torch.utils.data.DataLoader for training",
        _loader_type,
        "Its batches are to be replaced by Poisson-sampled ones. Return a plain DataLoader.",
    ),
    Refusal(
        "batching",
        "a loader that puts batches of batch_size together, in order",
        _batching,
        "Batches that are put together elsewhere cannot be Poisson-sampled. Give batch_size=... "
        "alone; it becomes the expected batch size.",
    ),
    Refusal(
        "sampler",
        "shuffle=True or shuffle=False",
        _sampler,
        "Under DP the batches are Poisson-sampled, and the sampler would be ignored. Remove it; to "
        "train on a part of the data use Subset.",
    ),
    Refusal(
        "batch_beyond_data",
        "an expected batch no larger than the data set",
        _batch_beyond_data,
        "The sampling rate would be above 1. Lower batch_size.",
    ),
)
