"""The check of the zoo: set-ups of each family pass, and planted unsound ones do not.

All of them: `python -m tests.zoo.check`.
"""

import importlib.util

import torch
import torch.nn.functional as F
from torch import nn

from tests.zoo import FAMILIES, all_setups
from tests.zoo.attention import Rotary, pad_texts
from tests.zoo.check import TOLERANCE, is_sound
from tests.zoo.records import points, texts
from tests.zoo.setup import Plain, SetUp

CHOSEN = {
    "transformers": "BERT, token classification, mean over each record's tokens",
    "peft": "LoRA with modules_to_save",
    "attention": "nn.MultiheadAttention, key padding and extra keys",
    "recurrent": "nn.LSTM, both directions, packed without sorting",
    "tabular": "wide & deep with nn.EmbeddingBag",
    "vision": "VAE with a convolutional encoder",
    "other": "GCN, graphs concatenated with a batch vector",
}


class TokenMean(Rotary):
    """Planted: the mean over all tokens of the batch, so long records count more."""

    def training_step(self, batch, batch_idx):
        ids, _ = batch
        logits = self(ids)[:, :-1].transpose(1, 2)
        return F.cross_entropy(logits, ids[:, 1:], ignore_index=0)


class Normalized(Plain):
    """Planted: each record is normalized by the batch."""

    def __init__(self):
        super().__init__()
        self.net, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def training_step(self, batch, batch_idx):
        h = self.net(batch[0])
        return F.cross_entropy(self.head((h - h.mean(0)).relu()), batch[1])


class Random(Normalized):
    """Planted: randomness that nobody can hold still."""

    def training_step(self, batch, batch_idx):
        h = self.net(batch[0])
        return F.cross_entropy(self.head(h * torch.rand_like(h)), batch[1])


def test_set_ups_are_sound_and_planted_ones_are_not():
    setups = all_setups()
    families = set(FAMILIES)
    if importlib.util.find_spec("peft") is None:
        families.remove("peft")
    assert {s.family for s in setups.values()} == families
    for family, name in CHOSEN.items():
        if family in families:
            assert is_sound(setups[name]) < TOLERANCE, name

    for module, data, collate in (
        (TokenMean, texts, pad_texts), (Normalized, points, None), (Random, points, None),
    ):  # fmt: skip
        assert is_sound(SetUp(module.__name__, "other", module, data, collate)) > 1e-2, module
