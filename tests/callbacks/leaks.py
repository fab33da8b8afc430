"""A search for gradients in anything that can be saved, and a model whose gradients it knows.

All records of the planted data are multiples of one vector inside the model, so every gradient of a
record, clipped or not, every sum of them, and every input that a layer keeps is a multiple of it,
and can be told from anything else at any scale.
"""

import gc
import pickle
import re
import types

import cloudpickle
import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from defend import DifferentialPrivacy
from tests.helpers import trainer

WIDTH = 12
PATTERN = np.array([3, -1, 4, 1.5, -9, 2.6, 5, -3.5, 8, 9.7, -9.3, 2.3])
NUMBER = re.compile(rb"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?", re.IGNORECASE)


def has_multiple(numbers):
    """Whether WIDTH numbers in a row are a multiple of the pattern, up to 0.1%."""
    if len(numbers) < WIDTH:
        return False
    with np.errstate(all="ignore"):
        ratios = np.lib.stride_tricks.sliding_window_view(numbers, WIDTH) / PATTERN
        middle = ratios.mean(1)
        spread = np.abs(ratios - middle[:, None]).max(1)
        return bool(((spread < 1e-3 * np.abs(middle)) & (np.abs(middle) > 1e-30)).any())


def has_pattern(blob):
    """Whether bytes hold a multiple of the pattern, in any way in which numbers are saved."""
    raw = np.frombuffer(blob, np.uint8)
    for kind, stride in (("<f4", 4), ("<f8", 8), (">f8", 9)):  # pickle puts one byte before each
        size = np.dtype(kind).itemsize
        windows = np.lib.stride_tricks.sliding_window_view(raw, size) if len(raw) >= size else []
        for offset in range(min(stride, len(windows))):
            column = np.ascontiguousarray(windows[offset::stride]).view(kind)[:, 0]
            with np.errstate(all="ignore"):
                numbers = column.astype(np.float64)
            if has_multiple(numbers):
                return True
    return has_multiple(np.array([float(n) for n in NUMBER.findall(blob)]))


def tensors_within(*objects):
    """Every tensor that can be reached from objects, through whatever attributes or closures."""
    seen, queue, found = set(), list(objects), []
    skipped = (type, types.ModuleType, types.FrameType, types.CodeType, Dataset, DataLoader)
    while queue:
        item = queue.pop()
        if id(item) in seen or isinstance(item, skipped):
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            found.append(item)
            queue += [item.grad, vars(item)]
        elif isinstance(item, types.FunctionType):
            queue += [c.cell_contents for c in item.__closure__ or ()]
        else:
            queue += gc.get_referents(item)
    return found


def planted_in(tensors):
    """Those of the tensors that hold a multiple of the pattern."""
    return [t for t in tensors if has_multiple(t.detach().double().flatten().numpy())]


# --- the planted model and data -----------------------------------------------------------------


class Planted(pl.LightningModule):
    """Per-record gradients of `first.weight`, its rows, are multiples of the pattern."""

    def __init__(self, fails=None):
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, 1, bias=False)
        torch.manual_seed(3)
        with torch.no_grad():
            self.first.weight.normal_()
        self.register_buffer("turn", torch.rand(WIDTH) + 0.5)
        self.fails, self.steps = fails, []

    def forward(self, x):
        return self.last(self.first(x * self.turn))

    def training_step(self, batch, batch_idx):
        self.steps.append(self.trainer.global_step)
        if self.fails == "in_chunk" and self.steps.count(1) == 2:  # the second step's second
            raise RuntimeError("planted failure")
        return 0.37 * self(batch[0]).mean()

    def validation_step(self, batch, batch_idx):
        if self.fails == "in_validation" and not self.trainer.sanity_checking:
            raise RuntimeError("planted failure")

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def planted_data(records=64):
    turn = Planted().turn.double()
    sizes = torch.linspace(0.02, 0.5, records, dtype=torch.float64)
    rows = sizes[:, None] * torch.from_numpy(PATTERN) / turn
    return TensorDataset(rows.float(), torch.zeros(records))


def batches():
    return DataLoader(planted_data(), batch_size=32)


def private(**settings):
    fixed = {"delta": 1e-3, "max_grad_norm": 0.5, "noise_multiplier": 30.0, "accountant": "rdp"}
    return DifferentialPrivacy(**{**fixed, "chunk_size": 8, **settings})


class Spy(Callback):
    """At each hook: pickles everything that can be pickled, and searches it."""

    LOOKS = ("on_train_start", "on_before_backward", "on_after_backward",
             "on_before_optimizer_step", "on_before_zero_grad", "on_train_batch_end",
             "on_exception", "on_train_end")  # fmt: skip
    # Between a chunk and the step the callback itself has to hold the sum so far.
    CLEAN = ("on_before_optimizer_step", "on_train_batch_end", "on_exception", "on_train_end")

    def __init__(self, callback):
        self.callback, self.leaks, self.looked, self.refused = callback, [], [], set()

    def __getstate__(self):
        return {}

    def look(self, hook, trainer, module):
        self.looked.append(hook)
        optimizers = [] if hook == "on_exception" else trainer.optimizers
        for name, thing in {
            "module": module,
            "callback": self.callback,
            "callbacks": trainer.callbacks,
            "optimizers": optimizers,
            "states": [module.state_dict(), self.callback.state_dict()]
            + [o.state_dict() for o in optimizers],
        }.items():
            for dumps in (pickle.dumps, cloudpickle.dumps):
                try:
                    blob = dumps(thing)
                except Exception:
                    self.refused.add(name)  # what cannot be saved leaks nothing
                    continue
                if has_pattern(blob):
                    self.leaks.append((hook, name, dumps.__module__))
        if hook in self.CLEAN:
            held = tensors_within(module, held_by(self.callback), *optimizers)
            assert held
            self.leaks += [(hook, "memory", tuple(t.shape)) for t in planted_in(held)]


def held_by(callback):
    """What a callback keeps of a private training, and of the fit that is open."""
    parts = [callback._training]
    if callback._fit is not None:
        parts += [callback._fit, callback._fit.step, callback._data]
    return [vars(part) for part in parts]


def _looking(hook):
    def method(self, trainer, pl_module, *args):
        self.look(hook, trainer, pl_module)

    return method


for _hook in Spy.LOOKS:
    setattr(Spy, _hook, _looking(_hook))


def watched_fit(module=None, callback=None, *extra, **settings):
    """A fit with a spy before and one after the callback."""
    callback = callback or private()
    spies = [Spy(callback), type("Second", (Spy,), {})(callback)]
    module = module or Planted()
    run = trainer(callbacks=[spies[0], callback, *extra, spies[1]], **{"max_epochs": 1, **settings})
    run.fit(module, batches(), batches())
    return module, run, callback, spies
