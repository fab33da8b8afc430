"""Models of transformers for images and sound, from a config."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F
import transformers as hf
from torch import nn

from tests.zoo.records import Records, images, numbers
from tests.zoo.setup import Plain, setup

hf.logging.set_verbosity_error()

SIZES = {
    "image_size": 16, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "intermediate_size": 32,
}  # fmt: skip
DROPS = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}


class PixelClassifier(Plain):
    """Batches are tuples of images and classes."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return self.model(pixel_values=images).logits

    def training_step(self, batch, batch_idx):
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("loss", loss)
        return loss


@setup("ViT, image classification", "transformers", images)
def vit():
    config = hf.ViTConfig(**SIZES, **DROPS, num_labels=3)
    return PixelClassifier(hf.ViTForImageClassification(config))


@setup("DeiT, image classification", "transformers", images)
def deit():
    config = hf.DeiTConfig(**SIZES, **DROPS, num_labels=3)
    return PixelClassifier(hf.DeiTForImageClassification(config))


@setup("BEiT, image classification, one table of relative positions", "transformers", images)
def beit():
    config = hf.BeitConfig(
        **SIZES, **DROPS, num_labels=3, drop_path_rate=0.2, layer_scale_init_value=0.5,
        use_shared_relative_position_bias=True,
    )  # fmt: skip
    return PixelClassifier(hf.BeitForImageClassification(config))


@setup("BEiT, image classification, a table in each layer", "transformers", images)
def beit_layers():
    config = hf.BeitConfig(
        **SIZES, **DROPS, num_labels=3, drop_path_rate=0.2, use_relative_position_bias=True
    )
    return PixelClassifier(hf.BeitForImageClassification(config))


@setup("DINOv2, image classification", "transformers", images)
def dinov2():
    sizes = {k: v for k, v in SIZES.items() if k != "intermediate_size"}
    config = hf.Dinov2Config(
        **sizes, **DROPS, mlp_ratio=2, num_labels=3, drop_path_rate=0.2, layerscale_value=0.5
    )
    return PixelClassifier(hf.Dinov2ForImageClassification(config))


@setup("Swin, image classification", "transformers", images)
def swin():
    config = hf.SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=[2, 1], num_heads=[2, 2], window_size=2,
        mlp_ratio=2.0, drop_path_rate=0.2, **DROPS, num_labels=3,
    )  # fmt: skip
    return PixelClassifier(hf.SwinForImageClassification(config))


@setup("ConvNeXt, image classification", "transformers", images)
def convnext():
    config = hf.ConvNextConfig(
        image_size=16, patch_size=4, num_stages=2, hidden_sizes=[8, 16], depths=[1, 1],
        drop_path_rate=0.2, layer_scale_init_value=0.5, num_labels=3,
    )  # fmt: skip
    return PixelClassifier(hf.ConvNextForImageClassification(config))


@setup("ConvNeXt V2, image classification", "transformers", images)
def convnextv2():
    """Its global response normalization is over the pixels of each image."""
    config = hf.ConvNextV2Config(
        image_size=16, patch_size=4, num_stages=2, hidden_sizes=[8, 16], depths=[1, 1],
        drop_path_rate=0.2, num_labels=3,
    )  # fmt: skip
    return PixelClassifier(hf.ConvNextV2ForImageClassification(config))


@setup("SegFormer, image classification", "transformers", images)
def segformer():
    config = hf.SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16],
        patch_sizes=[3, 3], strides=[2, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2],
        drop_path_rate=0.2, num_labels=3,
    )  # fmt: skip
    return PixelClassifier(hf.SegformerForImageClassification(config))


def captioned():
    """Dicts, as the Hugging Face processors give them."""
    g = numbers(1)
    return Records(
        {"pixel_values": torch.randn(3, 16, 16, generator=g), "score": torch.randn((), generator=g)}
        for _ in range(10)
    )


@setup("CLIP's image tower with a regression head", "transformers", captioned)
class ClipVision(Plain):
    def __init__(self):
        super().__init__()
        self.tower = hf.CLIPVisionModel(hf.CLIPVisionConfig(**SIZES, attention_dropout=0.1))
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(16, 1))

    def training_step(self, batch, batch_idx):
        pooled = self.tower(pixel_values=batch["pixel_values"]).pooler_output
        return F.huber_loss(self.head(pooled).flatten(), batch["score"])


def sounds():
    g = numbers(2)
    return Records(
        {"input_values": torch.randn(200, generator=g), "labels": i % 3} for i in range(10)
    )


@setup("wav2vec 2.0, sound classification", "transformers", sounds)
class Wav2Vec2(Plain):
    """With layer norms; its group norm would be over time, padding included. Layers drop."""

    def __init__(self):
        super().__init__()
        config = hf.Wav2Vec2Config(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
            conv_dim=(8, 8), conv_kernel=(10, 3), conv_stride=(5, 2), num_feat_extract_layers=2,
            feat_extract_norm="layer", do_stable_layer_norm=True, apply_spec_augment=False,
            num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, classifier_proj_size=8,
            num_labels=3,
        )  # fmt: skip
        self.net = hf.Wav2Vec2ForSequenceClassification(config)

    def training_step(self, batch, batch_idx):
        return self.net(**batch).loss


def spectrograms():
    g = numbers(3)
    return Records((torch.randn(8, 24, generator=g), i % 4) for i in range(9))


@setup("Whisper's encoder with a head", "transformers", spectrograms)
class WhisperEncoder(Plain):
    def __init__(self):
        super().__init__()
        config = hf.WhisperConfig(
            num_mel_bins=8, max_source_positions=12, d_model=16, encoder_layers=2,
            encoder_attention_heads=2, encoder_ffn_dim=32, decoder_layers=1,
            decoder_attention_heads=2, decoder_ffn_dim=32, dropout=0.1, vocab_size=60,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3,
        )  # fmt: skip
        self.encoder = hf.WhisperModel(config).encoder
        self.head = nn.Linear(16, 4)

    def training_step(self, batch, batch_idx):
        mel, label = batch
        hidden = self.encoder(mel).last_hidden_state
        return F.cross_entropy(self.head(hidden.mean(dim=1)), label)


def unlabelled():
    return Records(image for image, _ in images())


@setup("ViT-MAE, masked patches by the module's own noise", "transformers", unlabelled)
class MaskedAutoencoder(Plain):
    """As many patches are masked in each record, so the model's mean over them is sound."""

    def __init__(self):
        super().__init__()
        config = hf.ViTMAEConfig(
            **SIZES, decoder_hidden_size=16, decoder_num_hidden_layers=1, mask_ratio=0.5,
            decoder_num_attention_heads=2, decoder_intermediate_size=32, norm_pix_loss=True,
        )  # fmt: skip
        self.model = hf.ViTMAEForPreTraining(config)

    def noise(self, shape):
        return torch.rand(shape, device=self.device)

    def training_step(self, batch, batch_idx):
        return self.model(batch, noise=self.noise((len(batch), 4))).loss
