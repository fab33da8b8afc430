"""No gradient without noise, and no secret, in anything that can be saved during or after a fit.

All records of the planted data are multiples of one vector inside the model, so every gradient of a
record, clipped or not, every sum of them, and every input that a layer keeps is a multiple of it,
and can be told from anything else at any scale.
"""

import contextlib
import gc
import hashlib
import io
import json
import pickle
import re
import signal
import subprocess
import sys
import tempfile
import types
import warnings
from pathlib import Path

import cloudpickle
import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from defend import DifferentialPrivacy
from tests.helpers import Net, flat, loader, trainer

ROOT = Path(__file__).parents[2]
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


# --- the search finds what it should ------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, -3e-7, 4e5])
@pytest.mark.parametrize("saved", ["tensor", "double", "state", "list", "json", "text"])
def test_the_search_finds_a_planted_leak(scale, saved):
    leak = torch.from_numpy(PATTERN * scale).float()
    noise = torch.randn(300)
    if saved in ("list", "json", "text"):
        values = [*noise.tolist(), *leak.tolist(), 0.5]
        written = {"list": pickle.dumps, "json": lambda v: json.dumps(v).encode()}
        blob = written.get(saved, lambda v: ",".join(map(str, v)).encode())(values)
    else:
        tensor = torch.cat([noise, leak])
        file = io.BytesIO()
        torch.save({"x": tensor.double() if saved == "double" else tensor}, file)
        blob = file.getvalue() if saved != "tensor" else b"odd" + pickle.dumps(tensor.numpy())
    assert has_pattern(blob)


def test_the_search_finds_nothing_in_noise():
    noise = torch.randn(20_000)
    assert not has_pattern(pickle.dumps(noise.numpy()))
    assert not has_pattern(json.dumps(noise[:500].tolist()).encode())
    near = torch.from_numpy(PATTERN).float() + 0.3 * torch.randn(WIDTH)
    assert not has_pattern(pickle.dumps(near.numpy()))


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
            held = tensors_within(module, vars(self.callback._private), *optimizers)
            assert held
            self.leaks += [(hook, "memory", tuple(t.shape)) for t in planted_in(held)]


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


@pytest.mark.parametrize("clipping", ["flat", "adaptive"])
def test_nothing_that_can_be_saved_during_a_fit_holds_a_gradient(clipping):
    from defend.privacy.clipping import AdaptiveClipping, FlatClipping

    chosen = {"flat": FlatClipping(), "adaptive": AdaptiveClipping()}[clipping]
    _, run, callback, spies = watched_fit(None, private(clipping=chosen))
    assert callback.steps == run.global_step == 2
    for spy in spies:
        assert spy.leaks == []
        assert set(spy.looked) == set(Spy.LOOKS) - {"on_exception"}
        assert spy.looked.count("on_after_backward") > 4  # once a chunk
        assert not {"module", "states"} & spy.refused  # these could be pickled each time


def test_the_spy_sees_the_gradients_of_a_run_without_privacy():
    """The positive control: the same spies on plain training, where gradients are data."""
    callback, module = private(), Planted()
    spy = Spy(callback)
    trainer(callbacks=[spy], max_epochs=1).fit(module, batches())
    found = {(hook, name) for hook, name, _ in spy.leaks}
    assert ("on_before_optimizer_step", "memory") in found
    assert ("on_train_batch_end", "optimizers") in found  # Adam's momentum


def test_the_spy_sees_a_step_without_noise():
    """And on private training without noise, the released sum."""
    _, _, _, spies = watched_fit(None, private(noise_multiplier=0.0), max_epochs=1)
    assert ("on_before_optimizer_step", "memory", (2, WIDTH)) in spies[1].leaks


def as_it_was(module, run, before):
    """Keys, attributes, hooks, modes and flags of a module are those that it came with."""
    keys, attributes, modes, flags = before
    assert list(module.state_dict()) == keys
    assert {name: set(vars(m)) for name, m in module.named_modules()} == attributes
    assert [m.training for m in module.modules()] == modes
    assert [p.requires_grad for p in module.parameters()] == flags
    assert all(vars(p) == {} and p.grad is None for p in module.parameters())
    for m in module.modules():
        for hooks in [name for name in vars(m) if name.endswith("_hooks")]:
            assert not getattr(m, hooks), (type(m), hooks)
    assert all(not p._backward_hooks for p in module.parameters())
    assert not {"training_step", "backward", "process_dataloader"} & set(vars(run.strategy))
    assert "log" not in vars(run.fit_loop.epoch_loop._results)
    for optimizer in run.optimizers:
        assert not optimizer._optimizer_step_pre_hooks
    assert planted_in(tensors_within(module, *run.optimizers)) == []
    assert not has_pattern(pickle.dumps(module))


def looks(module):
    _ = module.hparams  # Lightning makes this attribute on first use
    return (
        list(module.state_dict()),
        {name: set(vars(m)) for name, m in module.named_modules()},
        [m.training for m in module.modules()],
        [p.requires_grad for p in module.parameters()],
    )


class Planned(Planted):
    """With a part that is frozen and in eval mode."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)

    def train(self, mode=True):
        super().train(mode)
        if "frozen" in self._modules:
            self.frozen.eval()
        return self


def test_after_the_fit_the_module_is_as_it_was():
    module = Planned().train()
    before = looks(module)
    module, run, callback, _ = watched_fit(module)
    as_it_was(module, run, before)
    assert not has_pattern(cloudpickle.dumps(callback.state_dict()))
    assert planted_in(tensors_within(vars(callback._private))) == []


@pytest.mark.parametrize("fails", ["in_chunk", "in_validation"])
def test_after_an_exception_too(fails):
    module = Planned(fails=fails).train()
    before, callback = looks(module), private()
    spies = [Spy(callback), type("Second", (Spy,), {})(callback)]
    run = trainer(callbacks=[spies[0], callback, spies[1]], max_epochs=1, num_sanity_val_steps=0)
    with pytest.raises(RuntimeError, match="planted failure"):
        run.fit(module, batches(), batches())
    module.train()  # Lightning leaves a failed validation in eval mode
    as_it_was(module, run, before)
    for spy in spies:
        assert spy.leaks == []
        assert "on_exception" in spy.looked
    assert callback._private._step is None
    assert planted_in(tensors_within(vars(callback._private))) == []


class Interrupting(Callback):
    """Ctrl-C in the middle of a chunk."""

    def on_before_backward(self, trainer, pl_module, loss):
        if trainer.global_step == 1:
            raise KeyboardInterrupt


def test_after_ctrl_c_too():
    module, callback = Planned().train(), private()
    before = looks(module)
    spy = Spy(callback)
    run = trainer(callbacks=[callback, Interrupting(), spy], max_epochs=1)
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit):  # what Lightning makes of it
            run.fit(module, batches())
    finally:
        signal.signal(signal.SIGINT, handler)
    as_it_was(module, run, before)
    assert spy.leaks == []
    assert spy.looked[-1] == "on_exception"
    assert callback.steps == 1
    assert planted_in(tensors_within(vars(callback._private))) == []


# --- files --------------------------------------------------------------------------------------


def spellings(root):
    """How a secret root may be written: digits, and bytes of all or of a quarter of it."""
    whole = root.to_bytes(32, "little")
    words = [whole[i : i + 8] for i in range(0, 32, 8)]
    return [
        str(root).encode(), f"{root:x}".encode(), f"{root:X}".encode(),
        *words, *(w[::-1] for w in words),
        *(str(int.from_bytes(w, "little")).encode() for w in words),
    ]  # fmt: skip


def holds_root(blob, root):
    return any(spelling in blob for spelling in spellings(root))


def test_the_search_for_the_root_finds_it():
    root, other = (
        int.from_bytes(hashlib.sha256(name).digest(), "little") for name in (b"one", b"two")
    )
    for blob in (
        pickle.dumps({"x": root}),
        json.dumps([root]).encode(),
        hex(root).encode(),
        np.frombuffer(root.to_bytes(32, "little"), np.uint64).tobytes(),
    ):
        assert holds_root(blob, root)
    assert not holds_root(pickle.dumps(other) + str(other).encode(), root)


class Roots(Callback):
    """Keeps the root of each fit, and writes the module down in the middle of it."""

    def __init__(self, callback, folder):
        self.callback, self.folder, self.roots = callback, folder, []

    def __getstate__(self):
        return {}

    def on_train_start(self, trainer, pl_module):
        self.roots.append(self.callback._private._randomness.root)

    def on_after_backward(self, trainer, pl_module):
        (self.folder / f"{trainer.global_step}.pickle").write_bytes(pickle.dumps(pl_module))


def test_no_file_holds_a_gradient_or_the_root(tmp_path, monkeypatch):
    """Checkpoints, loggers' files, MLflow's store and models, the ledger, mailboxes."""
    pytest.importorskip("mlflow")
    import mlflow

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # for mailboxes
    callback = private()
    roots = Roots(callback, tmp_path)
    store = MLFlowLogger(
        "defend",
        tracking_uri=f"sqlite:///{tmp_path}/mlflow.db",
        artifact_location=str(tmp_path / "artifacts"),
    )
    saved = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=1, save_top_k=-1)
    module, _, _, spies = watched_fit(
        None, callback, roots, saved,
        logger=[store, CSVLogger(tmp_path)], log_every_n_steps=1,
        enable_checkpointing=True, default_root_dir=tmp_path,
    )  # fmt: skip
    monkeypatch.setattr(callback, "_home", -1)  # as in a copy on rank 0, which posts
    callback.post()
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    with warnings.catch_warnings(), mlflow.start_run(run_id=store.run_id):
        warnings.simplefilter("ignore")
        mlflow.pytorch.log_model(
            module, name="model", pip_requirements=["torch"], serialization_format="pickle"
        )
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    names = " ".join(str(path.relative_to(tmp_path)) for path in files)
    for kind in ("mlflow.db", ".ckpt", ".jsonl", "metrics.csv", "model", ".json", "0.pickle"):
        assert kind in names, kind
    assert sum(".ckpt" in path.name for path in files) == 2
    (root,) = roots.roots
    for path in files:
        blob = path.read_bytes()
        assert not holds_root(blob, root), path
        assert not has_pattern(blob), path
    assert all(spy.leaks == [] for spy in spies)
    # Saved where it may not be, either would be seen.
    torch.save(planted_data().tensors[0] * Planted().turn, tmp_path / "leak.pt")
    assert has_pattern((tmp_path / "leak.pt").read_bytes())


class Peek(Callback):
    """Keeps the root, and what the callback's copies hold in the middle of a step."""

    def __init__(self, callback):
        self.callback, self.root, self.blobs = callback, None, []

    def __getstate__(self):
        return {}

    def on_after_backward(self, trainer, pl_module):
        self.root = self.callback._private._randomness.root
        with contextlib.suppress(pickle.PicklingError, TypeError, AttributeError):
            self.blobs.append(cloudpickle.dumps(self.callback))


def peeked():
    callback = private(ledger=False)
    peek = Peek(callback)
    trainer(callbacks=[callback, peek], max_epochs=1).fit(Planted(), batches())
    return callback, peek


def test_a_copy_of_the_callback_during_the_fit_holds_no_secret():
    _, peek = peeked()
    assert not any(has_pattern(blob) for blob in peek.blobs)
    assert not any(holds_root(blob, peek.root) for blob in peek.blobs)


def test_after_the_fit_the_callback_does_not_know_the_root():
    callback, peek = peeked()
    assert not holds_root(cloudpickle.dumps(callback), peek.root)


def test_after_the_fit_the_callback_can_be_pickled():
    callback, _ = peeked()
    copy = pickle.loads(pickle.dumps(callback))
    assert (copy.steps, copy.epsilon) == (callback.steps, callback.epsilon)


# --- noise is never drawn twice -------------------------------------------------------------------


class Silent(Net):
    """Its loss has a zero gradient: what is released is the noise, divided by the batch."""

    def training_step(self, batch, batch_idx):
        return 0.0 * self(batch[0]).mean()


class Noise(Callback):
    """The released gradients minus the sums, and the sizes of the batches."""

    def __init__(self):
        self.drawn, self.sizes = {}, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.sizes.append(len(batch[0]))

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        gradients = torch.cat([p.grad.flatten() for p in pl_module.parameters()])
        self.drawn[trainer.global_step] = (gradients * 32 / (30.0 * 0.5)).double()


def noise_of(ckpt=None, save=None, **settings):
    pl.seed_everything(7)
    spy = Noise()
    extra = [] if save is None else [ModelCheckpoint(save, every_n_train_steps=3, filename="{step}",
                                                     save_top_k=-1)]  # fmt: skip
    run = trainer(
        callbacks=[private(ledger=False, **settings), spy, *extra],
        max_epochs=2,
        enable_checkpointing=bool(extra),
    )
    run.fit(Silent(), loader(256, 32), ckpt_path=ckpt)
    return spy


def related(one, other):
    """The largest correlation between any noise of one run and any of another."""
    a, b = (torch.nn.functional.normalize(torch.stack(list(d.values()))) for d in (one, other))
    return float((a @ b.T).abs().max())


CHANCE = 0.6  # 195 coordinates, 256 pairs: 0.6 is eight deviations


@pytest.mark.parametrize("secure", [False, True])
def test_neither_a_second_run_nor_a_resume_draws_the_same_noise(tmp_path, secure):
    settings = {"secure_noise": secure}
    first, second = noise_of(save=tmp_path, **settings), noise_of(**settings)
    resumed = noise_of(ckpt=tmp_path / "step=6.ckpt", **settings)
    assert sorted(first.drawn) == list(range(16))
    assert sorted(resumed.drawn) == list(range(6, 16))
    for drawn in (first.drawn, resumed.drawn):
        noise = torch.cat(list(drawn.values()))
        assert abs(noise.std() - 1) < 4 / (2 * noise.numel()) ** 0.5
    assert related(first.drawn, second.drawn) < CHANCE
    assert related(first.drawn, resumed.drawn) < CHANCE
    assert first.sizes != second.sizes
    assert first.sizes[6:] != resumed.sizes


def test_the_comparison_sees_noise_that_is_replayed(tmp_path):
    """With a fixed seed a resume replays it, by design; such a run counts as not private."""
    first = noise_of(save=tmp_path, insecure_seed=1)
    resumed = noise_of(ckpt=tmp_path / "step=6.ckpt", insecure_seed=1)
    assert related(first.drawn, resumed.drawn) > 0.999
    assert first.sizes[6:] == resumed.sizes


PROGRAM = """
import json, sys
from tests.callbacks.test_leaks import noise_of
spy = noise_of(ckpt=sys.argv[1])
print(json.dumps([{k: v.tolist() for k, v in spy.drawn.items()}, spy.sizes]))
"""


def test_nor_does_a_resume_in_another_process(tmp_path):
    first = noise_of(save=tmp_path)
    here = noise_of(ckpt=tmp_path / "step=6.ckpt")
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, tmp_path / "step=6.ckpt"],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    drawn, sizes = json.loads(process.stdout.splitlines()[-1])
    there = {int(step): torch.tensor(v, dtype=torch.float64) for step, v in drawn.items()}
    assert sorted(there) == list(range(6, 16))
    assert related(first.drawn, there) < CHANCE
    assert related(here.drawn, there) < CHANCE
    assert sizes not in (first.sizes[6:], here.sizes)


def test_weights_alone_are_noise():
    """With this much noise the trained weights are far from what the data would make of them."""
    module, _, _, _ = watched_fit()
    assert (flat(module) - flat(Planted())).abs().max() > 1e-3
