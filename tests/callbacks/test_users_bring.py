"""What users bring to a private fit: schedules, ways to clip, models, data, and other callbacks.

Models are checked against plain training. With all records in each batch (q = 1), no noise and a C
that clips nothing, a private step is the plain full-batch step, whatever its chunks.
"""

import csv
import dataclasses
import math
import os

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.callbacks.weight_averaging import EMAWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from defend import DifferentialPrivacy, PrivacyError
from defend.privacy import PoissonBatchSampler, Randomness, epsilon
from defend.privacy.clipping import AdaptiveClipping, FlatClipping, PerLayerClipping
from defend.privacy.schedules import Decay
from tests.helpers import Net, data, flat, loader, trainer

C, SEED = 0.5, 5


def private(**settings):
    """Noised, but repeatable."""
    fixed = {"delta": 1e-3, "max_grad_norm": C, "noise_multiplier": 0.7, "accountant": "rdp"}
    return DifferentialPrivacy(**{**fixed, "insecure_seed": SEED, **settings})


def fit(callback, module=None, batches=None, *, val=None, ckpt=None, extra=(), **settings):
    """From the weights of seed 0; 256 records in expected batches of 32 unless told otherwise."""
    pl.seed_everything(0)
    module = Net() if module is None else module() if isinstance(module, type) else module
    run = trainer(callbacks=[callback, *extra], **settings)
    run.fit(module, batches or loader(256, 32), val, ckpt_path=ckpt)
    assert callback.steps == run.global_step
    return module, run


class Releases(Callback):
    """Keeps the gradients that reach the optimizer."""

    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen.append(torch.cat([p.grad.flatten() for p in pl_module.parameters()]))


class Silent(Net):
    """A loss that does not depend on the data: the released gradients are noise alone."""

    def training_step(self, batch, batch_idx):
        return 0.0 * self(batch[0]).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def deviations(**settings):
    """The deviation of the noise on the sum, in units of C, step by step."""
    spy = Releases()
    fit(private(**settings), Silent, extra=[spy], max_epochs=2)
    return (torch.stack(spy.seen).double() * 32 / C).std(1)


# --- schedules --------------------------------------------------------------------------------


def test_a_noise_schedule_is_what_is_charged():
    callback = private(noise_multiplier=4.0, noise_schedule=Decay(0.5, every=3), accountant="prv")
    fit(callback)
    assert callback.history == ((4.0, 1 / 8, 3), (2.0, 1 / 8, 3), (1.0, 1 / 8, 2))
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, pld

    def composed(noises):
        accountant = pld.PLDAccountant(value_discretization_interval=1e-3)
        for noise in noises:
            accountant.compose(PoissonSampledDpEvent(1 / 8, GaussianDpEvent(noise)))
        return accountant.get_epsilon(1e-3)

    noises = [4.0 * 0.5 ** (t // 3) for t in range(8)]
    assert callback.epsilon == pytest.approx(composed(noises), rel=2e-2)
    # The same figure rejects a constant σ, and a schedule that is a step late.
    for wrong in ([4.0] * 8, [4.0, *noises[:-1]]):
        assert callback.epsilon != pytest.approx(composed(wrong), rel=2e-2)


def test_a_noise_schedule_is_what_is_added():
    expected = torch.tensor([2.0 * 0.8 ** (t // 4) for t in range(16)], dtype=torch.float64)
    found = deviations(noise_multiplier=2.0, noise_schedule=Decay(0.8, every=4))
    stairs = (found / expected).view(4, 4).pow(2).mean(1).sqrt()
    error = 1 / (2 * 4 * flat(Net()).numel()) ** 0.5
    assert ((stairs - 1).abs() < 4 * error).all()
    late = torch.tensor([1.0, 1 / 0.8, 1 / 0.8, 1 / 0.8])
    assert not ((stairs * late - 1).abs() < 4 * error).all()


def test_a_target_is_met_with_a_schedule():
    callback = private(noise_multiplier=None, target_epsilon=3.0, noise_schedule=Decay(0.95))
    fit(callback, max_epochs=2)
    first = callback.noise_multiplier
    assert [s.noise_multiplier for s in callback.history] == pytest.approx(
        [first * 0.95**t for t in range(16)]
    )
    steps = [(first * 0.95**t, 1 / 8, 1) for t in range(16)]
    assert 2.95 < callback.epsilon <= 3.0
    assert callback.epsilon == pytest.approx(epsilon(steps, 1e-3, "rdp"))


def test_a_resume_goes_on_at_its_place_in_the_schedules(tmp_path):
    """Noise, C and weights of a run in two parts are those of a run in one."""

    def run(ckpt=None, **settings):
        callback = private(noise_schedule=Decay(0.9, every=2), clip_schedule=Decay(0.8, every=3))
        module, program = fit(callback, ckpt=ckpt, **settings)
        return callback, module, program

    straight, module, _ = run(max_epochs=2)
    _, _, half = run(max_epochs=1)
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed, other, _ = run(tmp_path / "half.ckpt", max_epochs=2)
    noises = [s.noise_multiplier for s in resumed.history for _ in range(s.steps)]
    assert noises == pytest.approx([0.7 * 0.9 ** (t // 2) for t in range(16)])
    assert resumed.epsilon == pytest.approx(straight.epsilon)
    assert resumed.max_grad_norm == straight.max_grad_norm == C * 0.8**5
    torch.testing.assert_close(flat(other), flat(module), rtol=0, atol=1e-6)


def test_noise_follows_a_clip_schedule():
    found = deviations(noise_multiplier=2.0, clip_schedule=Decay(0.5, every=8))
    expected = torch.tensor([2.0] * 8 + [1.0] * 8, dtype=torch.float64)
    error = 1 / (2 * 8 * flat(Net()).numel()) ** 0.5
    halves = (found / expected).view(2, 8).pow(2).mean(1).sqrt()
    assert ((halves - 1).abs() < 4 * error).all()
    assert abs(0.5 * halves[0] - 1) > 4 * error  # noise of the second half in the first


# --- ways to clip, against a slow reference -----------------------------------------------------


def record_gradients(module, records):
    """One backward a record."""
    gradients = []
    for x, y in records:
        loss = F.cross_entropy(module(x), y)
        gradients.append(torch.autograd.grad(loss, list(module.parameters())))
    return gradients


def cut(tensors, norm):
    """The tensors, scaled to at most this norm together."""
    length = float(torch.cat([t.flatten() for t in tensors]).norm())
    return [t * min(1.0, norm / length) for t in tensors]


def slow_training(clip_batch, steps):
    """`Net` as `fit` trains it, without noise. clip_batch(step, gradients) → clipped ones."""
    pl.seed_everything(0)
    module = Net()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
    x, y = data(256).tensors
    sampler = PoissonBatchSampler(256, 1 / 8, 8, Randomness(insecure_seed=SEED))
    for step in range(steps):
        hits = sampler.sample(step)
        records = [(x[i : i + 1], y[i : i + 1]) for i in hits]
        clipped = clip_batch(step, record_gradients(module, records))
        for p, of_records in zip(module.parameters(), zip(*clipped, strict=True), strict=True):
            p.grad = sum(of_records) / 32
        optimizer.step()
    return module


def equal(one, other):
    return torch.allclose(flat(one), flat(other), rtol=0, atol=1e-5)


@pytest.mark.parametrize("chunk_size", [None, 7])
def test_a_clip_schedule_equals_the_slow_reference(chunk_size):
    settings = {"noise_multiplier": 0.0, "clip_schedule": Decay(0.5, every=2)}
    module, _ = fit(private(**settings, chunk_size=chunk_size), max_steps=5)
    norms = [C, C, C / 2, C / 2, C / 4]
    assert equal(module, slow_training(lambda t, gs: [cut(g, norms[t]) for g in gs], 5))
    assert not equal(module, slow_training(lambda t, gs: [cut(g, C) for g in gs], 5))


@pytest.mark.parametrize("chunk_size", [None, 7])
def test_per_layer_clipping_equals_the_slow_reference(chunk_size):
    callback = private(noise_multiplier=0.0, clipping=PerLayerClipping(), chunk_size=chunk_size)
    module, _ = fit(callback, max_steps=4)

    def by_layer(share):
        return lambda t, gs: [[cut([p], share)[0] for p in g] for g in gs]

    assert equal(module, slow_training(by_layer(C / 2), 4))  # 4 parameters: C / √4
    assert not equal(module, slow_training(by_layer(C), 4))
    assert not equal(module, slow_training(lambda t, gs: [cut(g, C) for g in gs], 4))


def slow_adaptive(steps, rate, quantile):
    """Adaptive clipping; also gives C after the last step."""
    norm = C

    def clip_batch(t, gradients):
        nonlocal norm
        clipped = [cut(g, norm) for g in gradients]
        lengths = [float(torch.cat([p.flatten() for p in g]).norm()) for g in gradients]
        below = 0.5 + sum((1 if length <= norm else 0) - 0.5 for length in lengths) / 32
        norm *= math.exp(-rate * (below - quantile))
        return clipped

    return slow_training(clip_batch, steps), norm


@pytest.mark.parametrize("chunk_size", [None, 7])
def test_adaptive_clipping_equals_the_slow_reference(chunk_size):
    clipping = AdaptiveClipping(target_quantile=0.7, learning_rate=0.3)
    callback = private(noise_multiplier=0.0, clipping=clipping, chunk_size=chunk_size)
    module, _ = fit(callback, max_epochs=1)
    reference, norm = slow_adaptive(8, rate=0.3, quantile=0.7)
    assert equal(module, reference)
    assert callback.max_grad_norm == pytest.approx(norm, rel=1e-5)
    other, wrong = slow_adaptive(8, rate=0.3, quantile=0.5)
    assert not equal(module, other)
    assert callback.max_grad_norm != pytest.approx(wrong, rel=1e-5)


class Fixed(Net):
    """Never moves, so the gradient norms stay what they are."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.mark.parametrize("start", [0.01, 50.0])
def test_adaptive_clipping_finds_the_quantile(start):
    clipping = AdaptiveClipping(target_quantile=0.75, learning_rate=0.3)
    callback = private(max_grad_norm=start, noise_multiplier=1.0, clipping=clipping)
    module, _ = fit(callback, Fixed, max_epochs=8)
    x, y = data(256).tensors
    pairs = [(x[i : i + 1], y[i : i + 1]) for i in range(256)]
    norms = [
        float(torch.cat([p.flatten() for p in g]).norm()) for g in record_gradients(module, pairs)
    ]
    share = sum(n <= callback.max_grad_norm for n in norms) / 256
    assert abs(share - 0.75) < 0.2  # at the start it is 0 or 1


def test_adaptive_clipping_costs_what_flat_clipping_costs():
    flatly, adaptively = private(), private(clipping=AdaptiveClipping())
    fit(flatly)
    fit(adaptively)
    assert adaptively.history == flatly.history
    assert adaptively.epsilon == flatly.epsilon
    assert adaptively.max_grad_norm != C


def test_a_checkpoint_keeps_what_adaptive_clipping_learned(tmp_path):
    straight, first, second = (private(clipping=AdaptiveClipping()) for _ in range(3))
    module, _ = fit(straight, max_epochs=2)
    _, half = fit(first, max_epochs=1)
    half.save_checkpoint(tmp_path / "half.ckpt")
    learned = torch.load(tmp_path / "half.ckpt", weights_only=True)["callbacks"]
    assert learned[first.state_key]["max_grad_norm"] == first.max_grad_norm != C
    resumed, _ = fit(second, ckpt=tmp_path / "half.ckpt", max_epochs=2)
    assert second.max_grad_norm == pytest.approx(straight.max_grad_norm, rel=1e-6)
    torch.testing.assert_close(flat(resumed), flat(module), rtol=0, atol=1e-6)


# --- models, against plain training -------------------------------------------------------------


def plain_and_private(make, batches, *, epochs=3, chunk_size=5, weights=flat, **settings):
    """The weights after training on all records at each step, plainly and privately.

    Args:
        make: gives a module; called under the same seed.
        batches: gives a loader whose batch holds all records, or a data module.
    """
    found = []
    for callback in (
        None,
        private(noise_multiplier=0.0, max_grad_norm=1e9, chunk_size=chunk_size, selftest=True),
    ):
        pl.seed_everything(0)
        module = make()
        before = weights(module)
        run = trainer(callbacks=[callback] if callback else [], max_epochs=epochs, **settings)
        run.fit(module, batches())
        assert run.global_step == epochs
        assert not torch.equal(weights(module), before)
        found.append(weights(module))
    assert callback.steps == epochs
    assert callback.selftest.passed
    return found


def assert_equal_to_plain(make, batches, *, atol=1e-5, **settings):
    plain, privately = plain_and_private(make, batches, **settings)
    torch.testing.assert_close(privately, plain, rtol=0, atol=atol)


def everything(records=24):
    return DataLoader(data(records), batch_size=records)


class Bare(pl.LightningModule):
    """A module whose parts are given; cross-entropy on (input, class)."""

    def __init__(self, *parts):
        super().__init__()
        self.net = nn.Sequential(*parts)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.2)


def words(records=24, length=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 11, (records, length), generator=generator)
    return TensorDataset(ids, ids.sum(1) % 3)


def all_words():
    return DataLoader(words(), batch_size=24)


def test_a_frozen_backbone():
    class Tuned(Bare):
        def __init__(self):
            super().__init__(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
            self.net[0].requires_grad_(False)

        def configure_optimizers(self):
            return torch.optim.SGD(self.net[2].parameters(), lr=0.2)

    assert_equal_to_plain(Tuned, everything)
    pl.seed_everything(0)
    frozen = Tuned().net[0].weight.clone()
    module, _ = fit(private(), Tuned)
    assert torch.equal(module.net[0].weight, frozen)
    assert not module.net[0].weight.requires_grad


class Groups(Net):
    """Groups with settings of their own, one frozen in part."""

    def configure_optimizers(self):
        first, last = self.net[0], self.net[2]
        return torch.optim.SGD(
            [
                {"params": first.parameters(), "lr": 0.3, "momentum": 0.5},
                {"params": [last.weight], "lr": 0.05, "weight_decay": 0.1},
                {"params": [last.bias], "lr": 0.0},
            ],
            lr=0.1,
        )


def test_several_parameter_groups():
    assert_equal_to_plain(Groups, everything)
    pl.seed_everything(0)
    bias = Groups().net[2].bias.clone()
    module, run = fit(private(), Groups)
    assert torch.equal(module.net[2].bias, bias)  # its lr is 0
    assert [g["lr"] for g in run.optimizers[0].param_groups] == [0.3, 0.05, 0.0]


class PerEpoch(Net):
    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=0.05)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.1)]


@pytest.mark.parametrize("make", [lambda: Net(schedule=True), PerEpoch], ids=["cycle", "epoch"])
def test_learning_rate_schedulers(make):
    assert_equal_to_plain(make, everything, epochs=5)


class Checkpointed(Net):
    def forward(self, x):
        return self.net[2](checkpoint(self.net[:2], x, use_reentrant=False))


def test_gradient_checkpointing():
    assert_equal_to_plain(Checkpointed, everything)


class Recurrent(pl.LightningModule):
    def __init__(self):
        super().__init__()
        from opacus.layers import DPLSTM

        self.embedding = nn.Embedding(11, 6)
        self.lstm = DPLSTM(6, 8, batch_first=True)
        self.head = nn.Linear(8, 3)

    def training_step(self, batch, batch_idx):
        hidden, _ = self.lstm(self.embedding(batch[0]))
        return F.cross_entropy(self.head(hidden[:, -1]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.2)


def test_an_embedding_and_an_lstm():
    assert_equal_to_plain(Recurrent, all_words)


class Block(nn.Module):
    """Causal self-attention written by hand."""

    def __init__(self, width=8, heads=2):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(mixed.transpose(1, 2).flatten(2))


class OpacusAttention(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        from opacus.layers import DPMultiheadAttention

        self.attention = DPMultiheadAttention(width, 2, batch_first=True)

    def forward(self, x):
        return x + self.attention(x, x, x, need_weights=False)[0]


class Attending(pl.LightningModule):
    """Tokens and learned positions of shape [1, T]."""

    def __init__(self, block):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(11, 8), nn.Embedding(6, 8)
        self.block, self.head = block(), nn.Linear(8, 3)

    def training_step(self, batch, batch_idx):
        ids = batch[0]
        places = torch.arange(ids.shape[1]).unsqueeze(0)
        h = self.block(self.tokens(ids) + self.positions(places))
        return F.cross_entropy(self.head(h.mean(1)), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.2)


@pytest.mark.parametrize("block", [Block, OpacusAttention])
def test_attention(block):
    assert_equal_to_plain(lambda: Attending(block), all_words)


class Texts(Dataset):
    """Texts of different lengths, as a tokenizer leaves them."""

    def __len__(self):
        return 20

    def __getitem__(self, i):
        ids = torch.arange(i, i + 3 + i % 4) % 29 + 1
        return {"input_ids": ids, "labels": torch.tensor(i % 2)}


def pad(rows):
    ids = pad_sequence([row["input_ids"] for row in rows], batch_first=True)
    labels = torch.stack([row["labels"] for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}


class Classifier(pl.LightningModule):
    """A Hugging Face model from a config: nothing is downloaded."""

    def __init__(self):
        super().__init__()
        from transformers import BertConfig, BertForSequenceClassification

        self.model = BertForSequenceClassification(
            BertConfig(
                vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                intermediate_size=32, max_position_embeddings=16,
                hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
            )
        )  # fmt: skip

    def training_step(self, batch):
        return self.model(**batch).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.2)


def test_a_hugging_face_classifier(monkeypatch):
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
    assert_equal_to_plain(Classifier, lambda: DataLoader(Texts(), batch_size=20, collate_fn=pad))


class FrozenNorm(Bare):
    """BatchNorm on public statistics, kept in eval mode, until it is woken up."""

    wakes_up = False

    def __init__(self):
        super().__init__(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
        self.net[1].running_mean += 0.3
        self.net[1].requires_grad_(False)
        self.train()

    def train(self, mode=True):
        super().train(mode)
        self.net[1].eval()
        return self

    def on_train_epoch_start(self):
        if self.wakes_up and self.current_epoch == 1:
            self.net[1].train()

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.2)


def test_a_frozen_batch_norm_works_while_it_sleeps():
    assert_equal_to_plain(FrozenNorm, everything)


@pytest.mark.parametrize(
    ("selftest", "message"),
    [(True, "self-test|frozen BatchNorm"), (False, "frozen BatchNorm layers to stay in eval mode")],
)
def test_a_frozen_batch_norm_that_wakes_up_is_refused(monkeypatch, selftest, message):
    monkeypatch.setattr(FrozenNorm, "wakes_up", True)
    callback = private(selftest=selftest)
    with pytest.raises(PrivacyError, match=message):
        fit(callback, FrozenNorm, max_epochs=2)
    assert callback.steps == 8


# --- batches and data modules -------------------------------------------------------------------


@dataclasses.dataclass
class Batch:
    x: torch.Tensor
    y: torch.Tensor


def stack(rows, kind):
    x, y = (torch.stack(column) for column in zip(*rows, strict=True))
    return {"tuple": (x, y), "dict": {"x": x, "y": y}, "dataclass": Batch(x, y)}[kind]


def fields(batch):
    if isinstance(batch, tuple | list):
        return batch
    return (batch["x"], batch["y"]) if isinstance(batch, dict) else (batch.x, batch.y)


class AnyBatch(Net):
    def training_step(self, batch, batch_idx):
        x, y = fields(batch)
        return F.cross_entropy(self(x), y)


@pytest.mark.parametrize("kind", ["tuple", "dict", "dataclass"])
def test_kinds_of_batches(kind):
    def batches():
        collate = lambda rows: stack(rows, kind)  # noqa: E731
        return DataLoader(data(24), batch_size=24, collate_fn=collate)

    assert_equal_to_plain(AnyBatch, batches)


class Augmented(pl.LightningDataModule):
    """Shifts the inputs in training, after they are on the device."""

    noise = 0.0

    def setup(self, stage):
        self.dataset = data(24)

    def train_dataloader(self):
        return DataLoader(self.dataset, batch_size=24)

    def val_dataloader(self):
        return DataLoader(self.dataset, batch_size=24)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        x, y = batch
        if self.trainer.training:
            x = x + 0.5 + self.noise * torch.randn_like(x)
        return x, y


def test_a_data_module_that_augments_batches(monkeypatch):
    assert_equal_to_plain(Net, Augmented)
    shifted = plain_and_private(Net, Augmented)[1]
    assert not torch.allclose(shifted, plain_and_private(Net, everything)[1], atol=1e-3)
    monkeypatch.setattr(Augmented, "noise", 0.1)
    callback = private()
    module = Net()
    trainer(callbacks=[callback], max_epochs=4).fit(module, datamodule=Augmented())
    assert callback.steps == 4
    assert callback.selftest.passed


def test_persistent_workers_change_nothing():
    modules = []
    for workers in (0, 2):
        batches = loader(256, 32, num_workers=workers, persistent_workers=workers > 0)
        modules.append(fit(private(chunk_size=7), batches=batches, max_epochs=2)[0])
    torch.testing.assert_close(flat(modules[0]), flat(modules[1]), rtol=0, atol=0)


# --- what modules do in a training step ---------------------------------------------------------


class Busy(Net):
    """Takes no index, measures, reads the trainer, and writes to the logger itself."""

    def __init__(self, width=16, lr=0.05):
        super().__init__(lr=lr)
        self.save_hyperparameters()
        self.accuracy = MulticlassAccuracy(num_classes=3)
        self.activation = lambda x: x.tanh()
        self.places = []

    def training_step(self, batch):
        x, y = batch
        scores = self.activation(self(x))
        self.places.append((self.trainer.global_step, self.current_epoch))
        self.accuracy(scores, y)
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        self.logger.experiment.log_metrics(
            {"by_hand": float(self.trainer.global_step)}, step=len(self.places) - 1
        )
        return F.cross_entropy(scores, y)


def busy_run(tmp_path, *callbacks, **settings):
    logger = CSVLogger(tmp_path)
    pl.seed_everything(0)
    module = Busy()
    run = trainer(callbacks=list(callbacks), logger=logger, log_every_n_steps=100, **settings)
    run.fit(module, everything())
    return module, run


def test_a_busy_training_step(tmp_path):
    callback = private(noise_multiplier=0.0, max_grad_norm=1e9)
    results = [busy_run(tmp_path, *extra, max_epochs=3) for extra in ([], [callback])]
    (plain, plain_run), (module, run) = results
    assert module.places == plain.places == [(0, 0), (1, 1), (2, 2)]
    assert module.hparams == plain.hparams
    assert callback.steps == 3
    torch.testing.assert_close(flat(module), flat(plain), rtol=0, atol=1e-5)
    accuracy = [r.callback_metrics["accuracy"] for r in (plain_run, run)]
    torch.testing.assert_close(*accuracy)


def test_metrics_do_not_depend_on_chunks(tmp_path):
    found = []
    for chunk_size in (None, 7):
        callback = private(noise_multiplier=0.0, chunk_size=chunk_size)
        found.append(busy_run(tmp_path, callback)[1].callback_metrics["accuracy"])
    torch.testing.assert_close(*found)


def test_the_self_test_writes_nothing_to_the_logger(tmp_path):
    busy_run(tmp_path, private(), max_epochs=3)
    (path,) = tmp_path.rglob("metrics.csv")
    with path.open() as file:
        values = [row["by_hand"] for row in csv.DictReader(file)]
    assert [float(value) for value in values if value] == [0.0, 1.0, 2.0]


class Indexed(Net):
    """The second argument may have any name."""

    def training_step(self, batch, i):
        assert isinstance(i, int)
        return F.cross_entropy(self(batch[0]), batch[1])


def test_an_index_by_another_name():
    assert_equal_to_plain(Indexed, everything)


class Seeded(Net):
    """Augments from a generator of its own."""

    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(3)

    def training_step(self, batch, batch_idx):
        x, y = batch
        x = x + 0.3 * torch.randn(x.shape, generator=self.generator)
        return F.cross_entropy(self(x), y)


def test_a_generator_of_torch_on_the_module_is_not_secret():
    with pytest.raises(PrivacyError, match="random numbers from the global generators"):
        assert_equal_to_plain(Seeded, everything, chunk_size=None)


def test_a_generator_of_python_on_the_module_needs_the_self_test_off():
    class Counting(Net):
        def __init__(self):
            super().__init__()
            self.ids = (i for i in range(100))

        def training_step(self, batch, batch_idx):
            self.last = next(self.ids)
            return super().training_step(batch, batch_idx)

    with pytest.raises(PrivacyError, match=r"a module that can be copied .* pass selftest=False"):
        fit(private(), Counting)
    module, _ = fit(private(selftest=False), Counting)
    assert module.last == 7


class Uncopied(Dataset):
    """Large data: a copy would not fit."""

    def __init__(self, records):
        self.records, self.copies = data(records), 0

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i):
        return self.records[i]

    def __deepcopy__(self, memo):
        self.copies += 1
        return self


class Source(pl.LightningDataModule):
    def __init__(self):
        super().__init__()
        self.dataset = Uncopied(24)

    def train_dataloader(self):
        return DataLoader(self.dataset, batch_size=24)


def knowing(**settings):
    """A fit of a module that knows its trainer and its data module."""
    callback = private(**settings)
    pl.seed_everything(0)
    module, source = Net(), Source()
    run = trainer(callbacks=[callback], max_epochs=3)
    module.boss, module.source = run, source
    run.fit(module, datamodule=source)
    assert callback.steps == 3
    return module, source


def test_a_module_that_knows_its_trainer_and_data_module():
    plain, _ = plain_and_private(Net, everything)
    module, source = knowing(noise_multiplier=0.0, max_grad_norm=1e9)
    torch.testing.assert_close(flat(module), plain, rtol=0, atol=1e-5)
    assert module.source is source


def test_the_self_test_copies_no_data():
    assert knowing()[1].dataset.copies == 0


# --- weight averaging ---------------------------------------------------------------------------


class Averages(Callback):
    """The exponential average by hand, over the weights that the steps released."""

    def __init__(self, decay):
        self.decay, self.now, self.after = decay, None, {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        weights = flat(pl_module).clone()
        if self.now is None:
            self.now = weights
        else:
            self.now = self.decay * self.now + (1 - self.decay) * weights
        self.after[trainer.global_step] = (self.now, weights)


class Watched(Net):
    """Keeps the weights that it was validated with."""

    def __init__(self):
        super().__init__()
        self.validated = {}

    def validation_step(self, batch, batch_idx):
        self.validated[self.trainer.global_step] = flat(self).clone()
        super().validation_step(batch, batch_idx)


def weights_in(state):
    return torch.cat([value.flatten() for value in state.values()])


def test_an_exponential_average_of_the_released_weights(tmp_path):
    by_hand, callback = Averages(0.6), private(ledger=False)
    saved = ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=-1, filename="{step}")
    module, _ = fit(
        callback,
        Watched,
        val=loader(32, 32, seed=1),
        extra=[EMAWeightAveraging(decay=0.6), by_hand, saved],
        max_epochs=2,
        enable_checkpointing=True,
        num_sanity_val_steps=0,
    )
    assert callback.steps == 16
    torch.testing.assert_close(flat(module), by_hand.now, rtol=0, atol=1e-6)
    assert sorted(module.validated) == [8, 16]
    for step in (8, 16):
        average, current = by_hand.after[step]
        assert not torch.allclose(average, current, atol=1e-4)
        torch.testing.assert_close(module.validated[step], average, rtol=0, atol=1e-6)
        checkpoint = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)
        torch.testing.assert_close(weights_in(checkpoint["state_dict"]), average)
        torch.testing.assert_close(weights_in(checkpoint["current_model_state"]), current)
    resumed, _ = fit(
        private(ledger=False),
        Watched,
        ckpt=tmp_path / "step=8.ckpt",
        extra=[EMAWeightAveraging(decay=0.6)],
        max_epochs=2,
    )
    torch.testing.assert_close(flat(resumed), flat(module), rtol=0, atol=1e-6)


# --- the command line ---------------------------------------------------------------------------

CONFIG = """
trainer:
  max_epochs: 2
  accelerator: cpu
  devices: 1
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  default_root_dir: {folder}
  callbacks:
    - class_path: defend.DifferentialPrivacy
      init_args:
        delta: 1.0e-3
        max_grad_norm: 0.5
        noise_multiplier: 0.7
        chunk_size: 8
        noise_schedule:
          class_path: defend.privacy.schedules.Decay
          init_args: {{gamma: 0.9, every: 4}}
        clipping:
          class_path: defend.privacy.clipping.{clipping}
          init_args: {settings}
model:
  lr: 0.01
"""


class Plain(pl.LightningDataModule):
    def train_dataloader(self):
        return loader(64, 16)


@pytest.mark.parametrize(
    ("clipping", "settings"),
    [
        (FlatClipping(), "{}"),
        (PerLayerClipping(), "{}"),
        (AdaptiveClipping(target_quantile=0.9), "{target_quantile: 0.9}"),
    ],
    ids=["flat", "per_layer", "adaptive"],
)
def test_lightning_cli_builds_it_from_yaml(tmp_path, clipping, settings):
    pytest.importorskip("jsonargparse", reason="LightningCLI needs jsonargparse, an extra")
    from lightning.pytorch.cli import LightningCLI

    config = tmp_path / "config.yaml"
    name = type(clipping).__name__
    config.write_text(CONFIG.format(folder=tmp_path, clipping=name, settings=settings))
    cli = LightningCLI(
        Net,
        Plain,
        args=["fit", "--config", str(config)],
        save_config_callback=None,
    )
    callback = cli.trainer.callbacks[0]
    assert type(callback) is DifferentialPrivacy
    assert callback._private.settings.clipping == clipping
    assert callback.history == (
        (0.7, 1 / 4, 4),
        (0.7 * 0.9, 1 / 4, 4),
    )


def test_the_loss_goes_down_with_a_little_noise():
    val = loader(256, 256)
    losses = []
    for epochs in (1, 12):
        _, run = fit(private(noise_multiplier=0.01, insecure_seed=None), val=val, max_epochs=epochs)
        losses.append(float(run.callback_metrics["val_loss"]))
    assert losses[1] < 0.8 * losses[0]
