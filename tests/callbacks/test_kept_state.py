"""Hooks after a step that keep something: of records it is refused, of weights it trains."""

import copy
import itertools
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset

from defend import DifferentialPrivacy, PrivacyError
from defend.training.config import Adversarial, Privacy
from defend.training.private_loop import make_private
from tests.helpers import data, trainer

ROWS = 24


class Net(pl.LightningModule):
    """Has places where things can be kept, and uses none of them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(8, 3)
        self.teacher = nn.Linear(8, 3).requires_grad_(False)
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.weights, self.losses = torch.ones(ROWS), []

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.losses.append(float(loss.detach()))
        return loss

    def validation_step(self, batch, batch_idx):
        self.losses.append(batch[0].sum())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


# --- what is done, as (module, batch)


def running_mean(module, batch):
    module.mean.mul_(0.9).add_(0.1 * batch[0].mean(0))


def behind_the_version(module, batch):
    module.mean.data = 0.9 * module.mean.data + 0.1 * batch[0].mean(0)


def prototypes(module, batch):
    module.teacher.weight[0] = batch[0][batch[1] == 0].sum(0)


def prototypes_by_data(module, batch):
    module.teacher.weight.data.copy_(batch[0][:3])


UNSOUND = (running_mean, behind_the_version, prototypes, prototypes_by_data)


def average_of_weights(module, batch):
    for mine, its in zip(module.teacher.parameters(), module.net.parameters(), strict=True):
        mine.data.mul_(0.9).add_(0.1 * its.data)


def average_now_and_then(module, batch):
    if module.trainer.global_step % 2 == 0:
        average_of_weights(module, batch)


def schedule(module, batch):
    module.mean.fill_(0.9**module.trainer.current_epoch)


def counter(module, batch):
    module.count += 1


def figures(module, batch):
    module.losses.clear()
    module.last = batch[0].mean()


SOUND = (average_of_weights, average_now_and_then, schedule, counter, figures)

# --- and where


class After(pl.Callback):
    def __init__(self, change):
        self.change = change

    @torch.no_grad()
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.change(pl_module, batch)


class AtTheEnd(pl.Callback):
    """What the step saw last is used when the epoch is over."""

    def __init__(self, change):
        self.change, self.batch = change, None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batch = [t.clone() for t in batch]

    @torch.no_grad()
    def on_train_epoch_end(self, trainer, pl_module):
        self.change(pl_module, self.batch)


class AfterAll(AtTheEnd):
    def on_train_epoch_end(self, trainer, pl_module):
        pass

    @torch.no_grad()
    def on_train_end(self, trainer, pl_module):
        self.change(pl_module, self.batch)


def on_module(change):
    class Hooked(Net):
        @torch.no_grad()
        def on_train_batch_end(self, outputs, batch, batch_idx):
            change(self, batch)

    return Hooked(), []


def before_the_gradient_goes(change):
    class Hooked(Net):
        def training_step(self, batch, batch_idx):
            self.seen = batch
            return super().training_step(batch, batch_idx)

        @torch.no_grad()
        def on_before_zero_grad(self, optimizer):
            change(self, self.seen)

    return Hooked(), []


def in_the_update(change):
    class Hooked(Net):
        def training_step(self, batch, batch_idx):
            self.seen = batch
            return super().training_step(batch, batch_idx)

        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
            with torch.no_grad():
                change(self, self.seen)

        def lr_scheduler_step(self, scheduler, metric):
            scheduler.step()

    return Hooked(), []


def around_the_backward(change):
    class Hooked(Net):
        def training_step(self, batch, batch_idx):
            self.seen = batch
            return super().training_step(batch, batch_idx)

        @torch.no_grad()
        def on_after_backward(self):
            change(self, self.seen)

    return Hooked(), []


PLACES = {
    "after a batch": lambda change: (Net(), [After(change)]),
    "after an epoch": lambda change: (Net(), [AtTheEnd(change)]),
    "after the training": lambda change: (Net(), [AfterAll(change)]),
    "module": on_module,
    "module, before the gradient goes": before_the_gradient_goes,
    "module, in the update": in_the_update,
    "module, around the backward": around_the_backward,
}


def fitted(module, hooks, dataset=None, **settings):
    dp = DifferentialPrivacy(
        noise_multiplier=1.0, delta=1e-3, max_grad_norm=1.0, ledger=False, **settings
    )
    fit = trainer(callbacks=[*hooks, dp], max_epochs=3, limit_val_batches=1)
    loader = DataLoader(data(ROWS) if dataset is None else dataset, batch_size=12)
    fit.fit(module, loader, DataLoader(data(4), batch_size=4))
    return dp


def pairs(changes):
    places = list(PLACES)
    return [
        (places[(number + shift) % len(places)], change)
        for number, change in enumerate(changes)
        for shift in range(4)
    ]


@pytest.mark.parametrize(("place", "change"), pairs(UNSOUND))
def test_what_is_kept_of_the_records_is_refused(place, change):
    module, hooks = PLACES[place](change)
    with pytest.raises(PrivacyError, match=r"`(mean|teacher\.weight)`") as caught:
        fitted(module, hooks)
    assert "The last look that found nothing was after step" in str(caught.value)


@pytest.mark.parametrize(("place", "change"), pairs(SOUND))
def test_what_is_kept_of_weights_and_counters_trains(place, change):
    module, hooks = PLACES[place](change)
    assert fitted(module, hooks).steps == 6


def test_without_a_self_test_the_user_answers_for_it():
    module, hooks = PLACES["after a batch"](running_mean)
    assert fitted(module, hooks, selftest=False).steps == 6


def test_what_is_computed_of_held_out_data_may_stay():
    class Calibrated(Net):
        @torch.no_grad()
        def on_validation_epoch_end(self):
            self.mean.add_(self.losses[-1])

    module = Calibrated()
    assert fitted(module, []).steps == 6
    assert module.mean.abs().sum() > 0


def nothing(module, batch):
    pass


class Fails(After):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if type(trainer) is not pl.Trainer:
            raise OSError("no such file")
        self.change(pl_module, batch)


def test_what_cannot_be_tried_may_not_write():
    assert fitted(Net(), [Fails(nothing)]).steps == 6
    with pytest.raises(PrivacyError, match=r"Fails.on_train_batch_end: OSError: no such file"):
        fitted(Net(), [Fails(schedule)])


class OnlyInEarnest(After):
    def __deepcopy__(self, memo):
        return After(nothing)


def test_what_no_trial_shows_is_refused():
    with pytest.raises(PrivacyError, match=r"`mean`, which something changed after the step"):
        fitted(Net(), [OnlyInEarnest(schedule)])


class AroundBackward(Net):
    """Writes a mean of the batch within the step, in steps that are no last ones of an epoch."""

    def training_step(self, batch, batch_idx):
        self.seen = batch[0]
        return super().training_step(batch, batch_idx)

    def on_after_backward(self):
        if self.global_step % 4 == 1:
            with torch.no_grad():
                self.mean.lerp_(self.seen.mean(0), 0.1)


class Counting(AroundBackward):
    def on_after_backward(self):
        self.count += 1


class FailsAround(Counting):
    def on_after_backward(self):
        if type(self.trainer) is not pl.Trainer:
            raise OSError("no such file")
        super().on_after_backward()


def many_steps(module, hooks=(), **settings):
    """Epochs of eight steps, the expected batch of the others."""
    dp = DifferentialPrivacy(noise_multiplier=1.0, delta=1e-3, max_grad_norm=1.0, ledger=False)
    fit = trainer(callbacks=[*hooks, dp], **{"max_epochs": 2, **settings})
    fit.fit(module, DataLoader(data(8 * ROWS), batch_size=ROWS))
    return dp


def test_hooks_around_the_backward_are_seen_at_any_step():
    with pytest.raises(PrivacyError, match="`mean`"):
        many_steps(AroundBackward())
    with pytest.raises(PrivacyError, match=r"FailsAround.on_after_backward: OSError"):
        many_steps(FailsAround())
    assert many_steps(Counting()).steps == 16


class ByClass(Net):
    """Weights of classes, from the losses of the last batch of an epoch, in an attribute."""

    weights = torch.ones(3)

    def training_step(self, batch, batch_idx):
        losses = F.cross_entropy(self.net(batch[0]), batch[1], reduction="none")
        self.seen = losses.detach(), batch[1]
        return (losses * self.weights[batch[1]]).mean()

    def on_train_epoch_end(self):
        losses, y = self.seen
        self.weights = torch.stack([losses[y == c].mean() for c in range(3)]).nan_to_num(1.0)


@pytest.mark.parametrize("limit", [1.0, 3])
def test_the_end_of_an_epoch_is_seen_where_it_comes_early_too(limit):
    with pytest.raises(PrivacyError):
        many_steps(ByClass(), limit_train_batches=limit, max_epochs=4)


class Centers(pl.Callback):
    """Reads in one hook what a forward hook of its own kept."""

    def on_fit_start(self, trainer, pl_module):
        pl_module.net.register_forward_hook(self.keep)

    def keep(self, module, args, out):
        self.seen = args[0].detach()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        pl_module.mean.mul_(0.9).add_(0.1 * self.seen.mean(0))


class HoldsParts(pl.Callback):
    """An average of the weights, by the parts that it took at the start."""

    def on_fit_start(self, trainer, pl_module):
        self.pairs = [*zip(pl_module.teacher.parameters(), pl_module.net.parameters(), strict=True)]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        for mine, its in self.pairs:
            mine.data.lerp_(its.data, 0.1)


def test_a_trial_has_the_parts_of_its_own_copy():
    with pytest.raises(PrivacyError, match="`mean`"):
        fitted(Net(), [Centers()])
    assert fitted(Net(), [HoldsParts()]).steps == 6


# --- weights of records


class Weighted(Dataset):
    def __init__(self, kind):
        self.points, self.weights = data(ROWS), kind(ROWS)

    def __len__(self):
        return ROWS

    def __getitem__(self, i):
        return *self.points[i], float(self.weights[i]), i


class WeightedNet(Net):
    """Records are weighted by their share of the last losses, or each by its own."""

    kept = None

    def __init__(self, shares):
        super().__init__()
        self.shares = shares

    def training_step(self, batch, batch_idx):
        x, y, weight, i = batch
        losses = F.cross_entropy(self.net(x), y, reduction="none")
        self.kept = losses.detach().double().cpu(), i.cpu()
        return (losses * weight.to(x.dtype)).mean()

    def on_train_epoch_end(self):
        losses, i = self.kept
        new = losses / losses.sum() if self.shares else losses.clamp(max=2.0)
        weights = self.trainer.train_dataloader.dataset.weights
        for place, value in zip(i.tolist(), new.tolist(), strict=True):
            weights[place] = value


KINDS = {
    "array": lambda n: torch.ones(n).numpy(),
    "tensor": torch.ones,
    "list": lambda n: [1.0] * n,
    "dict": lambda n: dict.fromkeys(range(n), 1.0),
}


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_records_share_are_found(kind):
    dataset = Weighted(KINDS[kind])
    with pytest.raises(PrivacyError, match="nor in the batch before"):
        fitted(WeightedNet(shares=True), [], dataset)


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_of_each_record_alone_trains(kind):
    dataset = Weighted(KINDS[kind])
    assert fitted(WeightedNet(shares=False), [], dataset).steps == 6


# --- a loop of one's own


def beside_it(model):
    """A teacher that follows the weights, in a copy of the model: the cure that the error names."""
    teacher = copy.deepcopy(model.net).requires_grad_(False)

    def between(module, batch):
        for mine, its in zip(teacher.parameters(), module.net.parameters(), strict=True):
            mine.mul_(0.9).add_(0.1 * its)

    def loss(module, batch):
        out = module.net(batch[0])
        return F.cross_entropy(out, batch[1]) + F.mse_loss(out, teacher(batch[0]))

    return between, loss


def test_a_teacher_beside_the_model_trains():
    assert loop(*beside_it(Net())) == 4


def loop(between, loss=None, dataset=None, adversarial=None):
    model = Net()
    optimizer = torch.optim.SGD(model.net.parameters(), lr=0.1)
    privacy = Privacy(noise_multiplier=1.0, delta=1e-3, max_grad_norm=1.0, ledger=False)
    plain = loss or (lambda m, b: F.cross_entropy(m.net(b[0]), b[1]))
    loader = DataLoader(dataset or data(ROWS), batch_size=12)
    run = make_private(
        model, optimizer, loader, loss=plain, epochs=2, privacy=privacy, adversarial=adversarial
    )
    with run as private:
        for _ in range(2):
            for batch in private.loader:
                private.step(batch)
                with torch.no_grad():
                    between(model, batch)
        return private.steps


@pytest.mark.parametrize("change", UNSOUND)
def test_in_a_loop_of_ones_own_nothing_is_kept_between_steps(change):
    with pytest.raises(PrivacyError, match="changed between two steps"):
        loop(change)
    assert loop(figures) == 4


def test_the_cure_is_to_do_it_in_the_loss():
    def averaging(model, batch):
        average_of_weights(model, batch)
        return F.cross_entropy(model.net(batch[0]), batch[1])

    assert loop(figures, averaging) == 4


class State:
    """Where programs keep things that belong to no object."""

    mean = None


MEAN = None


def kept_in(name):
    """A loop that keeps a mean of the batch where it is named, and its loss uses it."""
    dataset, local, both = Weighted(KINDS["tensor"]), None, SimpleNamespace(a=None, b=None)
    attack = SimpleNamespace(shift=torch.zeros(8))
    frozen = nn.Parameter(torch.zeros(8), requires_grad=False)

    def loss(module, batch):
        x, y, weight, _ = batch
        places = {
            "attribute": getattr(module, "proto", None),
            "part": module.net.__dict__.get("proto"),
            "closure": local,
            "global": MEAN,
            "list": module.losses[0] if module.losses else None,
            "new dict": getattr(module, "stats", {}).get("mean"),
            "class": State.mean,
            "function": getattr(loss, "mean", None),
            "one of two": both.a,
            "parameter": frozen,
        }
        mean = places.get(name)
        out = module.net(x if mean is None else x - mean)
        return (F.cross_entropy(out, y, reduction="none") * weight).mean()

    def between(module, batch):
        nonlocal local
        global MEAN
        mean = batch[0].mean(0)
        if name == "attribute":
            module.proto = mean
        elif name == "part":
            module.net.__dict__["proto"] = mean
        elif name == "closure":
            local = mean
        elif name == "global":
            MEAN = mean
        elif name == "list":
            module.losses.append(mean)
        elif name == "weights":
            dataset.weights.mul_(0.5 + mean.norm())
        elif name == "new dict":
            module.stats = {"mean": mean}
        elif name == "class":
            State.mean = mean
        elif name == "function":
            loss.mean = mean
        elif name == "one of two":
            both.a, both.b = mean, mean.clone()
        elif name == "attack":
            attack.shift = mean
        elif name == "parameter":
            frozen.copy_(mean)

    def shifted(model, x, y, **_):
        return x + attack.shift

    return dataset, loss, between, Adversarial(shifted) if name == "attack" else None


KEPT_IN = (
    "attribute", "part", "closure", "global", "list", "weights", "new dict", "class", "function",
    "one of two", "attack", "parameter",
)  # fmt: skip


@pytest.mark.parametrize("name", KEPT_IN)
def test_in_a_loop_of_ones_own_the_loss_uses_nothing_that_was_kept(name, monkeypatch):
    monkeypatch.setitem(globals(), "MEAN", None)
    monkeypatch.setattr(State, "mean", None)
    dataset, loss, between, adversarial = kept_in(name)
    with pytest.raises(PrivacyError, match="changed between two steps, and goes into gradients"):
        loop(between, loss, dataset, adversarial)


class Cached(Weighted):
    """Each item is a function of its own record, computed once."""

    def __init__(self):
        super().__init__(KINDS["tensor"])
        self.cache, self.done = torch.zeros(ROWS, 8), torch.zeros(ROWS, dtype=torch.bool)

    def __getitem__(self, i):
        x, *rest = super().__getitem__(i)
        if not self.done[i]:
            self.cache[i], self.done[i] = x.tanh(), True
        return self.cache[i].clone(), *rest


def test_a_data_set_may_keep_what_it_computed():
    _, loss, _, _ = kept_in("nothing")
    assert loop(lambda *_: None, loss, Cached()) == 4


def test_in_a_loop_of_ones_own_what_is_kept_may_be_looked_at():
    def between(module, batch):
        module.proto = batch[0].mean(0)
        module.losses.append(batch[0].mean(0))
        module.temperature = 0.9 * getattr(module, "temperature", 1.0)
        module.tied = module.net.weight.detach()

    def loss(module, batch):
        out = module.net(batch[0]) / getattr(module, "temperature", 1.0)
        out = out + (batch[0] @ getattr(module, "tied", module.net.weight.detach()).T)
        return F.cross_entropy(out, batch[1])

    assert loop(between, loss) == 4


def test_in_a_loop_that_ends_early_too():
    """What is computed after the last batch of a pass that was left before its end."""
    model = Net()
    optimizer = torch.optim.SGD(model.net.parameters(), lr=0.1)
    privacy = Privacy(noise_multiplier=1.0, delta=1e-3, max_grad_norm=1.0, ledger=False)
    shift = {"mean": torch.zeros(8)}  # the name of a buffer, too

    def loss(module, batch):
        return F.cross_entropy(module.net(batch[0] - shift["mean"]), batch[1])

    def passes(after, seed=0):
        loader = DataLoader(data(ROWS * 4, seed=seed), 12)
        run = make_private(model, optimizer, loader, loss=loss, epochs=4, privacy=privacy)
        with run as private:
            for _ in range(2):
                for batch in itertools.islice(private.loader, 3):
                    private.step(batch)
                after(batch)
            return private.steps

    assert passes(lambda batch: None) == 6
    with pytest.raises(PrivacyError, match="changed between two steps, and goes into"):
        passes(lambda batch: shift.update(mean=batch[0].mean(0)), seed=1)


def test_a_hook_of_the_optimizer_that_comes_later_runs_before_the_guard():
    model = Net()
    optimizer = torch.optim.SGD(model.net.parameters(), lr=0.1)
    privacy = Privacy(noise_multiplier=1.0, delta=1e-3, max_grad_norm=1.0, ledger=False)
    run = make_private(
        model,
        optimizer,
        DataLoader(data(ROWS), 12),
        loss=lambda m, b: F.cross_entropy(m.net(b[0]), b[1]),
        epochs=1,
        privacy=privacy,
    )

    def adds(*_):
        model.net.weight.grad.add_(1.0)

    with run as private:
        optimizer.register_step_pre_hook(adds)
        with pytest.raises(PrivacyError, match="one that was changed after the noise was added"):
            private.step(next(iter(private.loader)))


def test_a_view_of_weights_that_train_is_none_of_what_is_kept():
    """For a live plot, say; it changes with each step."""

    def plot(model, batch):
        model.plotted = model.net.weight.detach().numpy()[1:]

    assert loop(plot, lambda m, b: F.cross_entropy(m.net(b[0]), b[1])) == 4


def test_of_what_is_kept_all_is_looked_at():
    bank = torch.zeros(2**18 + 8)

    def loss(module, batch):
        return F.cross_entropy(module.net(batch[0] - bank[-8:]), batch[1])

    def between(model, batch):
        bank[-8:] = batch[0].mean(0)

    with pytest.raises(PrivacyError, match="changed between two steps, and goes into"):
        loop(between, loss)
