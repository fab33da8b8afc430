"""Models, batches and bookkeeping that the tests of attacks share."""

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from defend.threat import L1, L2, InputSpace, Linf

BALLS = [Linf(0.1), L2(0.5), L1(1.0, density=0.2)]
RAW = InputSpace()
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def model_for(shape, dtype=torch.float32, classes=3):
    torch.manual_seed(1)
    width = torch.Size(shape[1:]).numel()
    head = nn.Linear(16, classes)
    return nn.Sequential(nn.Flatten(), nn.Linear(width, 16), nn.Tanh(), head).to(dtype)


def batch(shape, space=RAW, dtype=torch.float32, classes=3):
    generator = seeded(2)
    raw = torch.rand(shape, generator=generator)
    raw[0] = raw[0].round()  # a record in the corner of the box
    y = torch.randint(0, classes, shape[:1], generator=generator)
    exact = torch.promote_types(dtype, torch.float32)
    return space.to_model(raw.to(exact)).to(dtype), y


class Watched(nn.Module):
    """A model that keeps what it was asked, and what it said."""

    def __init__(self, model):
        super().__init__()
        self.model, self.inputs, self.outputs = model, [], []

    def forward(self, x):
        self.inputs.append(x.detach().clone())
        self.outputs.append(self.model(x))
        return self.outputs[-1]

    @property
    def rows(self):
        return [len(x) for x in self.inputs]


class Waits(TorchDispatchMode):
    """Collects what makes the host wait for a device: values and shapes that depend on data."""

    _WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique")

    def __init__(self):
        super().__init__()
        self.found, self.allowed = [], False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        if not self.allowed and (by_mask or name.startswith(self._WAITING)):
            self.found.append(name)
        return func(*args, **(kwargs or {}))
