"""What only Lightning brings: callbacks, tuners, loops and checkpoints."""

import tempfile
from typing import Any

import torch
from lightning.pytorch.callbacks import (
    Callback,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader

from tests.contracts.defend_does.data import Counts
from tests.contracts.defend_does.yardstick import (
    FOLDER,
    Plain,
    Released,
    breaks,
    dp,
    fit,
    holds,
    loader,
    measure,
    promised,
    records,
    trainer,
)
from tests.contracts.outcomes import Outcome
from tests.contracts.small import batch, flat, loss

BREAKS = breaks()


def _accepted(
    module: Plain | None = None, extra: tuple[Callback, ...] = (), **settings: Any
) -> Outcome:
    fit(Plain() if module is None else module, extra=extra, **settings)
    return Outcome("open", "it went on")


@BREAKS.add
def learning_rate_finder_callback() -> Outcome:
    return _accepted(WithRate(), (LearningRateFinder(num_training_steps=3),))


class WithRate(Plain):
    lr = 0.1

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(records(), getattr(self, "batch_size", 4))


def _tuned(tune: Any) -> Outcome:
    module, callback = WithRate(), dp()
    module.batch_size = 4
    before = flat(module.parameters())
    try:
        tune(Tuner(trainer(callback, max_epochs=1)), module)
    finally:
        assert torch.equal(flat(module.parameters()), before)
    raw = callback.steps == 0
    return holds(not raw, f"tried, {callback.steps} steps charged")


@BREAKS.add
def tuner_lr_find() -> Outcome:
    return _tuned(lambda tuner, module: tuner.lr_find(module, num_training=3))


@BREAKS.add
def tuner_scale_batch_size() -> Outcome:
    return _tuned(
        lambda tuner, module: tuner.scale_batch_size(module, max_trials=1, steps_per_trial=1)
    )


@BREAKS.add
def gradient_accumulation_scheduler() -> Outcome:
    return _accepted(extra=(GradientAccumulationScheduler({0: 2}),))


@BREAKS.add
def gradient_clip_val() -> Outcome:
    return _accepted(gradient_clip_val=1.0)


@BREAKS.add
def stochastic_weight_averaging() -> Outcome:
    return _accepted(extra=(StochasticWeightAveraging(0.1),), max_epochs=2)


@BREAKS.add
def ema_weight_averaging() -> Outcome:
    """An average of released weights is released already. Is each step noised and charged?"""
    callback, spy = dp(insecure_seed=7, ledger=False), Released()
    fit(Plain(), None, callback, (EMAWeightAveraging(decay=0.9), spy), max_epochs=2)
    plain = Released()
    fit(Plain(), None, dp(insecure_seed=7, ledger=False), (plain,), max_epochs=2)
    same = all(map(torch.equal, spy.gradients, plain.gradients))
    return holds(same and callback.steps == 32, "every release as without it")


@BREAKS.add
def manual_optimization() -> Outcome:
    class Manual(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.manual_backward(loss(self, *batch))
            self.optimizers().step()

    return _accepted(Manual())


@BREAKS.add
def backward_of_the_strategy() -> Outcome:
    """A second backward in `training_step`, through the strategy that defend has wrapped."""

    class Twice(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.trainer.strategy.backward(loss(self, *batch), None)
            return loss(self, *batch)

    return measure(module=lambda network, compute: Twice(network))


@BREAKS.add
def module_steps_by_itself() -> Outcome:
    """A raw step in a hook of the module, with the Trainer's own optimizer."""

    class Sly(Plain):
        def on_train_batch_end(self, *args: Any) -> None:
            self.noised = flat(self.parameters())
            loss(self, *batch()).backward()
            self.trainer.optimizers[0].step()

    module = Sly()
    try:
        return _accepted(module)
    finally:
        assert torch.equal(flat(module.parameters()), module.noised)


@BREAKS.add
def module_steps_by_an_optimizer_of_its_own() -> Outcome:
    class Sly(Plain):
        def on_train_batch_end(self, *args: Any) -> None:
            loss(self, *batch()).backward()
            torch.optim.SGD(self.parameters(), lr=0.1).step()

    return _accepted(Sly(), max_epochs=1)


@BREAKS.add
def raw_step_in_training_step() -> Outcome:
    class Sly(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            found = torch.autograd.grad(loss(self, *batch), list(self.parameters()))
            with torch.no_grad():
                for p, g in zip(self.parameters(), found, strict=True):
                    p -= 0.1 * g
            return loss(self, *batch)

    return _accepted(Sly())


@BREAKS.add
def optimizer_replaced_in_mid_fit() -> Outcome:
    """The guard sits on the optimizer that the fit began with."""

    class Replaces(Plain):
        def on_train_start(self) -> None:
            self.trainer.strategy.optimizers = [torch.optim.SGD(self.parameters(), lr=0.1)]

    return _accepted(Replaces(), max_epochs=1)


@BREAKS.add
def raw_gradient_added_before_the_step() -> Outcome:
    """In the last hook before the step, when the release is in p.grad."""

    class Adds(Plain):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            loss(self, *batch()).backward()

    return _accepted(Adds(), max_epochs=1)


@BREAKS.add
def loader_replaced_in_mid_fit() -> Outcome:
    """A callback swaps the combined loader in `on_train_start`: do its batches get in?"""
    module = Counts()

    class Replaces(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            loop = trainer.fit_loop
            loop._combined_loader = CombinedLoader(loader(shuffle=True), "min_size")
            iter(loop._combined_loader)
            loop._data_fetcher.setup(loop._combined_loader)

    fit(module, extra=(Replaces(),), max_epochs=2)
    return holds(len(set(module.sizes)) > 1, "the private loader stays")


@BREAKS.add
def batch_swapped_in_a_hook() -> Outcome:
    """`on_before_batch_transfer` gives the first records, whatever was drawn."""

    class Swaps(Plain):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            x, y = records().tensors
            return [x[:4], y[:4]]

    return _accepted(Swaps())


@BREAKS.add
def batch_skipped() -> Outcome:
    class Skips(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            value = loss(self, *batch)
            return value if value < 0.5 else None

    return _accepted(Skips(), max_epochs=1)


@BREAKS.add
def epoch_cut_short_by_a_record() -> Outcome:
    """`on_train_batch_start` returns -1 when it sees a certain record: its batch takes no step."""

    class Skips(Plain):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if (batch[0][:, 0] == records().tensors[0][3, 0]).any() else None

    return _accepted(Skips(), max_epochs=4)


@BREAKS.add
def overfit_batches() -> Outcome:
    return _accepted(overfit_batches=2)


@BREAKS.add
def reloaded_data() -> Outcome:
    return _accepted(reload_dataloaders_every_n_epochs=1, max_epochs=2)


@BREAKS.add
def limit_train_batches() -> Outcome:
    """Three of sixteen batches of an epoch, all the same Poisson-sampled from all the data."""
    callback = dp()
    fit(Plain(), None, callback, max_epochs=4, limit_train_batches=3)
    right = callback.steps == 12 and abs(callback.epsilon - promised(12)) < 1e-6
    return holds(right, f"ε {callback.epsilon:.2f} of 12 steps at q = 1/16")


@BREAKS.add
def plain_fit_before() -> Outcome:
    """The same Trainer first fits without the callback."""
    callback = dp()
    run = trainer(max_epochs=1)
    module = Plain()
    run.fit(module, loader())
    run.callbacks.append(callback)
    run.fit_loop.max_epochs = 2
    run.fit(module, loader())
    return Outcome("open", "it went on")


@BREAKS.add
def plain_checkpoint_resumed() -> Outcome:
    """Resumed from the checkpoint of a run without the callback."""
    folder = tempfile.mkdtemp(dir=FOLDER)
    keep = ModelCheckpoint(folder, filename="plain")
    trainer(keep, max_epochs=1, enable_checkpointing=True).fit(Plain(), loader())
    run = trainer(dp(), max_epochs=2)
    run.fit(Plain(), loader(), ckpt_path=f"{folder}/plain.ckpt")
    return Outcome("open", "it went on")


@BREAKS.add
def two_loaders() -> Outcome:
    class Both(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return loss(self, *batch[0]) + loss(self, *batch[1])

    fit(Both(), [loader(), loader()])
    return Outcome("open", "it went on")


@BREAKS.add
def weights_only_loaded_in_mid_fit() -> Outcome:
    """A callback puts the weights of a plain run into the module, in the middle of the fit."""
    trained = Plain()
    trainer(max_epochs=1).fit(trained, loader())

    class Loads(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            pl_module.load_state_dict(trained.state_dict())

    return _accepted(extra=(Loads(),), max_epochs=1)
