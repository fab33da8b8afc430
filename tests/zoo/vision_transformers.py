"""Image models without convolutions but for their patches."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.zoo.records import images
from tests.zoo.setup import Plain, setup
from tests.zoo.vision import DropPath


class PatchEmbed(nn.Module):
    def __init__(self, width, patch=4):
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, stride=patch)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class LayerScale(nn.Module):
    def __init__(self, width, init=0.1):
        super().__init__()
        self.gamma = nn.Parameter(init * torch.ones(width))

    def forward(self, x):
        return x * self.gamma


class Attention(nn.Module):
    def __init__(self, width, heads=2):
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width)
        self.attn_drop, self.proj_drop = nn.Dropout(0.1), nn.Dropout(0.1)
        self.proj = nn.Linear(width, width)

    def forward(self, x, bias=0.0):
        n, t, c = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        attn = self.attn_drop((q * self.scale @ k.transpose(-2, -1) + bias).softmax(dim=-1))
        return self.proj_drop(self.proj((attn @ v).transpose(1, 2).reshape(n, t, c)))


def mlp(width, hidden):
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Dropout(0.1),
                         nn.Linear(hidden, width), nn.Dropout(0.1))  # fmt: skip


class Block(nn.Module):
    def __init__(self, width, drop_path):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.mlp = Attention(width), mlp(width, 2 * width)
        self.ls1, self.ls2 = LayerScale(width), LayerScale(width)
        self.drop_path = DropPath(drop_path)

    def forward(self, x):
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


@setup("a ViT in timm's style", "vision", images)
class VisionTransformer(Plain):
    """Class token, register tokens, positions, dropout and constant buffers in one module."""

    def __init__(self, width=16):
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.5, 0.4, 0.3]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.2, 0.2, 0.2]).view(1, 3, 1, 1))
        self.patch_embed = PatchEmbed(width)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.reg_token = nn.Parameter(torch.randn(1, 2, width) * 0.02)
        self.pos_embed = nn.Parameter(torch.randn(1, 16, width) * 0.02)
        self.pos_drop = nn.Dropout(0.1)
        self.blocks = nn.Sequential(Block(width, 0.0), Block(width, 0.2))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        x = self.patch_embed((x - self.mean) / self.std) + self.pos_embed
        first = [self.cls_token.expand(len(x), -1, -1), self.reg_token.expand(len(x), -1, -1)]
        x = self.blocks(self.pos_drop(torch.cat([*first, x], dim=1)))
        return self.head(self.norm(x)[:, 0])

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self(x), y, label_smoothing=0.1)
        self.log("loss", loss)
        return loss


@setup("class token beside a dropout rate of the module itself", "vision", images)
class TokenAndRate(Plain):
    """`dropout` is a number here, used with F.dropout in the module that owns the token."""

    def __init__(self):
        super().__init__()
        self.dropout = 0.2
        self.embed = PatchEmbed(8)
        self.token = nn.Parameter(torch.randn(8))
        self.position = nn.Parameter(torch.randn(17, 8) * 0.1)
        self.attn = Attention(8)
        self.head = nn.Linear(8, 3)

    def training_step(self, batch, batch_idx):
        x, y = batch
        token = self.token.repeat(len(x), 1, 1)
        x = torch.cat([token, self.embed(x)], 1) + self.position
        x = F.dropout(x, p=self.dropout, training=self.training)
        return F.cross_entropy(self.head(self.attn(x)[:, 0]), y)


@setup("MLP-Mixer", "vision", images)
class Mixer(Plain):
    def __init__(self, width=8, patches=16):
        super().__init__()
        self.embed = PatchEmbed(width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(4))
        self.tokens = nn.ModuleList(mlp(patches, 24) for _ in range(2))
        self.channels = nn.ModuleList(mlp(width, 24) for _ in range(2))
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        x = self.embed(x)
        for i, (tokens, channels) in enumerate(zip(self.tokens, self.channels, strict=True)):
            x = x + tokens(self.norms[2 * i](x).mT).mT
            x = x + channels(self.norms[2 * i + 1](x))
        return self.head(x.mean(dim=1))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x), y)


class WindowBlock(nn.Module):
    """Attention in windows of 2 × 2, rolled by one; windows stand in the batch's dimension."""

    def __init__(self, width, shift):
        super().__init__()
        self.shift = shift
        self.norm, self.attn = nn.LayerNorm(width), Attention(width)
        self.table = nn.Parameter(torch.randn(9, 2) * 0.1)
        grid = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
        apart = grid[:, None] - grid[None] + 1
        self.register_buffer("index", apart[..., 0] * 3 + apart[..., 1])
        self.mlp = mlp(width, 2 * width)
        self.drop_path = DropPath(0.1)

    def forward(self, x):
        n, h, w, c = x.shape
        y = self.norm(x).roll((-self.shift, -self.shift), (1, 2))
        y = y.view(n, h // 2, 2, w // 2, 2, c).transpose(2, 3).reshape(-1, 4, c)
        y = self.attn(y, self.table[self.index].permute(2, 0, 1))
        y = y.view(n, h // 2, w // 2, 2, 2, c).transpose(2, 3).reshape(n, h, w, c)
        x = x + self.drop_path(y.roll((self.shift, self.shift), (1, 2)))
        return x + self.drop_path(self.mlp(x))


@setup("window attention as in Swin, by hand", "vision", images)
class Windows(Plain):
    def __init__(self, width=8):
        super().__init__()
        self.embed = PatchEmbed(width)
        self.blocks = nn.Sequential(WindowBlock(width, 0), WindowBlock(width, 1))
        self.merge = nn.Linear(4 * width, width, bias=False)
        self.head = nn.Linear(width, 3)

    def training_step(self, batch, batch_idx):
        x, y = batch
        x = self.blocks(self.embed(x).unflatten(1, (4, 4)))
        x = torch.cat([x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)], dim=-1)
        return F.cross_entropy(self.head(self.merge(x).mean((1, 2))), y)


@setup("patches by unfold and a matrix, positions by sinusoids", "vision", images)
class Unfolded(Plain):
    """One weight [48, 8] as a parameter; attention pooling by one query."""

    def __init__(self):
        super().__init__()
        self.project = nn.Parameter(torch.randn(48, 8) * 0.2)
        self.query = nn.Parameter(torch.randn(8))
        self.head = nn.Parameter(torch.randn(8, 3) * 0.3)
        place = torch.arange(16)[:, None] * torch.tensor([1.0, 0.5, 0.25, 0.125])
        self.register_buffer("position", torch.cat([place.sin(), place.cos()], 1))

    def training_step(self, batch, batch_idx):
        x, y = batch
        patches = F.unfold(x, 4, stride=4).transpose(1, 2)
        tokens = torch.tanh(patches @ self.project) + self.position
        weights = torch.softmax(tokens @ self.query, dim=1)
        return F.cross_entropy((weights.unsqueeze(-1) * tokens).sum(1) @ self.head, y)
