"""Every refusal in one table: what would break the guarantee in silence, and its cure.

Each `Refusal` looks at plain facts (`Setup`) and returns what it found, or None. They are checked
together before the first step, so that a user sees all of them at once. How each one looks is in
`defend.privacy.checks.setup`.
"""

import dataclasses
from collections.abc import Callable

from torch.nn.modules.instancenorm import _InstanceNorm

from defend.errors import PrivacyError
from defend.privacy.checks import setup as setups
from defend.privacy.checks.setup import Setup


@dataclasses.dataclass(frozen=True)
class Refusal:
    """One row: `expected` … got `found(setup)` … `cure`.

    Attributes:
        hides_rows: whether rows of a batch cannot be told apart, and that is all: one record at a
            time trains.
    """

    name: str
    expected: str
    found: Callable[[Setup], str | None]
    cure: str
    hides_rows: bool = False

    def message(self, setup: Setup) -> str | None:
        """The error text, or None where there is nothing to refuse."""
        found = self.found(setup)
        return None if found is None else f"Expected {self.expected}, got {found}. {self.cure}"


def check(setup: Setup, *, engine: str = "hooks") -> None:
    """Raise one `PrivacyError` that lists every refusal that applies to `setup`.

    Args:
        setup: what is known.
        engine: "hooks", or one that takes one record at a time where it has to ("auto", "record").
    """
    asked = [r for r in REFUSALS if engine == "hooks" or not r.hides_rows]
    messages = [m for m in (refusal.message(setup) for refusal in asked) if m]
    if messages:
        lead = (
            "This run would not be private. "
            if len(messages) == 1
            else (f"This run would not be private, for {len(messages)} reasons:\n")
        )
        raise PrivacyError(lead + "\n".join(messages))


def hidden_rows(setup: Setup) -> str | None:
    """Why rows of a batch cannot be told apart, as far as the set-up shows it; None if they can."""
    messages = (refusal.message(setup) for refusal in REFUSALS if refusal.hides_rows)
    return next((m for m in messages if m), None)


REFUSALS = (
    Refusal(
        "batch_norm",
        "layers that treat each record alone",
        lambda s: setups.layers(s, setups.mixes_records),
        "BatchNorm mixes the records of a batch, also without affine parameters or when partly "
        "frozen. Use GroupNorm for images and LayerNorm for vectors "
        "(`opacus.validators.ModuleValidator.fix(module)` puts a GroupNorm everywhere, which makes "
        "vectors constant). With public statistics, freeze it: requires_grad=False on its "
        "parameters, and eval mode.",
    ),
    Refusal(
        "instance_norm_statistics",
        "layers without running statistics of the data",
        lambda s: setups.layers(
            s, lambda m: isinstance(m, _InstanceNorm) and m.track_running_stats
        ),
        "Running statistics are published without noise. Set track_running_stats=False.",
    ),
    Refusal(
        "fused_layer",
        "layers that have per-record gradients",
        lambda s: setups.layers(s, setups.is_fused),
        "Take engine='record', which trains them as they are; DPLSTM, DPGRU and DPRNN of "
        "opacus.layers in place of recurrent ones; attention with dropout=0.",
        hides_rows=True,
    ),
    Refusal(
        "weight_hooks",
        "weights that are the layer's own parameters, or a parametrization of them",
        lambda s: setups.layers(s, setups.computes_weights),
        "The old weight_norm and spectral_norm compute the weight in a hook, outside the layer's "
        "forward. Take engine='record'; for weight norm also "
        "torch.nn.utils.parametrizations.weight_norm in its place.",
        hides_rows=True,
    ),
    Refusal(
        "complex_weights",
        "trainable weights that are real numbers",
        setups.complex_weights,
        "Keep the real and the imaginary part as two parameters, and put them together in forward: "
        "torch.complex(self.real, self.imag). Or take engine='record'.",
        hides_rows=True,
    ),
    Refusal(
        "compiled",
        "a module that is not compiled",
        setups.compiled_layers,
        "torch.compile hides the layers from the per-record hooks, which would then miss "
        "gradients. Train it uncompiled; compile it afterwards.",
    ),
    Refusal(
        "direct_parameters",
        "parameters inside submodules, under several processes",
        setups.direct_parameters,
        "A parameter directly on the top module makes its whole forward one layer, which "
        "DistributedDataParallel calls in its own way. Put it in a small nn.Module of its own, or "
        "take engine='record'.",
        hides_rows=True,
    ),
    Refusal(
        "nothing_to_train",
        "at least one trainable parameter",
        setups.nothing_to_train,
        "Set requires_grad=True on what should be trained.",
    ),
    Refusal(
        "one_optimizer",
        "exactly one optimizer",
        setups.optimizer_count,
        "Put all trainable parameters into one optimizer; parameter groups may have their own "
        "settings.",
    ),
    Refusal(
        "parameters_left_out",
        "every trainable parameter in the optimizer",
        setups.parameters_left_out,
        "Its gradient would be clipped with the others but never noised and stepped. Add it, or "
        "set requires_grad=False on it.",
    ),
    Refusal(
        "foreign_parameters",
        "only the module's own parameters in the optimizer",
        setups.foreign_parameters,
        "They would be trained without clipping and noise. Make them part of the module.",
    ),
    Refusal(
        "used_optimizer",
        "an optimizer that has not stepped yet, at the start of an account",
        setups.used_optimizer,
        "Its steps may have used the data without noise, and its state may hold raw gradients. "
        "Make a new one; to go on with a private run, pass that run's state.",
    ),
    Refusal(
        "several_closures",
        "an optimizer that computes one gradient a step",
        setups.several_closures,
        "Each evaluation would be a release that is not charged. Use SGD, Adam or the like.",
    ),
    Refusal(
        "parameter_hooks",
        "no gradient hooks on parameters",
        setups.parameter_hooks,
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
        lambda s: f"{s.precision!r}" if s.precision not in setups.PRECISIONS else None,
        "A gradient scaler scales the norms that are clipped, and half-precision weights round "
        "the noise. Use one of the three.",
    ),
    Refusal(
        "strategy",
        "one device or the DDP strategy",
        lambda s: (
            s.strategy if s.strategy is not None and s.strategy not in setups.STRATEGIES else None
        ),
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
        lambda s: setups.some(c.__name__ for c in s.callbacks if setups.is_incompatible(c)),
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
        setups.repeated_records,
        "A record that joins twice counts twice, and ε is for one. Keep each record once; to weigh "
        "records differently, weigh their loss by a function of the record alone.",
    ),
    Refusal(
        "map_style",
        "a data set with a length and an index",
        setups.not_map_style,
        "Poisson sampling has to choose each record on its own. Use a map-style data set.",
    ),
    Refusal(
        "loader_type",
        "a torch.utils.data.DataLoader for training",
        setups.loader_type,
        "Its batches are to be replaced by Poisson-sampled ones. Return a plain DataLoader.",
    ),
    Refusal(
        "batching",
        "a loader that puts batches of batch_size together, in order",
        setups.batching,
        "Batches that are put together elsewhere cannot be Poisson-sampled. Give batch_size=... "
        "alone; it becomes the expected batch size.",
    ),
    Refusal(
        "sampler",
        "shuffle=True or shuffle=False",
        setups.other_sampler,
        "Under DP the batches are Poisson-sampled, and the sampler would be ignored. Remove it; to "
        "train on a part of the data use Subset.",
    ),
    Refusal(
        "batch_beyond_data",
        "an expected batch no larger than the data set",
        setups.batch_beyond_data,
        "The sampling rate would be above 1. Lower batch_size.",
    ),
)
