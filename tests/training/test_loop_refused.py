"""`make_private`: what is refused, and what is left behind after an error."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from defend import InputError, PrivacyError
from tests.helpers import Net, data, flat
from tests.training.loops import assert_closed, mean_loss, net, private, sgd, some_steps, train


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # for the ledgers


def test_closing_leaves_the_model_as_it_was():
    model = net()
    keys, modes = list(model.state_dict()), [m.training for m in model.modules()]
    optimizer = sgd(model)
    torch.manual_seed(3)
    numbers = torch.get_rng_state()
    loop = train(private(model, optimizer))
    assert_closed(model)
    assert list(model.state_dict()) == keys
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), numbers)
    mean_loss(model, (data(8).tensors[0], data(8).tensors[1])).backward()
    optimizer.step()  # nothing refuses it any more
    loop.close()  # twice is fine
    assert loop.epsilon > 0  # and what was spent is still known


class UnluckyError(Exception):
    pass


@pytest.mark.parametrize("after_backward", [False, True])
def test_an_error_in_the_loss_closes_the_loop(after_backward):
    """In the second chunk of the third batch, where there are raw gradients to leak."""
    calls = []

    def loss(model, batch):
        value = mean_loss(model, batch)
        calls.append(1)
        if len(calls) > 60:
            if after_backward:
                value.backward(retain_graph=True)
            raise UnluckyError
        return value

    model = net()
    loop = private(model, loss=loss, chunk_size=3, selftest=False)
    with pytest.raises(UnluckyError):
        some_steps(loop, 8)
    assert_closed(model)
    assert 0 < loop.steps < 8
    with pytest.raises(PrivacyError, match="a step after `close` or after an error"):
        loop.step(None)
    with pytest.raises(PrivacyError, match="a batch asked for after its end or after an error"):
        next(iter(loop.loader))
    again = private(model, state=loop.state_dict())
    assert again.steps == loop.steps
    again.close()


def test_an_error_at_the_start_leaves_the_model_as_it_was():
    model = net()

    def loss(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")

    numbers = torch.get_rng_state()
    with pytest.raises(PrivacyError, match="not the plain mean"):
        private(model, loss=loss)
    assert_closed(model)
    assert torch.equal(torch.get_rng_state(), numbers)


def test_no_step_can_be_taken_behind_its_back():
    model = net()
    optimizer = sgd(model)
    with private(model, optimizer) as loop:
        batch = next(iter(loop.loader))
        before = flat(model).clone()
        mean_loss(model, batch).backward()
        with pytest.raises(PrivacyError, match="one noised gradient for each optimizer step"):
            optimizer.step()
        assert all(p.grad is None for p in model.parameters())
        assert torch.equal(flat(model), before)
        loop.step(batch)
        with pytest.raises(PrivacyError, match="one noised gradient for each optimizer step"):
            optimizer.step()  # nor the same gradient twice


@pytest.mark.parametrize(
    "make",
    [
        lambda batch: next(iter(DataLoader(data(8), batch_size=8))),
        lambda batch: (batch[0][1:], batch[1][1:]),
        lambda batch: "no tensor",
    ],
)
def test_a_batch_that_was_not_drawn_is_refused(make):
    with private(net(), insecure_seed=5) as loop:
        batch = next(iter(loop.loader))
        with pytest.raises(PrivacyError, match="as the private loader gave it, got another"):
            loop.step(make(batch))


def test_a_batch_without_the_loader_or_twice_is_refused():
    own = next(iter(DataLoader(data(32), batch_size=32)))
    with private(net()) as loop, pytest.raises(PrivacyError, match="its sampler did not draw"):
        loop.step(own)
    with private(net()) as loop:
        batch = next(iter(loop.loader))
        loop.step(batch)
        with pytest.raises(PrivacyError, match="a batch was used twice"):
            loop.step(batch)


def test_a_step_after_close_is_refused():
    model = net()
    loop = private(model)
    batch = next(iter(loop.loader))
    loop.close()
    before = flat(model).clone()
    with pytest.raises(PrivacyError, match=r"Go on with\s+make_private\(..., state="):
        loop.step(batch)
    assert torch.equal(flat(model), before)


class Normalizing(Net):
    def __init__(self):
        super().__init__()
        self.net.insert(0, nn.BatchNorm1d(8))


class Concatenating(Net):
    def forward(self, x):
        return super().forward(torch.cat([x, x]))[: len(x)]


class Stream(IterableDataset):
    def __iter__(self):
        yield from data(64)


def half_of(model):
    return torch.optim.SGD(model.net[0].parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("make", "settings", "error", "message"),
    [
        (Normalizing, {}, PrivacyError, "BatchNorm1d at `net.0`"),
        (Net, {"optimizer": half_of}, PrivacyError, "`net.2.weight` left out"),
        (Concatenating, {"engine": "hooks"}, PrivacyError, "in the gradient of `net.0.weight`"),
        (Net, {"loss": lambda m, b: m(b[0])}, InputError, "the mean over the rows as one number"),
        (Net, {"loss": lambda m, b: 1.0}, InputError, "as one number, got 1.0. Take the mean"),
        (
            Net,
            {"loss": lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="sum")},
            PrivacyError,
            "the loss is not the plain mean over rows",
        ),
        (Net, {"epochs": 0}, InputError, "`epochs` to be ≥ 1, got 0. Give"),
        (Net, {"batches": DataLoader(Stream(), 8)}, PrivacyError, "iterable data set Stream"),
        (Net, {"batches": DataLoader(data(8), 16)}, PrivacyError, "16 from 8 records"),
        (Net, {"batches": [1, 2]}, PrivacyError, "got a builtins.list"),
        (Net, {"delta": 0.0}, InputError, r"`delta` to be in \(0, 1\)"),
        (Net, {"noise_multiplier": None}, InputError, "`target_epsilon`, `noise_multiplier` or"),
        (Net, {"state": {"fits": {}}}, InputError, "`state` that `state_dict` gave, got"),
    ],
)
def test_refused(make, settings, error, message):
    torch.manual_seed(0)
    model = make()
    optimizer = settings.pop("optimizer", sgd)(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=f"(?s){message}"):
        private(model, optimizer, **settings)
    assert_closed(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_without_the_self_test_the_first_step_still_looks():
    with (
        private(Concatenating(), selftest=False, engine="hooks") as loop,
        pytest.raises(PrivacyError, match=r"in the gradient of `net.0.weight`"),
    ):
        some_steps(loop, 1)
    assert loop.selftest is None
    assert loop.steps == 0
