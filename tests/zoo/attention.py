"""Attention: PyTorch's modules as they come, and some written by hand."""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from tests.zoo.records import Records, images, numbers, series, texts
from tests.zoo.setup import Plain, setup


def pad_series(records):
    """(x [N, T, F], lengths [N], y [N])."""
    xs, ys = zip(*records, strict=True)
    lengths = torch.tensor([len(x) for x in xs])
    return pad_sequence(xs, batch_first=True), lengths, torch.stack(ys)


def padding(lengths, longest):
    """True where there is nothing."""
    return torch.arange(longest, device=lengths.device) >= lengths[:, None]


def equal_series():
    return series(shortest=6, longest=6)


def pad_texts(records):
    ids = pad_sequence([r["input_ids"] for r in records], batch_first=True)
    return ids, torch.tensor([r["label"] for r in records])


@setup("nn.MultiheadAttention, batch first", "attention", equal_series)
class BatchFirst(Plain):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        attended, _ = self.attention(x, x, x)
        return self.head(attended.mean(dim=1))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x), y)


def time_first(records):
    xs, ys = zip(*records, strict=True)
    return torch.stack(xs, dim=1), torch.stack(ys)


@setup("nn.MultiheadAttention, time first, with dropout", "attention", equal_series, time_first)
class TimeFirst(Plain):
    """The batch stands in the second dimension."""

    def __init__(self):
        super().__init__()
        self.inputs = nn.Linear(4, 8)
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.2)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def training_step(self, batch, batch_idx):
        x, y = batch
        h = self.inputs(x)
        h = self.norm(h + self.attention(h, h, h, need_weights=False)[0])
        return F.cross_entropy(self.head(h[-1]), y)


@setup("nn.MultiheadAttention, key padding and extra keys", "attention", series, pad_series)
class Padded(Plain):
    """`add_bias_kv` and `add_zero_attn`: keys that are parameters, beside those of the record."""

    def __init__(self):
        super().__init__()
        self.inputs = nn.Linear(4, 8)
        self.attention = nn.MultiheadAttention(
            8, 2, dropout=0.1, batch_first=True, add_bias_kv=True, add_zero_attn=True
        )
        self.head = nn.Linear(8, 3)

    def training_step(self, batch, batch_idx):
        x, lengths, y = batch
        mask = padding(lengths, x.shape[1])
        h = self.inputs(x)
        h, _ = self.attention(h, h, h, key_padding_mask=mask)
        h = h.masked_fill(mask.unsqueeze(-1), 0).sum(1) / lengths.unsqueeze(-1)
        return {"loss": F.cross_entropy(self.head(h), y)}


@setup("nn.MultiheadAttention, keys and values of other sizes", "attention", equal_series)
class Crossed(Plain):
    """One learned query reads the record: attention as pooling."""

    def __init__(self):
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, 1, 8))
        self.attention = nn.MultiheadAttention(8, 2, kdim=4, vdim=4, batch_first=True)
        self.head = nn.Linear(8, 3)

    def training_step(self, batch, batch_idx):
        x, y = batch
        pooled, _ = self.attention(self.query.expand(len(x), -1, -1), x, x)
        return F.cross_entropy(self.head(pooled.squeeze(1)), y)


@setup("nn.TransformerEncoder with a class token and learned positions", "attention",
       texts, pad_texts)  # fmt: skip
class Encoder(Plain):
    """The token, the positions and the dropout belong to the module itself."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(60, 16, padding_idx=0)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 16))
        self.positions = nn.Parameter(torch.randn(1, 16, 16) * 0.02)
        self.dropout = nn.Dropout(0.1)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 3)

    def forward(self, ids):
        tokens = self.embedding(ids) * math.sqrt(16)
        x = torch.cat([self.cls_token.expand(len(ids), -1, -1), tokens], dim=1)
        x = self.dropout(x + self.positions[:, : x.shape[1]])
        mask = F.pad(ids == 0, (1, 0), value=False)
        return self.head(self.encoder(x, src_key_padding_mask=mask)[:, 0])

    def training_step(self, batch, batch_idx):
        ids, labels = batch
        return F.cross_entropy(self(ids), labels)


@setup("nn.TransformerEncoder, norm first, sinusoids in a buffer", "attention", texts, pad_texts)
class Sinusoids(Plain):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(60, 16, padding_idx=0)
        self.register_buffer("positions", self.sinusoids(32, 16), persistent=False)
        layer = nn.TransformerEncoderLayer(16, 4, 32, 0.1, norm_first=True, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, norm=nn.LayerNorm(16))
        self.classifier = nn.Linear(16, 3, bias=False)

    @staticmethod
    def sinusoids(length, width):
        angle = torch.arange(length)[:, None] / 10000 ** (torch.arange(0, width, 2) / width)
        return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)

    def training_step(self, batch, batch_idx):
        ids, labels = batch
        pads = ids.eq(0)
        h = self.embedding(ids) + self.positions[: ids.size(1)]
        h = self.encoder(h, src_key_padding_mask=pads)
        h = h.masked_fill(pads[..., None], float("-inf")).amax(dim=1)
        return F.cross_entropy(self.classifier(h), labels)


def pairs():
    sources, targets = texts(seed=5), texts(seed=6, longest=6)
    return Records(
        (s["input_ids"], t["input_ids"])
        for s, t in zip(sources.records, targets.records, strict=True)
    )


def pad_pairs(records):
    sources, targets = zip(*records, strict=True)
    return pad_sequence(sources, True), pad_sequence(targets, True)


@setup("nn.Transformer, encoder and decoder with tied embeddings", "attention", pairs, pad_pairs)
class Seq2Seq(Plain):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(60, 16, padding_idx=0)
        self.net = nn.Transformer(16, 2, 1, 1, 32, batch_first=True)
        self.out = nn.Linear(16, 60, bias=False)
        self.out.weight = self.embedding.weight

    def training_step(self, batch, batch_idx):
        source, target = batch
        read, write = target[:, :-1], target[:, 1:]
        causal = nn.Transformer.generate_square_subsequent_mask(read.shape[1]).to(read.device)
        h = self.net(
            self.embedding(source), self.embedding(read), tgt_mask=causal.isinf(),
            src_key_padding_mask=source == 0, tgt_key_padding_mask=read == 0,
            memory_key_padding_mask=source == 0,
        )  # fmt: skip
        losses = F.cross_entropy(
            self.out(h).transpose(1, 2), write, reduction="none", ignore_index=0
        )
        return (losses.sum(1) / (write != 0).sum(1)).mean()


def decoded():
    g = numbers(7)
    return Records(
        {"memory": torch.randn(5, 8, generator=g), "boxes": torch.rand(3, 4, generator=g)}
        for _ in range(10)
    )


@setup("nn.TransformerDecoder on learned queries", "attention", decoded)
class Queries(Plain):
    """As in DETR, but each query has its own target."""

    def __init__(self):
        super().__init__()
        self.queries = nn.Embedding(3, 8)
        layer = nn.TransformerDecoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.decoder = nn.TransformerDecoder(layer, num_layers=2)
        self.box = nn.Linear(8, 4)

    def training_step(self, batch, batch_idx):
        memory = batch["memory"]
        queries = self.queries.weight.unsqueeze(0).repeat(memory.shape[0], 1, 1)
        boxes = self.box(self.decoder(queries, memory)).sigmoid()
        return F.l1_loss(boxes, batch["boxes"])


class T5Attention(nn.Module):
    """A table of biases by distance, shared by all records."""

    def __init__(self, width=8, heads=2, reach=4):
        super().__init__()
        self.heads, self.reach = heads, reach
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.relative = nn.Embedding(2 * reach + 1, heads)

    def forward(self, x, mask):
        n, t, _ = x.shape
        q, k, v = (
            f(x).view(n, t, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        place = torch.arange(t, device=x.device)
        distance = (place[None] - place[:, None]).clamp(-self.reach, self.reach) + self.reach
        scores = q @ k.transpose(-1, -2) + self.relative(distance).permute(2, 0, 1).unsqueeze(0)
        weights = scores.masked_fill(mask[:, None, None], -1e9).softmax(-1)
        return self.o((weights @ v).transpose(1, 2).reshape(n, t, -1))


@setup("relative positions as in T5, by hand", "attention", series, pad_series)
class RelativeT5(Plain):
    def __init__(self):
        super().__init__()
        self.inputs = nn.Linear(4, 8)
        self.layers = nn.ModuleList(T5Attention() for _ in range(2))
        self.head = nn.Linear(8, 3)

    def training_step(self, batch, batch_idx):
        x, lengths, y = batch
        mask = padding(lengths, x.shape[1])
        h = self.inputs(x)
        for layer in self.layers:
            h = h + layer(F.layer_norm(h, (8,)), mask)
        return F.cross_entropy(self.head(h[:, 0]), y)


@setup("relative positions as in Swin, by hand", "attention", partial(images, channels=8, size=4))
class RelativeSwin(Plain):
    """A table as a parameter, read by a buffer of indices."""

    def __init__(self, size=4, width=8, heads=2):
        super().__init__()
        self.heads = heads
        self.table = nn.Parameter(torch.randn((2 * size - 1) ** 2, heads) * 0.02)
        grid = torch.stack(torch.meshgrid(*[torch.arange(size)] * 2, indexing="ij")).flatten(1)
        apart = (grid[:, :, None] - grid[:, None, :]) + size - 1
        self.register_buffer("index", apart[0] * (2 * size - 1) + apart[1])
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.head = nn.Linear(width, 3)

    def forward(self, images):
        x = images.flatten(2).transpose(1, 2)
        n, t, c = x.shape
        qkv = self.qkv(x).reshape(n, t, 3, self.heads, c // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.table[self.index.view(-1)].view(t, t, -1).permute(2, 0, 1)
        attention = (q @ k.mT / math.sqrt(c // self.heads) + bias).softmax(dim=-1)
        return self.head(self.project((attention @ v).transpose(1, 2).reshape(n, t, c)).mean(1))

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return nn.functional.cross_entropy(self(images), labels)


@setup("rotary positions and causal attention, tokens predicted", "attention", texts, pad_texts)
class Rotary(Plain):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(60, 16, padding_idx=0)
        self.qkv = nn.Linear(16, 48, bias=False)
        self.out = nn.Linear(16, 60)
        angles = torch.outer(torch.arange(16.0), 100 ** (-torch.arange(4) / 4))
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def rotate(self, x):
        a, b = x.chunk(2, dim=-1)
        cos, sin = self.cos[: x.shape[-2]], self.sin[: x.shape[-2]]
        return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)

    def forward(self, ids):
        n, t = ids.shape
        q, k, v = self.qkv(self.embedding(ids)).view(n, t, 3, 2, 8).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v, is_causal=True)
        return self.out(h.transpose(1, 2).flatten(2))

    def training_step(self, batch, batch_idx):
        ids, _ = batch
        after = ids[:, 1:]
        losses = F.cross_entropy(
            self(ids)[:, :-1].transpose(1, 2), after, reduction="none", ignore_index=0
        )
        return torch.mean(losses.sum(1) / (after > 0).sum(1))


@setup("attention by einsum with weights as parameters", "attention", equal_series)
class Einsum(Plain):
    """Weights [heads, features, width], no linear layer at all."""

    def __init__(self, heads=2, features=4, width=3):
        super().__init__()
        self.wq = nn.Parameter(torch.randn(heads, features, width) * 0.5)
        self.wk = nn.Parameter(torch.randn(heads, features, width) * 0.5)
        self.wv = nn.Parameter(torch.randn(heads, features, width) * 0.5)
        self.wo = nn.Parameter(torch.randn(heads, width, features) * 0.5)
        self.bo = nn.Parameter(torch.zeros(features))
        self.log_temperature = nn.Parameter(torch.zeros(heads, 1, 1))
        self.classes = nn.Parameter(torch.randn(features, 3))

    def training_step(self, batch, batch_idx):
        x, y = batch
        q = torch.einsum("ntf,hfw->nhtw", x, self.wq)
        k = torch.einsum("ntf,hfw->nhtw", x, self.wk)
        v = torch.einsum("ntf,hfw->nhtw", x, self.wv)
        scores = torch.einsum("nhtw,nhsw->nhts", q, k) * self.log_temperature.exp()
        h = torch.einsum("nhts,nhsw,hwf->ntf", scores.softmax(-1), v, self.wo) + self.bo
        return F.cross_entropy(h.mean(1) @ self.classes, y)


class SelfAttention(nn.Module):
    def __init__(self, width, heads, dropout_p=0.1):
        super().__init__()
        self.heads, self.dropout_p = heads, dropout_p
        self.qkv = nn.Linear(width, 3 * width)

    def forward(self, x, keep):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(
            q, k, v, attn_mask=keep[:, None, None],
            dropout_p=self.dropout_p if self.training else 0.0,
        )  # fmt: skip
        return h.transpose(1, 2).flatten(2)


@setup("scaled_dot_product_attention with dropout_p", "attention", series, pad_series)
class Scaled(Plain):
    def __init__(self):
        super().__init__()
        self.inputs = nn.Linear(4, 8)
        self.attention = SelfAttention(8, 2)
        self.head = nn.Linear(8, 3)

    def training_step(self, batch, batch_idx):
        x, lengths, y = batch
        h = self.attention(self.inputs(x), ~padding(lengths, x.shape[1]))
        last = h[torch.arange(len(h)), lengths - 1]
        loss = F.cross_entropy(self.head(last), y)
        self.log("train_loss", loss, on_epoch=True)
        return loss


@setup("multi-query attention with RMSNorm and SwiGLU", "attention", equal_series)
class MultiQuery(Plain):
    """One head of keys and values for four of queries."""

    def __init__(self):
        super().__init__()
        self.inputs = nn.Linear(4, 16)
        self.norm1, self.norm2 = nn.RMSNorm(16), nn.RMSNorm(16)
        self.q, self.kv = nn.Linear(16, 16, bias=False), nn.Linear(16, 8, bias=False)
        self.gate, self.up = nn.Linear(16, 24, bias=False), nn.Linear(16, 24, bias=False)
        self.down = nn.Linear(24, 16, bias=False)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        h = self.inputs(x)
        n, t, _ = h.shape
        normed = self.norm1(h)
        q = self.q(normed).view(n, t, 4, 4).transpose(1, 2)
        k, v = (z.unsqueeze(1).expand(n, 4, t, 4) for z in self.kv(normed).chunk(2, dim=-1))
        h = h + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, 16)
        normed = self.norm2(h)
        h = h + self.down(F.silu(self.gate(normed)) * self.up(normed))
        return self.head(h[:, -1])

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])


@setup("linear attention", "attention", series, pad_series)
class LinearAttention(Plain):
    """No softmax: keys times values are added up over time, padding left out."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(4, 8) for _ in range(3))
        self.head = nn.Linear(8, 3)

    def training_step(self, batch, batch_idx):
        x, lengths, y = batch
        keep = ~padding(lengths, x.shape[1]).unsqueeze(-1)
        q, k = F.elu(self.q(x)) + 1, (F.elu(self.k(x)) + 1) * keep
        memory = k.transpose(1, 2) @ self.v(x)
        scale = q @ k.sum(1).unsqueeze(-1)
        h = (q @ memory / scale * keep).sum(1) / keep.sum(1)
        return F.cross_entropy(self.head(h), y)
