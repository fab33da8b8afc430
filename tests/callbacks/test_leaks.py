"""No gradient without noise, and no secret, in anything that can be saved during a fit."""

import contextlib
import hashlib
import io
import json
import pickle
import tempfile
import warnings

import cloudpickle
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger

from tests.callbacks.leaks import (
    PATTERN,
    WIDTH,
    Planted,
    Spy,
    batches,
    has_pattern,
    planted_data,
    private,
    watched_fit,
)
from tests.helpers import trainer

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


# --- during a fit -------------------------------------------------------------------------------


@pytest.mark.parametrize("clipping", ["flat", "adaptive"])
def test_nothing_that_can_be_saved_during_a_fit_holds_a_gradient(clipping):
    from defend.privacy.mechanism.clipping import AdaptiveClipping, FlatClipping

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
        self.roots.append(self.callback.data.randomness.root)

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
    callback.send_state()
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
        self.root = self.callback.data.randomness.root
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
