"""Language models of transformers, from a config: the mean over each record's own tokens."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch.nn.functional as F
import transformers as hf

from tests.zoo.records import texts
from tests.zoo.setup import Plain, setup
from tests.zoo.transformers import SMALL, Own, pad

hf.logging.set_verbosity_error()

SIZES = {k: v for k, v in SMALL.items() if k != "num_labels"} | {"max_position_embeddings": 64}


class LanguageModel(Plain):
    """Each token from those before it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, batch, batch_idx):
        ids, mask = batch["input_ids"], batch["attention_mask"]
        logits = self.model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        losses = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        counted = mask[:, 1:].float()
        loss = ((losses * counted).sum(1) / counted.sum(1)).mean()
        self.log("loss", loss)
        return loss


def gpt2_config():
    return hf.GPT2Config(
        vocab_size=60, n_embd=16, n_layer=2, n_head=2, n_positions=32, pad_token_id=0
    )


@setup("GPT-2, language model", "transformers", texts, pad)
def gpt2():
    return LanguageModel(hf.GPT2LMHeadModel(gpt2_config()))


@setup("GPT-2, sequence classification at the last token", "transformers", texts, pad)
def gpt2_classifier():
    config = gpt2_config()
    config.num_labels = 3
    return Own(hf.GPT2ForSequenceClassification(config))


@setup("Llama, language model", "transformers", texts, pad)
def llama():
    return LanguageModel(hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, num_key_value_heads=1)))


@setup("Qwen2, language model", "transformers", texts, pad)
def qwen2():
    config = hf.Qwen2Config(**SIZES, num_key_value_heads=1, attention_dropout=0.1)
    return LanguageModel(hf.Qwen2ForCausalLM(config))


@setup("Gemma 2, language model", "transformers", texts, pad)
def gemma2():
    config = hf.Gemma2Config(
        **SIZES, num_key_value_heads=1, head_dim=8, sliding_window=4, query_pre_attn_scalar=8
    )
    return LanguageModel(hf.Gemma2ForCausalLM(config))


@setup("OPT, language model", "transformers", texts, pad)
def opt():
    sizes = {k: v for k, v in SIZES.items() if k != "intermediate_size"}
    config = hf.OPTConfig(**sizes, ffn_dim=32, word_embed_proj_dim=8)
    return LanguageModel(hf.OPTForCausalLM(config))


@setup("GPT-NeoX, language model", "transformers", texts, pad)
def neox():
    config = hf.GPTNeoXConfig(**SIZES, attention_dropout=0.1, hidden_dropout=0.1)
    return LanguageModel(hf.GPTNeoXForCausalLM(config))


@setup("Bloom, language model", "transformers", texts, pad)
def bloom():
    config = hf.BloomConfig(
        vocab_size=60, hidden_size=16, n_layer=2, n_head=2, pad_token_id=0, hidden_dropout=0.1
    )
    return LanguageModel(hf.BloomForCausalLM(config))


@setup("Mamba, language model", "transformers", texts, pad)
def mamba():
    config = hf.MambaConfig(
        vocab_size=60, hidden_size=16, state_size=4, num_hidden_layers=2, time_step_rank=2,
        pad_token_id=0, use_cache=False,
    )  # fmt: skip
    return LanguageModel(hf.MambaForCausalLM(config))
