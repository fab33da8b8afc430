"""Encoders and encoder-decoders of transformers, from a config, as they come (with dropout)."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F
import transformers as hf
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from tests.zoo.records import Records, numbers, texts
from tests.zoo.setup import Plain, setup

hf.logging.set_verbosity_error()

UNSOUND = [
    ("SegFormer, segmentation; ResNet; MobileViT; CvT", "BatchNorm"),
    ("Mixtral, with its router loss", "the balancing loss is over all tokens of the batch"),
    ("PatchTST, as it comes", "BatchNorm; norm_type='layernorm' would be sound"),
    ("FNet, records of different lengths", "the Fourier transform mixes the padding in"),
    ("GPT-2, T5, BART, token classification, with the model's own loss on different lengths",
     "the mean is over all tokens of the batch"),
]  # fmt: skip

SMALL = {
    "vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 32, "max_position_embeddings": 32, "pad_token_id": 0, "num_labels": 3,
}  # fmt: skip


def pad(records):
    """What a data collator with padding gives: ids and mask up to the longest, labels."""
    ids = pad_sequence([r["input_ids"] for r in records], batch_first=True)
    mask = pad_sequence([torch.ones_like(r["input_ids"]) for r in records], batch_first=True)
    labels = torch.tensor([r["label"] for r in records])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class Own(Plain):
    """The model's own loss, which is a mean over records."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, **inputs):
        return self.model(**inputs)

    def training_step(self, batch, batch_idx):
        loss = self(**batch).loss
        self.log("train/loss", loss, prog_bar=True)
        return loss


class Classifier(Plain):
    """The loss from the logits; the step takes the labels out of its batch."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.criterion = nn.CrossEntropyLoss(label_smoothing=0.1)

    def training_step(self, batch, batch_idx):
        labels = batch.pop("labels")
        return {"loss": self.criterion(self.model(**batch).logits, labels)}


@setup("BERT, sequence classification", "transformers", texts, pad)
def bert():
    return Own(hf.BertForSequenceClassification(hf.BertConfig(**SMALL)))


@setup("DistilBERT, sequence classification", "transformers", texts, pad)
def distilbert():
    config = hf.DistilBertConfig(
        vocab_size=60, dim=16, n_layers=2, n_heads=2, hidden_dim=32, num_labels=3,
        max_position_embeddings=32, pad_token_id=0,
    )  # fmt: skip
    return Own(hf.DistilBertForSequenceClassification(config))


@setup("RoBERTa, sequence classification", "transformers", texts, pad)
def roberta():
    return Own(hf.RobertaForSequenceClassification(hf.RobertaConfig(**SMALL)))


@setup("ALBERT, sequence classification", "transformers", texts, pad)
def albert():
    config = hf.AlbertConfig(
        **SMALL, embedding_size=8, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1
    )
    return Own(hf.AlbertForSequenceClassification(config))


@setup("ELECTRA, sequence classification", "transformers", texts, pad)
def electra():
    return Own(hf.ElectraForSequenceClassification(hf.ElectraConfig(**SMALL, embedding_size=8)))


@setup("ModernBERT, sequence classification", "transformers", texts, pad)
def modernbert():
    config = hf.ModernBertConfig(
        **SMALL, attention_dropout=0.1, mlp_dropout=0.1, embedding_dropout=0.1, local_attention=4,
        bos_token_id=1, cls_token_id=1, eos_token_id=2, sep_token_id=2, classifier_pooling="mean",
    )  # fmt: skip
    return Own(hf.ModernBertForSequenceClassification(config))


@setup("DeBERTa-v2, sequence classification", "transformers", texts, pad)
def deberta():
    config = hf.DebertaV2Config(
        **SMALL, relative_attention=True, position_buckets=4, pos_att_type=["p2c", "c2p"],
        norm_rel_ebd="layer_norm", share_att_key=True, type_vocab_size=0,
        position_biased_input=False,
    )  # fmt: skip
    return Own(hf.DebertaV2ForSequenceClassification(config))


@setup("MPNet, sequence classification", "transformers", texts, pad)
def mpnet():
    return Own(hf.MPNetForSequenceClassification(hf.MPNetConfig(**SMALL)))


@setup("RoFormer, sequence classification", "transformers", texts, pad)
def roformer():
    return Classifier(hf.RoFormerForSequenceClassification(hf.RoFormerConfig(**SMALL)))


@setup("SqueezeBERT, sequence classification", "transformers", texts, pad)
def squeezebert():
    config = hf.SqueezeBertConfig(
        **SMALL, embedding_size=16, q_groups=2, k_groups=2, v_groups=2, post_attention_groups=1,
        intermediate_groups=2, output_groups=2,
    )  # fmt: skip
    return Own(hf.SqueezeBertForSequenceClassification(config))


@setup("XLNet, sequence classification", "transformers", texts, pad)
def xlnet():
    config = hf.XLNetConfig(
        vocab_size=60, d_model=16, n_layer=2, n_head=2, d_inner=32, num_labels=3,
        pad_token_id=0, summary_type="first",
    )  # fmt: skip
    return Own(hf.XLNetForSequenceClassification(config))


def texts_of_one_length():
    return texts(shortest=6, longest=6)


@setup("FNet, sequence classification", "transformers", texts_of_one_length, pad)
class FNet(Plain):
    """No attention: a Fourier transform, so all records have one length and there is no mask."""

    def __init__(self):
        super().__init__()
        config = {k: v for k, v in SMALL.items() if k != "num_attention_heads"}
        self.model = hf.FNetForSequenceClassification(hf.FNetConfig(**config))

    def training_step(self, batch, batch_idx):
        return self.model(input_ids=batch["input_ids"], labels=batch["labels"]).loss


def scored_texts():
    return Records({**r, "label": float(r["label"]) - 1.2} for r in texts(seed=1))


@setup("BERT, regression with its own MSE", "transformers", scored_texts, pad)
def bert_regression():
    return Own(hf.BertForSequenceClassification(hf.BertConfig(**{**SMALL, "num_labels": 1})))


def tagged_texts():
    g = numbers(1)
    return Records(
        {**r, "tags": torch.randint(5, r["input_ids"].shape, generator=g)} for r in texts()
    )


def pad_tags(records):
    batch = pad(records)
    tags = [r["tags"] for r in records]
    batch["labels"] = pad_sequence(tags, batch_first=True, padding_value=-100)
    return batch


@setup("BERT, token classification, mean over each record's tokens", "transformers",
       tagged_texts, pad_tags)  # fmt: skip
class BertTagger(Plain):
    def __init__(self):
        super().__init__()
        self.bert = hf.BertForTokenClassification(hf.BertConfig(**{**SMALL, "num_labels": 5}))

    def training_step(self, batch, batch_idx):
        logits = self.bert(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        losses = F.cross_entropy(
            logits.transpose(1, 2), batch["labels"], ignore_index=-100, reduction="none"
        )
        mask = batch["attention_mask"]
        return ((losses * mask).sum(1) / mask.sum(1)).mean()


@setup("ELECTRA, replaced tokens, mean over each record's tokens", "transformers",
       tagged_texts, pad_tags)  # fmt: skip
class ElectraDiscriminator(Plain):
    def __init__(self):
        super().__init__()
        self.model = hf.ElectraForPreTraining(hf.ElectraConfig(**SMALL, embedding_size=8))

    def training_step(self, batch, batch_idx):
        logits = self.model(batch["input_ids"], batch["attention_mask"]).logits
        replaced = (batch["labels"] == 0).float()
        losses = F.binary_cross_entropy_with_logits(logits, replaced, reduction="none")
        mask = batch["attention_mask"].bool()
        per_record = losses.masked_fill(~mask, 0).sum(-1) / mask.sum(-1)
        return per_record.mean()


def spans():
    g = numbers(2)

    def place(record):
        return torch.randint(len(record["input_ids"]), (), generator=g).item()

    return Records({**r, "start": place(r), "end": place(r)} for r in texts())


def pad_spans(records):
    batch = pad(records)
    del batch["labels"]
    batch["start_positions"] = torch.tensor([r["start"] for r in records])
    batch["end_positions"] = torch.tensor([r["end"] for r in records])
    return batch


@setup("BERT, question answering with its own loss", "transformers", spans, pad_spans)
class Answers(Own):
    """The padding takes part in the softmax over places unless it is masked."""

    def __init__(self):
        super().__init__(hf.BertForQuestionAnswering(hf.BertConfig(**{**SMALL, "num_labels": 2})))

    def training_step(self, batch, batch_idx):
        output = self.model(batch["input_ids"], attention_mask=batch["attention_mask"])
        padding = batch["attention_mask"] == 0
        start = output.start_logits.masked_fill(padding, -1e9)
        end = output.end_logits.masked_fill(padding, -1e9)
        return 0.5 * (
            F.cross_entropy(start, batch["start_positions"])
            + F.cross_entropy(end, batch["end_positions"])
        )


def translations():
    sources, targets = texts(seed=3), texts(seed=4, longest=7)
    return Records(
        {"source": s["input_ids"], "target": t["input_ids"]}
        for s, t in zip(sources.records, targets.records, strict=True)
    )


def pad_pairs(records):
    source = [r["source"] for r in records]
    target = [r["target"] for r in records]
    return {
        "input_ids": pad_sequence(source, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(s) for s in source], batch_first=True),
        "labels": pad_sequence(target, batch_first=True, padding_value=-100),
    }


class Translator(Own):
    """The model shifts the labels itself; the mean is taken over each record's own tokens."""

    def training_step(self, batch, batch_idx):
        logits = self.model(**batch).logits
        labels = batch["labels"]
        losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        counts = (labels != -100).sum(dim=1)
        return (losses.sum(dim=1) / counts).mean()


@setup("T5, translation", "transformers", translations, pad_pairs)
def t5():
    config = hf.T5Config(
        vocab_size=60, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2,
        relative_attention_num_buckets=8, relative_attention_max_distance=16,
        decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return Translator(hf.T5ForConditionalGeneration(config))


@setup("BART, translation", "transformers", translations, pad_pairs)
def bart():
    config = hf.BartConfig(
        vocab_size=60, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
        max_position_embeddings=32, pad_token_id=0, decoder_start_token_id=2,
    )  # fmt: skip
    return Translator(hf.BartForConditionalGeneration(config))


@setup("CLIP's text tower with a regression head", "transformers", scored_texts, pad)
class ClipText(Plain):
    def __init__(self):
        super().__init__()
        config = {k: v for k, v in SMALL.items() if k != "num_labels"}
        self.tower = hf.CLIPTextModel(hf.CLIPTextConfig(**config, attention_dropout=0.1))
        self.head = nn.Linear(16, 1)

    def training_step(self, batch, batch_idx):
        hidden = self.tower(batch["input_ids"], batch["attention_mask"]).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        pooled = (hidden * mask).sum(1) / mask.sum(1)
        return F.mse_loss(self.head(pooled).squeeze(-1), batch["labels"])
