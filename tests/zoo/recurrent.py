"""Recurrent nets: PyTorch's modules, cells in a loop, and a scripted one."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import (
    pack_padded_sequence,
    pack_sequence,
    pad_packed_sequence,
    pad_sequence,
)

from tests.zoo.attention import equal_series, pad_series, pad_texts
from tests.zoo.records import Records, numbers, regression, series, texts
from tests.zoo.setup import Plain, setup


@setup("nn.LSTM, two layers with dropout", "recurrent", equal_series)
class TwoLayers(Plain):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 8, num_layers=2, dropout=0.3, batch_first=True)
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        out, _ = self.lstm(x)
        return self.fc(out[:, -1])

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss)
        return loss


@setup("nn.LSTM, both directions, packed without sorting", "recurrent", series, pad_series)
class Packed(Plain):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 6, batch_first=True, bidirectional=True)
        self.head = nn.Linear(12, 3)

    def training_step(self, batch, batch_idx):
        x, lengths, y = batch
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        _, (hidden, _) = self.lstm(packed)
        return F.cross_entropy(self.head(torch.cat([hidden[-2], hidden[-1]], dim=1)), y)


@setup("nn.LSTM with a projection, and a class weight", "recurrent", series, pad_series)
class Projected(Plain):
    """Weights of classes as a buffer; each record's loss is multiplied, and not normalized."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 8, proj_size=3, batch_first=True)
        self.register_buffer("class_weight", torch.tensor([1.0, 2.0, 0.5]))

    def training_step(self, batch, batch_idx):
        x, lengths, y = batch
        out, _ = self.lstm(x)
        last = out[torch.arange(len(x)), lengths - 1]
        return (F.cross_entropy(last, y, reduction="none") * self.class_weight[y]).mean()


def list_of_series(records):
    return [x for x, _ in records], torch.stack([y for _, y in records])


@setup("nn.GRU on a list of sequences, packed and padded again", "recurrent",
       series, list_of_series)  # fmt: skip
class PackedGRU(Plain):
    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(4, 8, num_layers=2, dropout=0.2, bidirectional=True)
        self.attend = nn.Linear(16, 1)
        self.head = nn.Linear(16, 3)

    def training_step(self, batch, batch_idx):
        xs, y = batch
        out, _ = self.gru(pack_sequence(xs, enforce_sorted=False))
        out, lengths = pad_packed_sequence(out, batch_first=True)
        absent = torch.arange(out.shape[1])[None] >= lengths[:, None]
        scores = self.attend(out).squeeze(-1).masked_fill(absent.to(out.device), float("-inf"))
        return F.cross_entropy(self.head((scores.softmax(1).unsqueeze(1) @ out).squeeze(1)), y)


@setup("nn.GRU with a learned initial state", "recurrent", equal_series)
class InitialState(Plain):
    def __init__(self):
        super().__init__()
        self.h0 = nn.Parameter(torch.zeros(1, 1, 8))
        self.gru = nn.GRU(4, 8, batch_first=True)
        self.head = nn.Linear(8, 3)

    def training_step(self, batch, batch_idx):
        x, y = batch
        h0 = self.h0.expand(-1, x.size(0), -1).contiguous()
        return F.cross_entropy(self.head(self.gru(x, h0)[1][0]), y)


@setup("nn.RNN with relu, time first", "recurrent", equal_series)
class PlainRNN(Plain):
    """Classes as numbers: a regression."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.RNN(4, 8, nonlinearity="relu", bidirectional=True)
        self.head = nn.Linear(16, 1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        out, _ = self.rnn(x.transpose(0, 1))
        return F.mse_loss(self.head(out.mean(0)).squeeze(1), y.float())


def tagged_series():
    g = numbers(1)
    return Records((x, torch.randint(4, (len(x),), generator=g)) for x, _ in series())


def pad_tags(records):
    xs, tags = zip(*records, strict=True)
    return pad_sequence(xs, True), pad_sequence(tags, True, padding_value=-1)


@setup("nn.LSTM, tagging, mean over each record's tags", "recurrent", tagged_series, pad_tags)
class Tagger(Plain):
    """One direction, so the padding comes after all that counts."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 8, batch_first=True)
        self.head = nn.Linear(8, 4)

    def training_step(self, batch, batch_idx):
        x, tags = batch
        logits = self.head(self.lstm(x)[0])
        losses = F.cross_entropy(logits.mT, tags, ignore_index=-1, reduction="none")
        return (losses.sum(-1) / (tags >= 0).sum(-1)).mean()


@setup("nn.LSTM, language model with tied weights", "recurrent", texts, pad_texts)
class TiedLSTM(Plain):
    """Locked dropout by hand: one mask for all times of a record."""

    def __init__(self):
        super().__init__()
        self.dropout = 0.2
        self.encoder = nn.Embedding(60, 12, padding_idx=0)
        self.rnn = nn.LSTM(12, 12, batch_first=True)
        self.decoder = nn.Linear(12, 60)
        self.decoder.weight = self.encoder.weight

    def locked(self, x):
        mask = torch.ones(x.shape[0], 1, x.shape[2], device=x.device)
        return x * F.dropout(mask, self.dropout, self.training)

    def training_step(self, batch, batch_idx):
        ids, _ = batch
        h, _ = self.rnn(self.locked(self.encoder(ids[:, :-1])))
        logits = self.decoder(self.locked(h))
        nll = F.nll_loss(logits.log_softmax(-1).mT, ids[:, 1:], reduction="none", ignore_index=0)
        lengths = ids[:, 1:].ne(0).sum(1)
        return nll.sum(1).div(lengths).mean()


@setup("nn.LSTMCell in a loop, stopped at each record's end", "recurrent", series, pad_series)
class Cells(Plain):
    def __init__(self):
        super().__init__()
        self.cell = nn.LSTMCell(4, 8)
        self.head = nn.Linear(8, 3)

    def training_step(self, batch, batch_idx):
        x, lengths, y = batch
        h = c = x.new_zeros(len(x), 8)
        for t in range(x.shape[1]):
            alive = (t < lengths).unsqueeze(1)
            new_h, new_c = self.cell(x[:, t], (h, c))
            h, c = torch.where(alive, new_h, h), torch.where(alive, new_c, c)
        return F.cross_entropy(self.head(h), y)


@setup("nn.GRUCell that writes its own future", "recurrent", equal_series)
class Forecaster(Plain):
    """Reads half of the record, and feeds its guesses back for the other half."""

    def __init__(self):
        super().__init__()
        self.cell = nn.GRUCell(4, 8)
        self.out = nn.Linear(8, 4)

    def training_step(self, batch, batch_idx):
        x, _ = batch
        h = torch.zeros(x.shape[0], self.cell.hidden_size, device=x.device)
        for t in range(3):
            h = self.cell(x[:, t], h)
        guesses = []
        for _ in range(3):
            guesses.append(self.out(h))
            h = self.cell(guesses[-1], h)
        return F.mse_loss(torch.stack(guesses, dim=1), x[:, 3:])


@setup("nn.RNNCell with LayerNorm between the steps", "recurrent", equal_series)
class NormedCell(Plain):
    def __init__(self):
        super().__init__()
        self.cells = nn.ModuleList([nn.RNNCell(4, 6), nn.RNNCell(6, 6)])
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 3)

    def training_step(self, batch, batch_idx):
        x, y = batch
        states = [x.new_zeros(x.shape[0], 6) for _ in self.cells]
        for now in x.unbind(1):
            for i, cell in enumerate(self.cells):
                now = states[i] = self.norm(cell(now, states[i]))
        return F.cross_entropy(self.head(now), y)


class MinimalLSTM(nn.Module):
    """An LSTM layer for TorchScript."""

    def __init__(self, features: int, width: int):
        super().__init__()
        self.width = width
        self.weight_ih = nn.Parameter(torch.randn(4 * width, features) * 0.3)
        self.weight_hh = nn.Parameter(torch.randn(4 * width, width) * 0.3)
        self.bias = nn.Parameter(torch.zeros(4 * width))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(x.size(0), self.width, device=x.device, dtype=x.dtype)
        c = torch.zeros_like(h)
        for t in range(x.size(1)):
            gates = x[:, t] @ self.weight_ih.t() + h @ self.weight_hh.t() + self.bias
            i, f, g, o = gates.chunk(4, 1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
        return h


@setup("an LSTM of TorchScript", "recurrent", equal_series)
class Scripted(Plain):
    def __init__(self):
        super().__init__()
        self.rnn = torch.jit.script(MinimalLSTM(4, 6))
        self.head = nn.Linear(6, 3)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.head(self.rnn(x)), y)


class PlainLSTM(nn.Module):
    """The same without TorchScript, weights in a ParameterDict."""

    def __init__(self, features, width):
        super().__init__()
        self.width = width
        self.weights = nn.ParameterDict(
            {g: nn.Parameter(torch.randn(features + width, width) * 0.3) for g in "ifgo"}
        )
        self.biases = nn.ParameterDict({g: nn.Parameter(torch.zeros(width)) for g in "ifgo"})

    def forward(self, x):
        h = c = x.new_zeros(x.shape[0], self.width)
        for now in x.transpose(0, 1):
            seen = torch.cat([now, h], dim=-1)
            i, f, g, o = (torch.addmm(self.biases[n], seen, self.weights[n]) for n in "ifgo")
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        return h


@setup("an LSTM by hand, weights in a ParameterDict", "recurrent", equal_series)
class HandMade(Plain):
    def __init__(self):
        super().__init__()
        self.rnn = PlainLSTM(4, 6)
        self.head = nn.Linear(6, 3)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.head(self.rnn(batch[0])), batch[1])


@setup("an echo: state-space layer with complex eigenvalues", "recurrent",
       partial(regression, features=10))  # fmt: skip
class StateSpace(Plain):
    """h_t = λ h_(t−1) + b x_t with λ inside the unit circle, complex; y = Re⟨c, h_T⟩."""

    def __init__(self, width=6):
        super().__init__()
        self.log_decay = nn.Parameter(torch.rand(width) - 2)
        self.phase = nn.Parameter(torch.rand(width) * 3)
        self.b = nn.Parameter(torch.randn(width, dtype=torch.cfloat))
        self.c = nn.Parameter(torch.randn(width, dtype=torch.cfloat))

    def training_step(self, batch, batch_idx):
        x, y = batch
        eigenvalues = torch.exp(torch.complex(-self.log_decay.exp(), self.phase))
        h = torch.zeros(len(x), len(self.b), dtype=torch.cfloat, device=x.device)
        for t in range(x.shape[1]):
            h = h * eigenvalues + self.b * x[:, t, None]
        return F.mse_loss((h @ self.c).real.unsqueeze(-1), y)
