"""Adapters of peft on a tiny BERT or GPT-2: most weights are frozen."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import peft
import torch
import torch.nn.functional as F
import transformers as hf

from tests.zoo.records import texts
from tests.zoo.setup import Plain, setup
from tests.zoo.transformers import SMALL, Own, pad
from tests.zoo.transformers_causal import LanguageModel, gpt2_config


def classifier(config):
    """A BERT with its adapter; `task_type` keeps the head trainable."""
    bert = hf.BertForSequenceClassification(hf.BertConfig(**SMALL))
    return Own(stirred(peft.get_peft_model(bert, config)))


def language_model(config):
    return LanguageModel(stirred(peft.get_peft_model(hf.GPT2LMHeadModel(gpt2_config()), config)))


def stirred(model):
    """Adapters start as the identity; a few steps in, no trainable weight is zero any more."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    return model


@setup("LoRA on BERT", "peft", texts, pad)
def lora():
    return classifier(peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"]))


@setup("LoRA with dropout on GPT-2", "peft", texts, pad)
def lora_dropout():
    return language_model(
        peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, lora_dropout=0.1,
                        target_modules=["c_attn"], fan_in_fan_out=True)
    )  # fmt: skip


@setup("LoRA on every linear layer, rank-stabilized", "peft", texts, pad)
def lora_all():
    return classifier(
        peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules="all-linear", use_rslora=True)
    )


@setup("LoRA on an embedding and attention", "peft", texts, pad)
def lora_embedding():
    return classifier(
        peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["word_embeddings", "query"])
    )


@setup("LoRA with bias='all'", "peft", texts, pad)
def lora_bias():
    return classifier(
        peft.LoraConfig(task_type="SEQ_CLS", r=2, bias="all", target_modules=["query", "key"])
    )


@setup("LoRA with modules_to_save", "peft", texts, pad)
def lora_saved():
    """Two layers are trained in full, on copies that peft makes."""
    return classifier(
        peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"],
                        modules_to_save=["pooler", "classifier"])
    )  # fmt: skip


@setup("DoRA on BERT", "peft", texts, pad)
def dora():
    return classifier(
        peft.LoraConfig(task_type="SEQ_CLS", r=2, use_dora=True, target_modules=["query", "value"])
    )


@setup("DoRA with dropout on GPT-2", "peft", texts, pad)
def dora_gpt2():
    return language_model(
        peft.LoraConfig(task_type="CAUSAL_LM", r=2, use_dora=True, lora_dropout=0.05,
                        target_modules=["c_attn"], fan_in_fan_out=True)
    )  # fmt: skip


@setup("IA3 on BERT", "peft", texts, pad)
def ia3():
    return classifier(
        peft.IA3Config(task_type="SEQ_CLS", target_modules=["key", "value", "output.dense"],
                       feedforward_modules=["output.dense"])
    )  # fmt: skip


@setup("AdaLoRA on BERT, without its orthogonality loss", "peft", texts, pad)
class AdaLora(Plain):
    """The loss comes from the logits, so peft adds nothing to it; ranks are not reallocated."""

    def __init__(self):
        super().__init__()
        config = peft.AdaLoraConfig(
            task_type="SEQ_CLS", init_r=4, target_r=2, total_step=100, lora_dropout=0.1,
            target_modules=["query", "value"],
        )  # fmt: skip
        self.model = classifier(config).model

    def training_step(self, batch, batch_idx):
        output = self.model(batch["input_ids"], attention_mask=batch["attention_mask"])
        return F.cross_entropy(output.logits, batch["labels"])


@setup("LoHa on BERT", "peft", texts, pad)
def loha():
    return classifier(
        peft.LoHaConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"],
                        module_dropout=0.0)
    )  # fmt: skip


@setup("LoKr on BERT", "peft", texts, pad)
def lokr():
    return classifier(peft.LoKrConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"]))


@setup("VeRA on BERT", "peft", texts, pad)
def vera():
    """Frozen random matrices in buffers, shared by all layers; vectors are trained."""
    return classifier(
        peft.VeraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"],
                        vera_dropout=0.1)
    )  # fmt: skip


@setup("LayerNorm tuning on BERT", "peft", texts, pad)
def layernorm_tuning():
    return classifier(peft.LNTuningConfig(task_type="SEQ_CLS", target_modules=["LayerNorm"]))


@setup("OFT on BERT", "peft", texts, pad)
def oft():
    return classifier(
        peft.OFTConfig(task_type="SEQ_CLS", oft_block_size=4, target_modules=["query", "value"],
                       use_cayley_neumann=False)
    )  # fmt: skip


@setup("prompt tuning on BERT", "peft", texts, pad)
def prompt_tuning():
    return classifier(peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3))


class Continued(LanguageModel):
    """With a prompt of virtual tokens before the text, the model gives logits for those too."""

    def training_step(self, batch, batch_idx):
        ids, mask = batch["input_ids"], batch["attention_mask"]
        logits = self.model(input_ids=ids, attention_mask=mask).logits
        logits = logits[:, -ids.shape[1] :][:, :-1]
        losses = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        return ((losses * mask[:, 1:]).sum(1) / mask[:, 1:].sum(1)).mean()


@setup("prompt tuning on GPT-2", "peft", texts, pad)
def prompt_tuning_gpt2():
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    return Continued(language_model(config).model)


@setup("prefix tuning on GPT-2", "peft", texts, pad)
def prefix_tuning():
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    return Continued(language_model(config).model)


@setup("prefix tuning with a projection on BERT", "peft", texts, pad)
def prefix_projection():
    return classifier(
        peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3, prefix_projection=True,
                                encoder_hidden_size=8)
    )  # fmt: skip


@setup("P-tuning on BERT, LSTM encoder", "peft", texts, pad)
def p_tuning():
    return classifier(
        peft.PromptEncoderConfig(task_type="SEQ_CLS", num_virtual_tokens=3, encoder_hidden_size=8,
                                 encoder_reparameterization_type="LSTM", encoder_dropout=0.1)
    )  # fmt: skip


@setup("P-tuning on BERT, MLP encoder", "peft", texts, pad)
def p_tuning_mlp():
    return classifier(
        peft.PromptEncoderConfig(task_type="SEQ_CLS", num_virtual_tokens=3, encoder_hidden_size=8)
    )
