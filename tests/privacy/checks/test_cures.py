"""What each error tells to do works: the cure trains, and takes the step that it should.

For each refusal of the table a set-up that meets it, and the same one cured. The cured one takes a
step without noise on all records, which is compared with a loop over records.
"""

import contextlib
import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import LearningRateFinder
from opacus.layers import DPLSTM
from opacus.validators import ModuleValidator
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    IterableDataset,
    SequentialSampler,
    Subset,
    WeightedRandomSampler,
)

from defend import DifferentialPrivacy, PrivacyError
from defend.privacy.checks.preconditions import REFUSALS, Setup, check
from tests.helpers import data, trainer
from tests.reference.dpsgd import clipped_sum

C, RECORDS = 0.05, 12


class Net(pl.LightningModule):
    """Layers on vectors of eight, or on what `shape` makes of them."""

    def __init__(self, *layers, shape=(8,)):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(*layers, nn.LazyLinear(3)) if layers else nn.Linear(8, 3)
        self.shape = shape
        self(torch.zeros(2, 8))

    def forward(self, x):
        return self.net(x.view(-1, *self.shape))

    def loss(self, x, y):
        return F.cross_entropy(self(x), y)

    def training_step(self, batch, batch_idx):
        return self.loss(*batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.trained(), lr=1.0)

    def trained(self):
        return [p for p in self.parameters() if p.requires_grad]


class First(nn.Module):
    """The first of a layer's outputs, of the last position."""

    def __init__(self, layer, self_attention=False):
        super().__init__()
        self.layer, self.inputs = layer, 3 if self_attention else 1

    def forward(self, x):
        return self.layer(*[x] * self.inputs)[0][:, -1]


def sequences(layer, **settings):
    return Net(First(layer, **settings), shape=(4, 2))


def with_(make=Net, **changes):
    """The module with methods of its own."""
    module = make()
    for name, value in changes.items():
        setattr(module, name, value.__get__(module))
    return module


def frozen_norm():
    module = Net(nn.Linear(8, 8), nn.BatchNorm1d(8))
    module.net[1].eval().requires_grad_(False)
    return module


def unfrozen(trained):
    module = with_(configure_optimizers=lambda self: torch.optim.SGD(self.parameters(), lr=1.0))
    module.net.requires_grad_(trained)
    return module


def hooked(keep):
    module = Net()
    handle = module.net.weight.register_hook(lambda g: g * 1.0)
    if not keep:
        handle.remove()
    return module


def stepped(again):
    module, batch = Net(), data(RECORDS).tensors
    module.optimizer = torch.optim.Adam(module.parameters(), lr=0.0)
    module.loss(*batch).backward()
    module.optimizer.step()
    if again:
        module.optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    return with_(lambda: module, configure_optimizers=lambda self: self.optimizer)


def foreign(inside):
    module, extra = Net(), nn.Parameter(torch.zeros(3))
    module.extra = extra if inside else [extra]
    groups = lambda self: torch.optim.SGD([*self.net.parameters(), extra], lr=1.0)  # noqa: E731
    return with_(lambda: module, configure_optimizers=groups)


class Groups(Net):
    def configure_optimizers(self):
        groups = [{"params": [p], "lr": 1.0} for p in self.parameters()]
        return torch.optim.SGD(groups, lr=1.0)


class Lbfgs(Net):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters())


class HalfLeftOut(Net):
    def configure_optimizers(self):
        return torch.optim.SGD([self.net.weight], lr=1.0)


def bias_frozen():
    module = HalfLeftOut()
    module.net.bias.requires_grad_(False)
    return module


class OwnBackward(Net):
    def backward(self, loss):
        loss.backward()


class Manual(Net):
    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.optimizers().step()


class TakesIterator(Net):
    def training_step(self, dataloader_iter):
        return self.loss(*next(dataloader_iter)[0])


class Stream(IterableDataset):
    def __iter__(self):
        return iter(data(RECORDS))


class OwnLoader(DataLoader):
    pass


class Complex(nn.Module):
    def __init__(self, kind):
        super().__init__()
        parts = torch.rand(8), torch.rand(8)
        self.whole = nn.Parameter(torch.complex(*parts)) if kind == "whole" else None
        self.real, self.imag = map(nn.Parameter, parts if kind == "parts" else (None, None))

    def forward(self, x):
        weight = torch.complex(self.real, self.imag) if self.whole is None else self.whole
        return torch.fft.ifft(weight * torch.fft.fft(x)).real


@dataclasses.dataclass
class Run:
    """What may be given; the rest is ordinary."""

    module: Callable[[], Any] = Net
    loader: Callable[[], Any] = lambda: DataLoader(data(RECORDS), batch_size=RECORDS)
    engine: str = "auto"
    settings: dict = dataclasses.field(default_factory=dict)

    def fit(self):
        """Returns the module before and after, and the callback."""
        module = self.module()
        callback = DifferentialPrivacy(
            delta=1e-3, max_grad_norm=C, noise_multiplier=0.0, insecure_seed=1, ledger=False,
            engine=self.engine,
        )  # fmt: skip
        callbacks = [callback, *self.settings.get("callbacks", [])]
        run = trainer(**{"max_epochs": 1, **self.settings, "callbacks": callbacks})
        with contextlib.suppress(RuntimeError):  # of PyTorch's old weight_norm
            before = copy.deepcopy(module)
        run.fit(module, self.loader())
        return before, module, callback


def conv_norm(norm):
    return Net(nn.Conv2d(2, 4, 1), norm, nn.Flatten(), shape=(2, 2, 2))


def sampled(**settings):
    records = data(RECORDS)
    return DataLoader(records, **{"batch_size": RECORDS, **settings})


HOOKS = {"engine": "hooks"}
RECORD = {"engine": "record"}
HALVES = [Subset(data(RECORDS), range(6)), Subset(data(RECORDS), range(6, 12))]
# refusal → what meets it, and the cures that its text names
CURES: dict[str, tuple[Run, list[Run]]] = {
    "batch_norm": (
        Run(lambda: Net(nn.Linear(8, 8), nn.BatchNorm1d(8))),
        [
            Run(lambda: Net(nn.Linear(8, 8), nn.LayerNorm(8))),
            Run(lambda: ModuleValidator.fix(conv_norm(nn.BatchNorm2d(4)))),
            Run(frozen_norm),
        ],
    ),
    "instance_norm_statistics": (
        Run(lambda: conv_norm(nn.InstanceNorm2d(4, track_running_stats=True))),
        [Run(lambda: conv_norm(nn.InstanceNorm2d(4, affine=True)))],
    ),
    "fused_layer": (
        Run(lambda: sequences(nn.LSTM(2, 4, batch_first=True)), **HOOKS),
        [
            Run(lambda: sequences(nn.LSTM(2, 4, batch_first=True)), **RECORD),
            Run(lambda: sequences(DPLSTM(2, 4, batch_first=True)), **HOOKS),
            Run(
                lambda: sequences(
                    nn.MultiheadAttention(2, 1, dropout=0.0, batch_first=True), self_attention=True
                ),
                **HOOKS,
            ),
        ],
    ),
    "weight_hooks": (
        Run(lambda: Net(nn.utils.weight_norm(nn.Linear(8, 8))), **HOOKS),
        [
            Run(lambda: Net(parametrizations.weight_norm(nn.Linear(8, 8))), **HOOKS),
            Run(lambda: Net(parametrizations.spectral_norm(nn.Linear(8, 8))), **RECORD),
        ],
    ),
    "complex_weights": (
        Run(lambda: Net(Complex("whole")), **HOOKS),
        [Run(lambda: Net(Complex("parts")), **HOOKS), Run(lambda: Net(Complex("whole")))],
    ),
    "compiled": (
        Run(lambda: Net(torch.compile(nn.Linear(8, 8), backend="eager"))),
        [Run(lambda: Net(nn.Linear(8, 8)))],
    ),
    "nothing_to_train": (Run(lambda: unfrozen(False)), [Run(lambda: unfrozen(True))]),
    "parameters_left_out": (Run(HalfLeftOut), [Run(Net), Run(bias_frozen)]),
    "foreign_parameters": (Run(lambda: foreign(False)), [Run(lambda: foreign(True))]),
    "used_optimizer": (Run(lambda: stepped(False)), [Run(lambda: stepped(True))]),
    "several_closures": (Run(Lbfgs), [Run(Net)]),
    "parameter_hooks": (Run(lambda: hooked(True)), [Run(lambda: hooked(False))]),
    "own_backward": (Run(OwnBackward), [Run(Net)]),
    "gradient_accumulation": (
        Run(loader=lambda: sampled(batch_size=6), settings={"accumulate_grad_batches": 2}),
        [Run(loader=sampled)],
    ),
    "gradient_clipping": (Run(settings={"gradient_clip_val": 1.0}), [Run()]),
    "precision": (
        Run(settings={"precision": "16-true"}),
        [Run(settings={"precision": p}) for p in ("32-true", "bf16-mixed")],
    ),
    "manual_optimization": (Run(Manual), [Run(Net)]),
    "dataloader_iter": (Run(TakesIterator), [Run(Net)]),
    "callbacks": (Run(settings={"callbacks": [LearningRateFinder()]}), [Run()]),
    "reloading": (
        Run(settings={"reload_dataloaders_every_n_epochs": 1}),
        [Run(settings={"reload_dataloaders_every_n_epochs": 0})],
    ),
    "overfit_batches": (
        Run(loader=lambda: sampled(batch_size=4), settings={"overfit_batches": 1}),
        [Run(loader=lambda: DataLoader(Subset(data(RECORDS), range(4)), batch_size=4))],
    ),
    "one_loader": (
        Run(loader=lambda: [DataLoader(half, batch_size=6) for half in HALVES]),
        [Run(loader=lambda: DataLoader(ConcatDataset(HALVES), batch_size=RECORDS))],
    ),
    "repeated_records": (
        Run(loader=lambda: DataLoader(Subset(data(RECORDS), [0, 1, 1]), batch_size=3)),
        [Run(loader=lambda: DataLoader(Subset(data(RECORDS), [0, 1, 2]), batch_size=3))],
    ),
    "map_style": (
        Run(loader=lambda: DataLoader(Stream(), batch_size=6)),
        [Run(loader=lambda: DataLoader(list(Stream()), batch_size=RECORDS))],
    ),
    "loader_type": (
        Run(loader=lambda: OwnLoader(data(RECORDS), batch_size=RECORDS)),
        [Run(loader=sampled)],
    ),
    "batching": (
        Run(
            loader=lambda: DataLoader(
                data(RECORDS), batch_sampler=BatchSampler(SequentialSampler(range(12)), 5, True)
            )
        ),
        [Run(loader=sampled)],
    ),
    "sampler": (
        Run(loader=lambda: sampled(sampler=WeightedRandomSampler([1.0] * RECORDS, RECORDS))),
        [
            Run(loader=lambda: sampled(shuffle=True)),
            Run(loader=lambda: DataLoader(Subset(data(RECORDS), range(5)), batch_size=5)),
        ],
    ),
    "batch_beyond_data": (Run(loader=lambda: sampled(batch_size=13)), [Run(loader=sampled)]),
}
# Of several processes, whose cures train in `tests/callbacks/test_ddp.py`; and of several
# optimizers,
# which Lightning itself refuses.
ELSEWHERE = {
    "one_optimizer": Setup(module=(one := Groups()), optimizers=(one.configure_optimizers(),)),
    "direct_parameters": Setup(module=Net(), world_size=2),
    "strategy": Setup(strategy="DDPStrategy"),
}


def test_every_refusal_has_a_cure_that_is_tried():
    assert {r.name for r in REFUSALS} == {*CURES, *ELSEWHERE}
    for setup in ELSEWHERE.values():
        check(setup)


@pytest.mark.parametrize("name", CURES)
@pytest.mark.filterwarnings("ignore")
def test_a_refusal_and_its_cures(name):
    refusal = next(r for r in REFUSALS if r.name == name)
    broken, cures = CURES[name]
    with pytest.raises(PrivacyError) as caught:
        broken.fit()
    assert refusal.expected in str(caught.value)
    for cure in cures:
        before, module, callback = cure.fit()
        assert callback.steps == 1
        assert callback.selftest.passed
        half = cure.settings.get("precision") == "bf16-mixed"
        assert_is_the_step(before, module, cure.loader().dataset, slack=2e-2 if half else 1e-4)


def assert_is_the_step(before, after, dataset, slack=1e-4):
    """On all records, by a loop over them."""
    records = [(x[None], torch.as_tensor(y)[None]) for x, y in dataset]
    sums = iter(clipped_sum(before, before.loss, records, C))
    steps = [next(sums) if p.requires_grad else torch.zeros_like(p) for p in before.parameters()]
    expected = as_vector(steps) / len(records)
    assert expected.norm() > 0
    moved = as_vector(before.parameters()) - as_vector(after.parameters())
    assert (moved - expected).norm() <= slack * expected.norm()


def as_vector(tensors):
    parts = [torch.view_as_real(t) if t.is_complex() else t for t in tensors]
    return torch.cat([part.detach().flatten() for part in parts])


# --- what the self-test and the guard tell to do --------------------------------------------------


def test_frozen_layers_are_unfrozen_by_fitting_again(tmp_path):
    class Unfreezing(Net):
        def __init__(self):
            super().__init__(nn.Linear(8, 8), nn.Tanh())
            self.net[0].requires_grad_(False)

        def on_train_epoch_start(self):
            self.net[0].requires_grad_(self.current_epoch > 0)

        def configure_optimizers(self):
            return torch.optim.SGD(self.trained(), lr=1.0)

    settings = {"delta": 1e-3, "max_grad_norm": C, "noise_multiplier": 1.0}
    batches = DataLoader(data(24), batch_size=8)

    def fit(module, epochs):
        callback = DifferentialPrivacy(**settings)
        run = trainer(callbacks=[callback], max_epochs=epochs, default_root_dir=tmp_path)
        run.fit(module, batches)
        return callback

    with pytest.raises(PrivacyError, match="fit again to train more"):
        fit(Unfreezing(), 2)
    module = with_(Unfreezing, on_train_epoch_start=lambda self: None)
    first = fit(module, 1)
    module.net.requires_grad_(True)
    before = copy.deepcopy(module.net[0].weight.detach())
    both = fit(module, 1)
    assert (first.steps, both.steps) == (3, 6)  # one account
    assert both.epsilon > first.epsilon
    assert not torch.equal(module.net[0].weight, before)


class Penalty(Net):
    """The gradient of the outputs in the inputs is to be small."""

    def loss(self, x, y):
        x = x.clone().requires_grad_()
        out = self(x)
        (gradient,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        return F.cross_entropy(out, y) + gradient.pow(2).sum(1).mean()


class WeightPenalty(Net):
    def loss(self, x, y):
        return F.cross_entropy(self(x), y) + 0.1 * self.net.weight.square().sum()


class Squeezed(Net):
    def loss(self, x, y):
        return F.cross_entropy(self(x).squeeze(), y)


DYNAMIC = {
    # what is wrong, the words of its error, what it tells to do
    "a gradient penalty": (Run(Penalty, **HOOKS), "no gradient penalty", Run(Penalty)),
    "a penalty on weights": (Run(WeightPenalty, **HOOKS), "that add up", Run(WeightPenalty)),
    "no batch of one": (Run(Squeezed), "keep the batch dimension", Run(Net)),
    "a sum": (
        Run(lambda: with_(training_step=lambda self, b, i: len(b[0]) * self.loss(*b))),
        "take the mean",
        Run(Net),
    ),
}


@pytest.mark.parametrize("name", DYNAMIC)
def test_what_the_self_test_finds_and_its_cure(name):
    broken, words, cure = DYNAMIC[name]
    with pytest.raises(PrivacyError, match=words):
        broken.fit()
    before, module, _ = cure.fit()
    assert_is_the_step(before, module, data(RECORDS))
