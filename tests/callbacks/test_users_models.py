"""What users bring to a private fit: models, against plain training (see users.py)."""

import os

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

from defend import PrivacyError
from tests.callbacks.users import Bare, all_words, assert_equal_to_plain, everything, fit, private
from tests.helpers import Net


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
