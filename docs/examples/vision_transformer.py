"""A ViT in the style of timm, with dropout: `python docs/examples/vision_transformer.py`.

Class token, positions and dropout live in one module, whose rows no rule can tell apart. So defend
takes one record at a time, and says so. The data are some of scikit-learn's digits.
"""

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from defend import DifferentialPrivacy


class Block(nn.Module):
    def __init__(self, dim, heads, drop):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.heads, self.qkv, self.proj = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, 2 * dim), nn.GELU(), nn.Dropout(drop), nn.Linear(2 * dim, dim)
        )

    def attend(self, x):
        b, n, d = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d))

    def forward(self, x):
        x = x + self.attend(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    def __init__(self, size=8, patch=2, dim=32, depth=2, heads=2, classes=10, drop=0.1):
        super().__init__()
        self.patch_embed = nn.Conv2d(1, dim, patch, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + (size // patch) ** 2, dim))
        self.pos_drop = nn.Dropout(drop)
        self.blocks = nn.Sequential(*[Block(dim, heads, drop) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, classes)

    def forward(self, x):
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        x = self.blocks(self.pos_drop(x + self.pos_embed))
        return self.head(self.norm(x)[:, 0])


class Digits(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = VisionTransformer()

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=2e-3)


def main(records=640, epochs=1):
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images[:records], dtype=torch.float32).view(-1, 1, 8, 8) / 16
    data = TensorDataset(x, torch.tensor(labels[:records]))
    privacy = DifferentialPrivacy(noise_multiplier=1.0, delta=1e-4, max_grad_norm=1.0)
    trainer = pl.Trainer(max_epochs=epochs, callbacks=[privacy], accelerator="auto")
    trainer.fit(Digits(), DataLoader(data, batch_size=64, shuffle=True))
    print(f"engine {privacy.settings()['engine']}, epsilon {privacy.epsilon:.2f}")
    return privacy


if __name__ == "__main__":
    main()
