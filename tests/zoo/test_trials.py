"""Sound set-ups train under DifferentialPrivacy, and rightly: some of each kind here, and all of
them by `python -m tests.zoo`."""

from unittest import mock

import pytest

from defend.privacy.gradients.one_record import OneRecord
from tests.zoo import all_setups
from tests.zoo.__main__ import RIGHT, page
from tests.zoo.attention import pad_texts
from tests.zoo.records import points, texts
from tests.zoo.setup import SetUp
from tests.zoo.test_zoo import Normalized, TokenMean
from tests.zoo.trial import tried

# Each family, both engines, and each reason for one record at a time.
CHOSEN = {
    "BERT, token classification, mean over each record's tokens": "hooks",
    "T5, translation": "record",  # a table that all records share
    "Swin, image classification": "record",
    "LoRA with modules_to_save": "hooks",
    "prompt tuning on GPT-2": "record",  # the layers' hooks disturb it
    "nn.MultiheadAttention, time first, with dropout": "record",
    "nn.LSTM, both directions, packed without sorting": "record",  # fused, several outputs
    "nn.LSTMCell in a loop, stopped at each record's end": "record",
    "an LSTM of TorchScript": "record",
    "wide & deep with nn.EmbeddingBag": "hooks",
    "detection, lists of images and of dicts, one forward each": "record",
    "a ViT in timm's style": "record",  # random operations beside parameters
    "GCN, graphs concatenated with a batch vector": "record",
    "gradient penalty on each record's own input": "record",  # two passes
    "Fourier neural operator, complex weights": "record",
    "scale and temperature used in the step": "record",
    "spectral norm, old style": "record",
}


def named(start: str) -> SetUp:
    (found,) = (s for name, s in all_setups().items() if name.startswith(start))
    return found


@pytest.mark.parametrize("start", CHOSEN)
def test_trains_rightly(start):
    trial = tried(named(start))
    assert trial.engine == CHOSEN[start], trial.why
    assert trial.distance < RIGHT


def test_planted_set_ups_are_refused_and_a_planted_wrong_gradient_shows():
    for module, data, collate in ((TokenMean, texts, pad_texts), (Normalized, points, None)):
        trial = tried(SetUp("planted", "other", module, data, collate))
        assert trial.engine is None
        assert "engine='record'" in trial.why

    read = OneRecord.read
    wrong = mock.patch.object(OneRecord, "read", lambda self: [1.001 * g for g in read(self)])
    with wrong:
        trial = tried(named("logistic regression written with parameters"))
    assert trial.engine == "record"
    assert trial.distance > 10 * RIGHT


def test_the_page():
    row = {"engine": "record", "why": "", "distance": 2e-7, "times": 4.25}
    refused = {"engine": None, "why": "x", "distance": 0.0, "times": None}
    rows = [("one", row), ("two", refused)]
    text = page({n: {"name": n, "family": "other", "trial": t} for n, t in rows})
    assert "1 train, 0 of them by the layers' hooks, 1 one\nrecord at a time" in text
    assert "| other | one | record | 2e-07 | 4.2 |" in text
    assert "| other | two | refused | 0e+00 |  |" in text
