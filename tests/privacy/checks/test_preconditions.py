"""Every refusal: found, named, and with a cure; and ordinary set-ups pass."""

import time
import warnings
from contextlib import nullcontext

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, XLAStrategy
from torch import nn
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)

from defend import PrivacyError
from defend.privacy.checks.preconditions import REFUSALS, Setup, check
from defend.privacy.checks.setup import kind_of_strategy
from defend.privacy.gradients.per_record import PerRecordGradients

DATA = TensorDataset(torch.rand(20, 3))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(DATA)


class OwnLoader(DataLoader):
    pass


class LearningRateFinder:
    pass


class MyFinder(LearningRateFinder):
    pass


class Direct(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.layer = nn.Linear(3, 3)


class Filter(nn.Module):
    """Multiplies spectra by learned complex numbers."""

    def __init__(self, dtype=torch.cfloat):
        super().__init__()
        self.response = nn.Parameter(torch.ones(2, dtype=dtype))

    def forward(self, x):
        return torch.fft.irfft(torch.fft.rfft(x) * self.response, n=3)


def linear():
    return nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))


def optimizer(*modules, cls=torch.optim.SGD):
    return cls([p for m in modules for p in m.parameters()], lr=0.1)


def hooked(register):
    module = linear()
    getattr(module[0].weight, register)(lambda p: None)
    return module


def norm(affine=False, frozen=True, stored=True, training=False):
    layer = nn.BatchNorm1d(3, affine=affine, track_running_stats=stored).train(training)
    layer.requires_grad_(not frozen)
    return nn.Sequential(nn.Linear(3, 3), layer)


def compiled():
    return nn.Sequential(torch.compile(nn.Linear(3, 3)))


def compiled_in_place():
    module = linear()
    module[1].compile()
    return module


def weight_hooked(wrap):
    module = linear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # weight_norm is deprecated, yet in use
        wrap(module[1])
    return module


def over(dataset):
    return Setup(loader=DataLoader(dataset, 2))


def with_optimizers(make):
    module = linear()
    return Setup(module=module, optimizers=make(module))


def stepped():
    module = linear()
    used = optimizer(module, cls=torch.optim.Adam)
    module(torch.rand(2, 3)).sum().backward()
    used.step()
    return Setup(module=module, optimizers=(used,), resumed=False)


CASES = [
    ("batch_norm", Setup(module=nn.Sequential(nn.BatchNorm2d(3))), "BatchNorm2d at `0`.*GroupNorm"),
    ("batch_norm", Setup(module=norm(training=True)), "BatchNorm1d at `1`.*ModuleValidator.fix"),
    ("batch_norm", Setup(module=norm(affine=True, frozen=False)), "at `1`.*requires_grad=False"),
    ("batch_norm", Setup(module=norm(stored=False)), "BatchNorm1d at `1`"),
    ("compiled", Setup(module=compiled()), "not compiled, got OptimizedModule at `0`"),
    ("compiled", Setup(compiled=True), "got a compiled module"),
    ("compiled", Setup(module=compiled_in_place()), "not compiled, got Linear at `1`"),
    (
        "weight_hooks",
        Setup(module=weight_hooked(nn.utils.weight_norm)),
        "Linear at `1`.*torch.nn.utils.parametrizations.weight_norm",
    ),
    ("weight_hooks", Setup(module=weight_hooked(nn.utils.spectral_norm)), "Linear at `1`"),
    (
        "complex_weights",
        Setup(module=nn.Sequential(nn.Linear(3, 3), Filter())),
        r"real numbers, got `1.response` in torch.complex64. .*torch.complex\(self.real, self.im",
    ),
    ("complex_weights", Setup(module=Filter(torch.cdouble)), "got `response` in torch.complex128"),
    (
        "repeated_records",
        over(Subset(DATA, [0, 1, 1, 2])),
        "each record has one index, got one with repeated indices: 1 lead",
    ),
    ("batch_norm", Setup(module=nn.SyncBatchNorm(3)), "SyncBatchNorm at `.`"),
    (
        "instance_norm_statistics",
        Setup(module=nn.Sequential(nn.InstanceNorm2d(3, affine=True, track_running_stats=True))),
        "InstanceNorm2d at `0`.*track_running_stats=False",
    ),
    ("fused_layer", Setup(module=nn.Sequential(nn.LSTM(3, 3))), "LSTM at `0`.*opacus.layers"),
    (
        "fused_layer",
        Setup(module=nn.Sequential(nn.MultiheadAttention(4, 2, dropout=0.1))),
        "MultiheadAttention at `0`",
    ),
    (
        "direct_parameters",
        Setup(module=Direct(), world_size=2),
        "parameters inside submodules, under several processes, got `scale`",
    ),
    (
        "nothing_to_train",
        Setup(module=linear().requires_grad_(False)),
        "at least one trainable parameter, got none",
    ),
    (
        "one_optimizer",
        with_optimizers(lambda m: (optimizer(m[0]), optimizer(m[1]))),
        "exactly one optimizer, got 2",
    ),
    ("one_optimizer", with_optimizers(lambda m: ()), "exactly one optimizer, got 0"),
    (
        "parameters_left_out",
        with_optimizers(lambda m: (optimizer(m[0]),)),
        "every trainable parameter in the optimizer, got `1.weight` left out, `1.bias` left out",
    ),
    (
        "foreign_parameters",
        with_optimizers(lambda m: (optimizer(m, nn.Linear(2, 2)),)),
        "got 2 that are not the module's",
    ),
    (
        "used_optimizer",
        stepped(),
        "not stepped yet, at the start of an account, got a Adam that has",
    ),
    (
        "several_closures",
        with_optimizers(lambda m: (optimizer(m, cls=torch.optim.LBFGS),)),
        "one gradient a step, got LBFGS",
    ),
    ("parameter_hooks", Setup(module=hooked("register_hook")), "got one on `0.weight`"),
    (
        "parameter_hooks",
        Setup(module=hooked("register_post_accumulate_grad_hook")),
        "optimizer in backward",
    ),
    ("own_backward", Setup(overrides_backward=True), "got a module that overrides it"),
    (
        "gradient_accumulation",
        Setup(accumulate_grad_batches=4),
        "accumulate_grad_batches=1, got 4.*Raise the loader's batch_size",
    ),
    ("gradient_clipping", Setup(gradient_clip_val=1.0), "gradient_clip_val=None, got 1.0"),
    ("precision", Setup(precision="16-mixed"), "got '16-mixed'.*gradient scaler"),
    ("precision", Setup(precision="bf16-true"), "got 'bf16-true'"),
    ("strategy", Setup(strategy="FSDPStrategy"), "got FSDPStrategy.*strategy='ddp'"),
    ("strategy", Setup(strategy="DeepSpeedStrategy"), "got DeepSpeedStrategy"),
    (
        "manual_optimization",
        Setup(automatic_optimization=False),
        "automatic optimization, got automatic_optimization=False",
    ),
    ("dataloader_iter", Setup(takes_dataloader_iter=True), "takes a batch, got one that takes"),
    ("callbacks", Setup(callbacks=(LearningRateFinder,)), "got LearningRateFinder.*raw steps"),
    ("callbacks", Setup(callbacks=(MyFinder,)), "got MyFinder"),
    ("reloading", Setup(reloads_data=True), "got reload_dataloaders_every_n_epochs > 0"),
    ("overfit_batches", Setup(overfits_batches=True), "overfit_batches=0, got overfit_batches"),
    ("one_loader", Setup(loaders=2), "one training loader, got 2.*one data set"),
    (
        "map_style",
        Setup(loader=DataLoader(Stream(), batch_size=4)),
        "got the iterable data set Stream",
    ),
    ("loader_type", Setup(loader=[[torch.rand(3, 3)]]), "DataLoader for training, got a .*list"),
    ("loader_type", Setup(loader=OwnLoader(DATA)), "got a .*OwnLoader"),
    ("batching", Setup(loader=DataLoader(DATA, batch_size=None)), "got batch_size=None"),
    (
        "batching",
        Setup(loader=DataLoader(DATA, batch_sampler=list(BatchSampler(range(20), 4, False)))),
        "got the batch sampler list",
    ),
    (
        "batching",
        Setup(loader=DataLoader(DATA, batch_size=4, num_workers=1, in_order=False)),
        "got in_order=False",
    ),
    (
        "sampler",
        Setup(loader=DataLoader(DATA, 4, sampler=WeightedRandomSampler([1.0] * 20, 20))),
        "shuffle=True or shuffle=False, got a WeightedRandomSampler",
    ),
    (
        "sampler",
        Setup(loader=DataLoader(DATA, 4, sampler=RandomSampler(DATA, replacement=True))),
        r"got RandomSampler\(replacement=True, num_samples=20\)",
    ),
    (
        "batch_beyond_data",
        Setup(loader=DataLoader(DATA, 12), world_size=2),
        "an expected batch of 24 from 20 records",
    ),
]


@pytest.mark.parametrize(("name", "setup", "message"), CASES)
def test_is_refused_with_a_cure(name, setup, message):
    with pytest.raises(PrivacyError, match=f"(?s)This run would not be private.*{message}"):
        check(setup)
    found = [r.name for r in REFUSALS if r.message(setup)]
    assert found == [name]  # this one and no other


def test_every_row_of_the_table_is_tested():
    assert {name for name, _, _ in CASES} == {r.name for r in REFUSALS}


def test_every_row_names_a_cure():
    for refusal in REFUSALS:
        assert refusal.cure.endswith(".")
        assert len(refusal.cure) > 15


def test_several_reasons_come_in_one_error():
    setup = Setup(accumulate_grad_batches=2, gradient_clip_val=1.0, precision="16-mixed")
    with pytest.raises(PrivacyError, match="for 3 reasons"):
        check(setup)


@pytest.mark.parametrize(
    "module",
    [
        linear(),
        nn.Linear(3, 2),
        Direct(),
        nn.MultiheadAttention(4, 2),
        norm(),
        norm(affine=True),
        nn.Sequential(nn.Linear(3, 3), Filter().requires_grad_(False)),
        Filter(torch.float),
        nn.Sequential(nn.GroupNorm(1, 3), nn.LayerNorm(3), nn.InstanceNorm2d(3)),
        nn.Sequential(nn.Conv2d(3, 3, 1), nn.Dropout(), nn.Embedding(3, 3)),
    ],
)
def test_ordinary_modules_pass(module):
    check(Setup(module=module, optimizers=(optimizer(module),)))


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(DATA, 4),
        DataLoader(DATA, 4, shuffle=True, drop_last=True),
        DataLoader(DATA, 20),
        DataLoader(Subset(DATA, range(10)), 4, shuffle=True),
        DataLoader(DATA, 4, sampler=SequentialSampler(DATA)),
        DataLoader(DATA, 4, sampler=DistributedSampler(DATA, 2, 0)),
    ],
)
def test_ordinary_loaders_pass(loader):
    check(Setup(loader=loader))


TWIN = TensorDataset(*DATA.tensors)
OTHER = TensorDataset(torch.rand(20, 3))
BOTH = ConcatDataset([DATA, OTHER])
LISTED = list(range(20))  # a data set of its own kind


class NoLength(Dataset):
    def __getitem__(self, index):
        return index


def rows_behind(dataset):
    """Slow reference: what each index leads to, one by one."""
    return [tuple(map(float, dataset[i][0])) for i in range(len(dataset))]


@pytest.mark.parametrize(
    ("dataset", "twice"),
    [
        (Subset(DATA, [19, -1]), 1),
        (Subset(DATA, range(-3, 20)), 3),
        (Subset(DATA, torch.tensor([0, 5, 5, 5])), 2),
        (Subset(Subset(DATA, [3, 4, 5]), [0, 2, -1]), 1),
        (DATA + DATA, 20),
        (DATA + TWIN, 20),
        (ConcatDataset([DATA, Subset(DATA, [1, 2])]), 2),
        (ConcatDataset([Subset(DATA, range(10)), OTHER, Subset(TWIN, [9, 10])]), 1),
        (ConcatDataset([Subset(DATA, [0, 1]), Subset(Subset(DATA, [1, 2]), [0])]), 1),
        (Subset(DATA + DATA, range(30)), 10),
        (Subset(BOTH, [0, 20, -20, -40]), 2),
        (ConcatDataset([BOTH, Subset(BOTH, [25])]), 1),
    ],
)
def test_repeated_records_are_found_through_any_nesting(dataset, twice):
    rows = rows_behind(dataset)
    assert len(rows) - len(set(rows)) == twice
    with pytest.raises(
        PrivacyError, match=f"repeated indices: {twice} lead.*Keep each record once"
    ):
        check(over(dataset))


@pytest.mark.parametrize(
    "dataset",
    [
        BOTH,
        Subset(DATA, [0, 1, -1]),
        Subset(BOTH, [0, 20, -1, -21]),
        Subset(DATA + DATA, range(20)),
        ConcatDataset([Subset(DATA, range(10)), Subset(TWIN, range(10, 20))]),
        ConcatDataset([LISTED, list(LISTED)]),
        ConcatDataset([TensorDataset(DATA.tensors[0][:10]), TensorDataset(DATA.tensors[0][10:])]),
        ConcatDataset([DATA, Subset(DATA, [])]),
        Subset(NoLength(), [5, 7]),
        TensorDataset(torch.eye(4).to_sparse()),
    ],
)
def test_records_with_one_index_each_pass(dataset):
    check(over(dataset))


def test_repeats_are_found_among_a_million_indices():
    large = TensorDataset(torch.zeros(1_000_000))
    start = time.perf_counter()
    with pytest.raises(PrivacyError, match="repeated indices: 2 lead"):
        check(over(ConcatDataset([Subset(large, list(range(1_000_000))), Subset(large, [0, -1])])))
    assert time.perf_counter() - start < 5  # on a busy machine; a few tenths on an idle one


def test_indices_that_are_no_numbers_are_refused():
    with pytest.raises(PrivacyError, match="got a Subset whose indices are not numbers"):
        check(over(Subset({"a": 1, "b": 2}, ["a", "b"])))


@pytest.mark.parametrize("wrap", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_weights_from_hooks_pass_where_nothing_is_trained(wrap):
    module = weight_hooked(wrap)
    module[1].requires_grad_(False)
    check(Setup(module=module))


def test_the_parametrization_that_replaces_weight_hooks_gives_per_record_gradients():
    module = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), nn.Tanh())
    check(Setup(module=module))
    rows = DATA.tensors[0][:4]

    def alone(row):
        return torch.autograd.grad(module(row[None]).square().sum(), list(module.parameters()))

    expected = [torch.stack(g) for g in zip(*map(alone, rows), strict=True)]
    gradients = PerRecordGradients(module, loss_reduction="sum")
    module(rows).square().sum().backward()
    torch.testing.assert_close(gradients.read(4), expected)


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed"])
def test_sound_precisions_pass(precision):
    check(Setup(precision=precision))


class Own(DDPStrategy):
    """As Ray's, which sets up its processes in another way."""


class Sharded(DeepSpeedStrategy):
    pass


@pytest.mark.parametrize(
    ("strategy", "kind", "accepted"),
    [
        (DDPStrategy, "DDPStrategy", True),
        (Own, "DDPStrategy", True),
        (Sharded, "DeepSpeedStrategy", False),
        (XLAStrategy, "XLAStrategy", False),
        (dict, "dict", False),
    ],
)
def test_a_strategy_is_known_by_what_it_is_made_from(strategy, kind, accepted):
    assert kind_of_strategy(strategy) == kind
    with nullcontext() if accepted else pytest.raises(PrivacyError, match=f"got {kind}"):
        check(Setup(strategy=kind))
