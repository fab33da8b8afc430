"""What is counted and what is kept."""

import contextlib
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from defend import DifferentialPrivacy
from defend.privacy import epsilon
from tests.contracts.defend_does.optimizers import in_a_loop
from tests.contracts.defend_does.yardstick import (
    FOLDER,
    Plain,
    breaks,
    dp,
    fit,
    holds,
    loader,
    promised,
    trainer,
)
from tests.contracts.outcomes import Outcome
from tests.contracts.small import DELTA, loss, net

BREAKS = breaks()


@BREAKS.add
def epsilon_of_zero_steps() -> Outcome:
    callback = dp()
    return holds(callback.epsilon == 0.0, f"ε {callback.epsilon:.0f}")


class Spent:
    """A private run of three epochs, with a checkpoint after the first."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(dir=FOLDER))
        self.callback = dp()
        keep = ModelCheckpoint(self.folder, save_top_k=-1, filename="{epoch}")
        fit(
            Plain(),
            None,
            self.callback,
            (keep,),
            max_epochs=3,
            default_root_dir=self.folder,
            enable_checkpointing=True,
        )
        self.first, self.last = (self.folder / f"epoch={n}.ckpt" for n in (0, 2))
        assert abs(self.callback.epsilon - promised(48)) < 1e-6

    @property
    def ledger(self) -> Path:
        path = self.callback.ledger_path
        assert path is not None
        return path

    def resume(self, path: Path, **settings: Any) -> DifferentialPrivacy:
        """Go on for one more epoch than the checkpoint has, with a new callback."""
        callback = dp(**settings)
        done = torch.load(path, weights_only=True)["epoch"] + 1
        run = trainer(callback, default_root_dir=self.folder, max_epochs=done + 1)
        run.fit(Plain(), loader(), ckpt_path=path)
        return callback


@BREAKS.add
def rollback_refunds_epsilon() -> Outcome:
    """Back to the checkpoint of the first epoch, in a callback that knows no other."""
    spent = Spent()
    after = spent.resume(spent.first)
    right = abs(after.epsilon - promised(64)) < 1e-6
    return holds(right, f"ε {spent.callback.epsilon:.2f} becomes {after.epsilon:.2f}")


@BREAKS.add
def resume_without_accountant() -> Outcome:
    """A checkpoint that holds everything but what callbacks know."""
    spent = Spent()
    saved = torch.load(spent.last, weights_only=True)
    saved["callbacks"] = {}
    torch.save(saved, spent.folder / "bare.ckpt")
    spent.resume(spent.folder / "bare.ckpt")
    return Outcome("open", "it went on")


@BREAKS.add
def resume_a_loop_without_its_state() -> Outcome:
    """Weights and optimizer of a private loop go on in another one, which is not told."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    spent = []
    for _ in range(2):
        with in_a_loop(model, optimizer) as private:
            for pair in private.loader:
                private.step(pair)
            spent.append(private.epsilon)
    return Outcome("open", f"ε {spent[1]:.2f} reported, {promised(32):.2f} spent")


@BREAKS.add
def checkpoint_without_sigma() -> Outcome:
    """Resumed with half the noise and ten times the clipping norm."""
    spent = Spent()
    after = spent.resume(spent.last, noise_multiplier=0.5, max_grad_norm=1.0)
    counted = epsilon([(1.0, 1 / 16, 48), (0.5, 1 / 16, 16)], DELTA)
    return holds(abs(after.epsilon - counted) < 1e-6, f"ε counts both: {after.epsilon:.2f}")


@BREAKS.add
def per_record_gradients_left_on_module() -> Outcome:
    """What parameters and layers carry after each backward, and in a pickle after the fit."""
    found: set[str] = set()

    def look(module: torch.nn.Module, *, noised: bool) -> None:
        for p in module.parameters():
            found.update(vars(p))
            found.update(["grad"] if p.grad is not None and not noised else [])
        found.update(n for m in module.modules() for n in vars(m) if n in _TRACES)

    class Looks(Callback):
        def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
            look(pl_module, noised=False)

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            look(pl_module, noised=True)

    module = Plain()
    fit(module, extra=(Looks(),), max_epochs=1)
    look(pickle.loads(pickle.dumps(module.network)), noised=False)
    return holds(not found, f"it holds {', '.join(sorted(found)) or 'weights alone'}")


_TRACES = {"activations", "backprops", "max_batch_len", "autograd_grad_sample_hooks"}


@BREAKS.add
def beyond_the_planned_epochs() -> Outcome:
    """σ for one epoch, and then the loop goes on."""
    with in_a_loop(net(), target_epsilon=2.0, noise_multiplier=None, accountant="rdp") as private:
        try:
            for _ in range(4):
                for pair in private.loader:
                    private.step(pair)
        finally:
            assert private.epsilon <= 2.0
    return Outcome("open", f"target ε 2.00, spent {private.epsilon:.2f}")


@BREAKS.add
def validate_with_an_old_checkpoint() -> Outcome:
    """`validate(ckpt_path=...)` loads callback states too."""
    spent = Spent()

    class Validated(Plain):
        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            return loss(self, *batch)

    before = spent.callback.epsilon
    run = trainer(spent.callback)
    run.validate(Validated(), loader(), ckpt_path=spent.first, verbose=False)
    return holds(spent.callback.epsilon == before, f"ε stays {before:.2f}")


def _resumed_after(touch: Callable[[Path], Any]) -> Outcome:
    """A resume after somebody has touched the ledger."""
    spent = Spent()
    touch(spent.ledger)
    after = spent.resume(spent.last)
    return Outcome("open", f"ε {after.epsilon:.2f}")


def _without_last_lines(path: Path) -> None:
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:20]))


def _with_more_noise(path: Path) -> None:
    path.write_text(path.read_text().replace('"noise_multiplier": 1.0', '"noise_multiplier": 9.0'))


@BREAKS.add
def ledger_deleted() -> Outcome:
    return _resumed_after(Path.unlink)


@BREAKS.add
def ledger_cut_short() -> Outcome:
    return _resumed_after(_without_last_lines)


@BREAKS.add
def ledger_edited() -> Outcome:
    return _resumed_after(_with_more_noise)


@BREAKS.add
def ledger_of_another_run() -> Outcome:
    other = Spent().ledger
    return _resumed_after(lambda path: path.write_bytes(other.read_bytes()))


@BREAKS.add
def killed_after_a_step() -> Outcome:
    """The weights of a step are out, and the process dies before any checkpoint knows of it."""
    spent = Spent()

    class Dies(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step == 52:
                raise KeyboardInterrupt

    lost = dp()
    run = trainer(lost, Dies(), default_root_dir=spent.folder, max_epochs=4)
    with contextlib.suppress(KeyboardInterrupt, SystemExit):
        run.fit(Plain(), loader(), ckpt_path=spent.last)
    after = spent.resume(spent.last)
    right = after.steps == 48 + 4 + 16
    return holds(right, f"{after.steps} steps charged, of which the checkpoint knows 48")
