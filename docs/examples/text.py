"""A Hugging Face classifier on dict batches, in two phases: `python docs/examples/text.py`.

First the head alone, then all weights. The second phase is another callback on the same data; that
its account is the first one's is found by the weights.
"""

import lightning.pytorch as pl
import torch
import transformers
from torch.utils.data import DataLoader, Dataset

from defend import DifferentialPrivacy


class Reviews(Dataset):
    """Made-up token ids of different lengths; the label is which of two words is more frequent."""

    def __init__(self, count=1000, seed=0):
        g = torch.Generator().manual_seed(seed)
        lengths = torch.randint(8, 17, (count,), generator=g)
        self.ids = [torch.randint(3, 12, (n,), generator=g) for n in lengths.tolist()]
        self.labels = [int((ids == 3).sum() > (ids == 4).sum()) for ids in self.ids]

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "labels": self.labels[i]}


def collate(items):
    """As a tokenizer pads: ids, their mask, and labels, by the names that the model takes."""
    ids = torch.nn.utils.rnn.pad_sequence([item["input_ids"] for item in items], batch_first=True)
    return {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "labels": torch.tensor([item["labels"] for item in items]),
    }


class Classifier(pl.LightningModule):
    """Any model that takes a dict and gives a loss, as `transformers.Trainer` wants it."""

    def __init__(self):
        super().__init__()
        config = transformers.BertConfig(
            vocab_size=12, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=64, max_position_embeddings=32,
        )  # fmt: skip
        self.model = transformers.BertForSequenceClassification(config)  # or from_pretrained(...)

    def training_step(self, batch, batch_idx):
        return self.model(**batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=2e-3)


def phase(module, count):
    privacy = DifferentialPrivacy(noise_multiplier=1.0, delta=1e-4, max_grad_norm=1.0)
    trainer = pl.Trainer(max_epochs=1, callbacks=[privacy], accelerator="auto")
    trainer.fit(
        module, DataLoader(Reviews(count), batch_size=100, shuffle=True, collate_fn=collate)
    )
    return privacy


def main(count=1000):
    module = Classifier()
    module.model.bert.requires_grad_(False)
    first = phase(module, count)
    module.model.requires_grad_(True)
    both = phase(module, count)
    print(f"epsilon {first.epsilon:.2f} for the head, {both.epsilon:.2f} for both phases")
    return first, both


if __name__ == "__main__":
    main()
