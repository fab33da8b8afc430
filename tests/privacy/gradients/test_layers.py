"""Per-record gradients of every layer that users bring, against each record on its own.

Either they equal those of a loop over records, as here, or the layer is refused. That, and what
neither shapes nor sums can tell, is in `test_layers_refused`.
"""

import pytest
import torch
import torch.nn.functional as F

from defend.privacy.gradients.per_record import PerRecordGradients

from .alone import CLOSE, ROWS, T, check_equal, each_alone, inputs, targets, together
from .layer_modules import Apply, checkpointed, nested
from .layer_table import EQUAL


@pytest.mark.parametrize("name", EQUAL)
def test_equals_each_record_alone(name):
    kind, make = EQUAL[name]
    for rows in ROWS:
        torch.manual_seed(0)
        check_equal(make(), inputs(kind, rows))


@pytest.mark.parametrize(
    "how", ["plain", "reentrant", "nested 00", "nested 01", "nested 10", "nested 11"]
)
def test_checkpoints_equal_each_record_alone(how):
    for rows in ROWS:
        torch.manual_seed(0)
        kind, flags = how.split(" ") if " " in how else (how, "")
        module = nested(*(f == "1" for f in flags)) if flags else checkpointed(kind == "reentrant")
        x, y = inputs("vector", rows), targets(rows)
        expected = each_alone(module.eval(), x, y)
        for found, wanted in zip(together(module.train(), x, y), expected, strict=True):
            torch.testing.assert_close(found, wanted, **CLOSE)


@pytest.mark.parametrize(
    "name", ["token and positions", "conv2d", "lstm", "embedding", "checkpoint"]
)
def test_half_precision(name):
    torch.manual_seed(0)
    kind, make = EQUAL.get(name, ("vector", lambda: checkpointed(False)))
    module, x, y = make(), inputs(kind, 5), targets(5)
    expected = each_alone(module, x, y)
    with torch.autocast("cpu", torch.bfloat16):
        per_record = PerRecordGradients(module)
        value = F.cross_entropy(module(x).flatten(1).float(), y)
    value.backward()
    whole = sum(float(e.square().sum()) for e in expected) ** 0.5
    for found, wanted in zip(per_record.read(5), expected, strict=True):
        assert (found - wanted).norm() < 0.05 * whole
    per_record.remove()


# --- Hugging Face ---------------------------------------------------------------------------------


def classifier(name):
    transformers = pytest.importorskip("transformers")
    small = {
        "vocab_size": 30, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 12, "num_labels": 3, "pad_token_id": 0, "max_position_embeddings": 8,
    }  # fmt: skip
    if name == "Llama":
        config = transformers.LlamaConfig(**small, num_key_value_heads=1)
        return transformers.LlamaForSequenceClassification(config)
    if name == "GPT2":
        config = transformers.GPT2Config(
            vocab_size=30, n_embd=8, n_layer=2, n_head=2, n_positions=8, num_labels=3,
            pad_token_id=0, bos_token_id=1, eos_token_id=1,
            resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        )  # fmt: skip
        return transformers.GPT2ForSequenceClassification(config)
    small |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    if name == "Bert":
        return transformers.BertForSequenceClassification(transformers.BertConfig(**small))
    for unknown in ("vocab_size", "pad_token_id", "max_position_embeddings"):
        del small[unknown]
    config = transformers.ViTConfig(**small, image_size=8, patch_size=4)
    return transformers.ViTForImageClassification(config)


@pytest.mark.parametrize("name", ["Bert", "Llama", "GPT2", "ViT"])
@pytest.mark.parametrize("memory", ["plain", "checkpoint"])
def test_hugging_face(name, memory, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.manual_seed(0)
    model = classifier(name).train()
    if memory == "checkpoint":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    module = Apply(lambda m, x: m.model(x).logits, model=model)
    for rows in (1, T, 5):
        x = torch.randn(rows, 3, 8, 8) if name == "ViT" else torch.randint(2, 30, (rows, T))
        check_equal(module, x)
