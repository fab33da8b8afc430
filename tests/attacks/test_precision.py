"""Autocast around an attack: casts of weights made once, and what a CPU has no hardware for."""

import contextlib
import platform
import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from defend import PGD, Linf
from defend.attacks import precision as module
from tests.attacks.cases import batch, model_for, seeded


class Casts(TorchDispatchMode):
    """Counts conversions of tensors of one shape."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.made = shape, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        dtype = (kwargs or {}).get("dtype")
        if func.overloadpacket.__name__ == "_to_copy" and dtype != args[0].dtype:
            self.made += args[0].shape == self.shape
        return func(*args, **(kwargs or {}))


BF16, FP16 = torch.bfloat16, torch.float16


# What the attack asks for, the autocast around it, and casts in 5 forwards: one where autocast may
# keep it, one for each forward where what it keeps would be of another dtype than the training's.
@pytest.mark.parametrize(
    ("precision", "outer", "casts"),
    [(None, BF16, 1), ("bf16", BF16, 1), ("bf16", None, 1), ("fp16", None, 1), ("fp16", BF16, 5),
     ("bf16", FP16, 5), ("fp32", BF16, 0), (None, None, 0), ("fp32", None, 0)],
    ids=str,
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*no hardware")
def test_weights_are_cast_once_wherever_autocast_may_keep_them(precision, outer, casts):
    x, y = batch((6, 2, 4, 4))
    model = model_for(x.shape)
    attack = PGD(Linf(0.1), steps=4, iterate="best", precision=precision)
    around = torch.autocast("cpu", outer) if outer else contextlib.nullcontext()
    with around, Casts(model[1].weight.shape) as seen:
        attack(model, x, y, generator=seeded())
    assert seen.made == casts


@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_the_last_look_builds_no_graph(loss):
    """Nobody goes backward from it: kept activations would be memory for nothing."""
    x, y = batch((6, 2, 4, 4))
    model, graphs = model_for(x.shape), []
    model.register_forward_hook(lambda module, args, out: graphs.append(out.requires_grad))
    PGD(Linf(0.1), steps=3, iterate="best", loss=loss)(model, x, y, generator=seeded())
    assert graphs[-4:] == [True, True, True, False]


@pytest.fixture
def machine(monkeypatch):
    """A CPU of a kind, and what it has hardware for."""

    def of(kind, *features):
        module._warn_if_emulated.cache_clear()
        monkeypatch.setattr(platform, "machine", lambda: kind)
        for feature in ("avx512_bf16", "amx_tile", "amx_fp16"):
            found = feature in features
            monkeypatch.setattr(
                torch.cpu, f"_is_{feature}_supported", lambda found=found: found, raising=False
            )

    yield of
    module._warn_if_emulated.cache_clear()


def attacked(precision):
    """What the user is told at two attacks."""
    x, y = batch((3, 2))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            PGD(Linf(0.1), steps=1, precision=precision)(model_for(x.shape), x, y)
    return [str(w.message) for w in caught if "hardware" in str(w.message)]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_that_is_emulated_is_said_once(machine, precision):
    machine("x86_64")
    assert attacked(precision) == [
        f"This CPU has no hardware for {precision}: the attack will be many times slower than in "
        "fp32. Leave out `precision` here."
    ]


@pytest.mark.parametrize(
    ("kind", "features", "precision"),
    [
        ("x86_64", ["avx512_bf16"], "bf16"),
        ("AMD64", ["amx_tile"], "bf16"),
        ("x86_64", ["amx_fp16"], "fp16"),
        ("arm64", [], "bf16"),  # nobody knows
        ("x86_64", [], "fp32"),
        ("x86_64", [], None),
    ],
)
def test_nothing_is_said_where_there_is_hardware_or_no_need_of_it(
    machine, kind, features, precision
):
    machine(kind, *features)
    assert attacked(precision) == []


def test_hardware_for_one_is_none_for_the_other(machine):
    machine("x86_64", "avx512_bf16", "amx_tile")
    assert len(attacked("fp16")) == 1
    machine("x86_64", "amx_fp16")
    assert len(attacked("bf16")) == 1
