"""Layers and ways to use them whose per-record gradients equal those of each record alone."""

import torch
from opacus.layers import DPGRU, DPLSTM, DPRNN
from torch import nn
from torch.nn.utils import parametrizations

from .alone import T
from .layer_modules import (
    RMS,
    Apply,
    Listed,
    LowRank,
    Permuted,
    Shift,
    Spectrum,
    Temperature,
    Token,
    attention,
    flat_bags,
    freeze,
    frozen_statistics,
    hooked,
    in_place,
    keywords,
    loop,
    own_forward,
    packed,
    positions,
    recurrent,
    tie,
    transformer,
    two_outputs,
)

EQUAL = {
    # name: (kind of input, module)
    "linear": ("vector", lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))),
    "linear on a sequence": ("sequence", lambda: nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))),
    "linear by keyword": ("vector", lambda: Apply(lambda m, x: m.a(input=x), a=nn.Linear(6, 3))),
    "bilinear": (
        "vector",
        lambda: Apply(lambda m, x: m.b(m.a(x), x), a=nn.Linear(6, 4), b=nn.Bilinear(4, 6, 3)),
    ),
    "prelu": ("signal", lambda: nn.Sequential(nn.Conv1d(4, 4, 3), nn.PReLU(4))),
    "prelu, one weight": ("vector", lambda: nn.Sequential(nn.Linear(6, 6), nn.PReLU())),
    "conv1d": ("signal", lambda: nn.Conv1d(4, 6, 3, 2, 2, 2, groups=2)),
    "conv1d same": ("signal", lambda: nn.Conv1d(4, 6, 4, padding="same")),
    "conv1d circular": ("signal", lambda: nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular")),
    "conv2d": ("image", lambda: nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 2), (1, 2), groups=2)),
    "conv2d same": ("image", lambda: nn.Conv2d(4, 6, (4, 3), padding="same", dilation=2)),
    "conv2d valid": ("image", lambda: nn.Conv2d(4, 4, 3, padding="valid", groups=4, bias=False)),
    "conv2d cut": ("image", lambda: nn.Conv2d(4, 4, 2, stride=4)),
    "conv2d reflect": ("image", lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect")),
    "conv3d": ("volume", lambda: nn.Conv3d(2, 4, (2, 3, 2), (1, 2, 1), 1, groups=2)),
    "conv3d dilated": ("volume", lambda: nn.Conv3d(2, 4, 2, dilation=(2, 1, 1), padding=(0, 1, 0))),
    "conv3d replicate": ("volume", lambda: nn.Conv3d(2, 3, 2, padding=1, padding_mode="replicate")),
    "transposed conv1d": ("signal", lambda: nn.ConvTranspose1d(4, 6, 3, 2, groups=2)),
    "transposed conv2d": (
        "image",
        lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.ConvTranspose2d(4, 6, 3, 2, 1, 1)),
    ),
    "transposed conv, output size": (
        "image",
        lambda: Apply(lambda m, x: m.a(x, [14, 12]), a=nn.ConvTranspose2d(4, 2, 3, 2, 1)),
    ),
    "layer norm": ("sequence", lambda: nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6))),
    "layer norm, two axes": (
        "sequence",
        lambda: nn.Sequential(nn.Linear(6, 6), nn.LayerNorm([T, 6])),
    ),
    "layer norm without bias": (
        "sequence",
        lambda: nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6, bias=False)),
    ),
    "rms norm": ("sequence", lambda: nn.Sequential(nn.Linear(6, 6), nn.RMSNorm(6))),
    "rms norm by hand": ("sequence", lambda: nn.Sequential(nn.Linear(6, 6), RMS())),
    "group norm": ("image", lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4))),
    "instance norm": (
        "signal",
        lambda: nn.Sequential(nn.Conv1d(4, 4, 1), nn.InstanceNorm1d(4, affine=True)),
    ),
    "instance norm 2d": (
        "image",
        lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.InstanceNorm2d(4, affine=True)),
    ),
    "frozen batch statistics": ("vector", frozen_statistics),
    "embedding": ("ids", lambda: nn.Sequential(nn.Embedding(5, 6, padding_idx=0), nn.Linear(6, 3))),
    "sparse embedding": ("ids", lambda: nn.Embedding(5, 6, sparse=True)),
    "positions": (
        "ids",
        lambda: Apply(positions, words=nn.Embedding(5, 6), positions=nn.Embedding(T, 6)),
    ),
    "embedding bag": ("ids", lambda: nn.EmbeddingBag(5, 6, mode="mean")),
    "embedding bag, sum, padding": (
        "ids",
        lambda: nn.EmbeddingBag(5, 6, mode="sum", padding_idx=1),
    ),
    "embedding bag, mean, padding": ("ids", lambda: nn.EmbeddingBag(5, 6, padding_idx=1)),
    "embedding bag, offsets": ("ids", lambda: Apply(flat_bags, bags=nn.EmbeddingBag(5, 6))),
    "embedding bag, last offset": (
        "ids",
        lambda: Apply(flat_bags, bags=nn.EmbeddingBag(5, 6, mode="sum", include_last_offset=True)),
    ),
    "embedding bag, weights": (
        "ids",
        lambda: Apply(
            lambda m, x: m.bags(x, per_sample_weights=x.float().cos()),
            bags=nn.EmbeddingBag(5, 6, mode="sum"),
        ),
    ),
    "tied weights": ("ids", lambda: tie(nn.Embedding(5, 6))),
    "tied weights, padding": ("ids", lambda: tie(nn.Embedding(5, 6, padding_idx=0))),
    "used in a loop": ("vector", lambda: loop(3, nn.Linear(6, 6))),
    "a block used in a loop": ("vector", lambda: loop(2, Shift())),
    "used for nothing too": (
        "vector",
        lambda: Apply(
            lambda m, x: (m.a(x), m.b(m.a(x)), m.a(x + 1))[1], a=nn.Linear(6, 6), b=nn.Linear(6, 3)
        ),
    ),
    "in-place operations": (
        "vector",
        lambda: Apply(in_place, a=nn.Linear(6, 6), b=nn.Linear(6, 3)),
    ),
    "rnn": ("sequence", lambda: recurrent(DPRNN(6, 4, batch_first=True))),
    "lstm": ("sequence", lambda: recurrent(DPLSTM(6, 4, num_layers=2, batch_first=True))),
    "lstm, both ways": (
        "sequence",
        lambda: recurrent(DPLSTM(6, 4, batch_first=True, bidirectional=True)),
    ),
    "gru": ("sequence", lambda: recurrent(DPGRU(6, 4, batch_first=True, bidirectional=True))),
    "lstm, positions first": (
        "sequence",
        lambda: Apply(lambda m, x: m.rnn(x.transpose(0, 1))[0][-1], rnn=DPLSTM(6, 4)),
    ),
    "packed rnn": ("sequence", lambda: packed(DPRNN(6, 4, batch_first=True))),
    "packed lstm": (
        "sequence",
        lambda: packed(DPLSTM(6, 4, 2, batch_first=True, bidirectional=True)),
    ),
    "packed gru": ("sequence", lambda: packed(DPGRU(6, 4, batch_first=True, bidirectional=True))),
    "attention": ("sequence", attention),
    "transformer": ("sequence", transformer),
    "fused attention": (
        "sequence",
        lambda: Apply(
            lambda m, x: m.a(x, x, x, need_weights=False)[0],
            a=nn.MultiheadAttention(6, 2, batch_first=True),
        ),
    ),
    "fused attention with its weights": (
        "sequence",
        lambda: Apply(
            lambda m, x: m.b(sum(m.a(x, x, x)[i].sum(2) for i in (0, 1))),
            a=nn.MultiheadAttention(6, 2, batch_first=True),
            b=nn.Linear(T, 3),
        ),
    ),
    "two outputs": ("vector", lambda: Apply(lambda m, x: m.b(sum(m.a(x))), **two_outputs())),
    "one of two outputs": ("vector", lambda: Apply(lambda m, x: m.b(m.a(x)[1]), **two_outputs())),
    "constant buffers": ("vector", lambda: nn.Sequential(Permuted(), nn.Linear(6, 3))),
    "lists of parameters": ("vector", lambda: nn.Sequential(Listed(), nn.Linear(6, 3))),
    "scalars": (
        "vector",
        lambda: nn.Sequential(nn.Linear(6, 6), Temperature(), nn.Linear(6, 3)),
    ),
    "nothing but scalars": ("vector", Temperature),
    "scalars on a sequence, in a loop": ("sequence", lambda: loop(3, Temperature())),
    "complex numbers as two real parameters": (
        "vector",
        lambda: Apply(
            lambda m, x: m.b(torch.fft.ifft(m.a(torch.fft.fft(x))).real),
            a=nn.Sequential(Spectrum(), Spectrum()),
            b=nn.Linear(6, 3),
        ),
    ),
    "parameters and children": (
        "vector",
        lambda: nn.Sequential(nn.Linear(6, 6), Shift(), nn.Linear(6, 3)),
    ),
    "blocks in blocks": (
        "vector",
        lambda: Shift(nn.Sequential(Shift(), nn.Tanh(), freeze(nn.Linear(6, 6)))),
    ),
    "arguments by keyword": ("vector", lambda: Apply(keywords, block=Shift())),
    "token and positions": (
        "sequence",
        lambda: nn.Sequential(nn.Linear(6, 6), Token(), nn.Linear(6, 2)),
    ),
    "low rank": (
        "sequence",
        lambda: nn.Sequential(LowRank(nn.Linear(6, 6)), nn.Tanh(), LowRank(nn.Linear(6, 6))),
    ),
    "frozen backbone": ("vector", lambda: nn.Sequential(freeze(Shift()), nn.Linear(6, 3))),
    "frozen middle": (
        "vector",
        lambda: nn.Sequential(nn.Linear(6, 6), freeze(nn.Linear(6, 6)), nn.Linear(6, 3)),
    ),
    "frozen bias": (
        "vector",
        lambda: Apply(lambda m, x: m.a(x), a=(a := nn.Linear(6, 3), freeze(a.bias))[0]),
    ),
    "weight norm": (
        "vector",
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 4)), nn.Tanh()),
    ),
    "weight norm without bias": (
        "vector",
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 4, bias=False)), nn.Tanh()),
    ),
    "orthogonal": (
        "vector",
        lambda: parametrizations.orthogonal(nn.Linear(6, 6), use_trivialization=False),
    ),
    "replaced forward": (
        "vector",
        lambda: nn.Sequential(own_forward(nn.Linear(6, 6)), nn.Linear(6, 3)),
    ),
    "hooks of the user": (
        "vector",
        lambda: nn.Sequential(hooked(nn.Linear(6, 6)), hooked(Shift())),
    ),
}
