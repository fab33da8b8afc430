"""`make_adversarial` as people use it: on digits, beside `make_private`, and with mistakes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from defend import PGD, Adversarial, InputError, Linf, evaluate, make_adversarial
from defend.attacks.free import Free
from defend.objectives import AWP, MART, TRADES
from tests.helpers import data, flat
from tests.loops import adversarial_loop
from tests.reference.dpsgd import clipped_sum
from tests.training.adversarial_cases import ATTACK, batches, loop_of, mean_loss, net
from tests.training.loops import private

EPS = 0.15


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # for the ledgers


def digits():
    images, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy(images).float() / 16, torch.from_numpy(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:1300], order[1300:]
    return TensorDataset(x[train], y[train]), DataLoader(TensorDataset(x[test], y[test]), 500)


def trained(attack, train, epochs=8, **settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    loop = adversarial_loop(model, optimizer, attack, loss=mean_loss, seed=0, **settings)
    order = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for batch in DataLoader(train, batch_size=128, shuffle=True, generator=order):
            loop.step(batch)
    return model


def test_digits_become_robust():
    train, test = digits()
    judge = {"pgd": PGD(Linf(EPS), steps=20)}
    kinds = {
        "plain": trained(PGD(Linf(0.0), steps=1), train),
        "pgd": trained(PGD(Linf(EPS), steps=5), train, warmup_batches=20),
        "trades": trained(PGD(Linf(EPS), steps=5), train, objective=TRADES(3.0)),
        "free": trained(Free(Linf(EPS), replays=4), train, epochs=4),
    }
    found = {name: evaluate(model, test, judge) for name, model in kinds.items()}
    plain = found.pop("plain").attack_accuracy["pgd"]
    for report in found.values():
        assert report.clean_accuracy > 0.8
        assert report.attack_accuracy["pgd"] > plain + 0.25


# --- beside make_private --------------------------------------------------------------------------


def no_noise(model, records, **settings):
    """Of all records at each step: q = 1."""
    loader = DataLoader(records, batch_size=len(records))
    return private(model, torch.optim.SGD(model.parameters(), lr=0.1), loader,
                   noise_multiplier=0.0, insecure_seed=5, **settings)  # fmt: skip


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))


def released(records, attack, clean_fraction=0.0, model=None):
    """The clipped sum of one step on adversarial records."""
    model = model or mlp()
    adversarial = Adversarial(attack, clean_fraction=clean_fraction)
    with no_noise(model, records, selftest=False, adversarial=adversarial) as dp:
        for batch in dp.loader:
            dp.step(batch)
            gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        rates = dp.rates()
    return gradient * len(records), rates


def test_a_private_step_on_adversarial_records_equals_the_reference():
    records, attack = data(16), PGD(Linf(0.1), steps=3, random_start=False)
    found, rates = released(records, attack)
    x, y = records.tensors
    model = mlp()
    x_adv = attack(model, x, y)
    pairs = [(x_adv[i : i + 1], y[i : i + 1]) for i in range(16)]
    total = clipped_sum(model, lambda a, b: F.cross_entropy(model(a), b), pairs, 0.5)
    expected = torch.cat([t.flatten() for t in total])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert rates["attack/zero_grad_rate"] == 0.0  # counted here too


def test_one_record_moves_the_sum_by_no_more_than_one_clip():
    records, attack = data(8), PGD(Linf(0.1), steps=3, random_start=False)
    whole, _ = released(records, attack)
    moves = [
        (whole - released(Subset(records, [j for j in range(8) if j != i]), attack)[0]).norm() / 0.5
        for i in range(8)
    ]
    assert max(moves) <= 1 + 1e-4
    assert max(moves) > 0.5  # not vacuous

    # The same measure flags an attack that looks at the other records.
    def coupled(model, x, y, *, generator=None, chunk_size=None):
        return (x + 3 * x.mean(0)).clamp(0, 1)

    whole, _ = released(records, coupled)
    rest, _ = released(Subset(records, range(1, 8)), coupled)
    assert (whole - rest).norm() / 0.5 > 1 + 1e-4


def test_coins_and_starts_are_new_at_each_private_step():
    model, seen = mlp(), []

    def looking(model, batch):
        seen.append((batch[0], batch[1]))
        return mean_loss(model, batch)

    adversarial = Adversarial(ATTACK, clean_fraction=0.5)
    records = data(256)
    with private(
        model, loss=looking, epochs=2, selftest=False, chunk_size=None, adversarial=adversarial
    ) as dp:
        for _ in range(2):
            for batch in dp.loader:
                dp.step(batch)
                clean = (seen[-1][0][:, None] == records.tensors[0][None]).all(2).any(1)
                seen[-1] = (~clean).double().mean()
    shares = torch.stack(seen)
    assert len(shares) == 16
    assert len(set(shares.tolist())) > 1  # coins, not a fixed number
    assert abs(shares.mean() - 0.5) < 4 * 0.5 / 512**0.5


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attack", "objective", "name"),
    [
        (ATTACK, TRADES(), "trades"),
        (ATTACK, MART(), "mart"),
        (ATTACK, AWP(), r"awp\(madry\)"),
        (Free(Linf(0.1)), None, "Free"),
    ],
)
def test_what_needs_more_than_other_inputs_is_no_batch(attack, objective, name):
    loop = loop_of(net(), attack, **({"objective": objective} if objective else {}))
    with pytest.raises(InputError, match=rf"for `attacked`, got {name}, .* `step` or `backward`"):
        loop.attacked(batches(1)[0])


REFUSED = [
    ({"warmup_batches": -1}, r"the warm-up to be ≥ 0 and finite, got -1"),
    ({"seed": -1}, r"`seed` to be an integer ≥ 0 or None, got -1"),
    ({"seed": 0.5}, r"`seed` to be an integer ≥ 0 or None, got 0.5"),
    ({"state": {"seed": 1}}, r"a `state` that `state_dict` gave, got one of \['seed'\]"),
    ({"attack": "pgd"}, r"`attack` to be an attack such as PGD"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        loop_of(net(), **settings)


@pytest.mark.parametrize("loader", [None, [], iter([1])])
def test_a_warm_up_needs_a_loader_with_a_length(loader):
    model = net()
    adversarial = Adversarial(ATTACK, warmup_epochs=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(InputError, match="a `loader` with a length ≥ 1 for a warm-up"):
        make_adversarial(model, optimizer, loader, loss=mean_loss, adversarial=adversarial)


def test_the_warm_up_counts_epochs():
    model, sizes = net(), []

    def seen(module, batch):
        sizes.append(float((batch[0] - x).abs().max()))
        return mean_loss(module, batch)

    adversarial = Adversarial(PGD(Linf(0.2), steps=1, step_size=0.2), warmup_epochs=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    epoch = batches(8)
    loop = make_adversarial(model, optimizer, epoch, loss=seen, adversarial=adversarial)
    for x, y in epoch:
        loop.step((x, y))
    assert sizes[:4] == pytest.approx([0.05, 0.1, 0.15, 0.2], abs=1e-6)
    assert max(sizes[4:]) == pytest.approx(0.2, abs=1e-6)


def test_a_loss_for_each_record_is_refused():
    def per_record(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    model = net()
    with pytest.raises(InputError, match=r"the mean over the rows as one number, got tensor"):
        loop_of(model, loss=per_record).step(batches(1)[0])


def test_free_needs_a_step_that_looks_at_its_inputs():
    model = net()
    loop = loop_of(model, Free(Linf(0.1)), loss=lambda m, b: mean_loss(m, (b[0].detach(), b[1])))
    with pytest.raises(InputError, match=r"backward to reach its inputs, got no gradient"):
        loop.step(batches(1)[0])


def test_inputs_outside_the_box_are_refused_and_nothing_moves():
    model = net()
    before, state = flat(model), copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=r"inside the box \[0.0, 1.0\]"):
        loop_of(model).step((batches(1)[0][0] * 3, batches(1)[0][1]))
    assert torch.equal(flat(model), before)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
