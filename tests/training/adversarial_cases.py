"""What the tests of adversarial loops share: nets, and adversarial training written by hand."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from defend import PGD, Linf
from defend.objectives import AWP, MART, TRADES, Madry
from defend.privacy import Randomness
from tests.helpers import data
from tests.loops import adversarial_loop
from tests.reference import objectives as reference

EPS, STEPS, SEED = 0.1, 3, 5
ATTACK = PGD(Linf(EPS), steps=STEPS)
GAMMA = 0.05
OBJECTIVES = [Madry(), TRADES(4.0), MART(3.0)]
OBJECTIVES += [AWP(objective, GAMMA) for objective in OBJECTIVES]
SLOW = {
    "madry": reference.madry,
    "trades": lambda clean, adv, y: reference.trades(clean, adv, y, beta=4.0),
    "mart": lambda clean, adv, y: reference.mart(clean, adv, y, beta=3.0),
}


def net(dtype=torch.float64):
    """Batch normalization and dropout: the order of forwards shows."""
    torch.manual_seed(0)
    layers = nn.Linear(8, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.3), nn.Linear(12, 3)
    return nn.Sequential(*layers).to(dtype)


def sgd(model, lr=0.1):
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def mean_loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def batches(count=3, rows=16, dtype=torch.float64):
    x, y = data(count * rows).tensors
    return list(zip(x.to(dtype).split(rows), y.split(rows), strict=True))


def loop_of(model, attack=ATTACK, optimizer=None, *, loss=mean_loss, seed=SEED, **settings):
    return adversarial_loop(
        model, optimizer or sgd(model), attack, loss=loss, seed=seed, **settings
    )


def state_of(model):
    """Weights and buffers, in one vector."""
    return torch.cat([t.detach().double().flatten() for t in model.state_dict().values()])


# --- by hand --------------------------------------------------------------------------------------


def start_of(number, x, radius):
    """The random start of batch `number` of a loop in its only process."""
    return Linf(radius).random_start(x, Randomness(SEED).generator("attack", number))


def slow_attack(model, x, y, number, objective):
    """PGD on a copy in eval mode, record by record."""
    model = copy.deepcopy(model).eval()
    trades = "trades" in objective.name
    start = start_of(number, x, 0.001 if trades else EPS)
    rows = []
    for i in range(len(x)):
        clean, delta = x[i : i + 1], start[i : i + 1]
        delta = (clean + delta).clamp(0, 1) - clean
        for _ in range(STEPS):
            adv = (clean + delta).requires_grad_()
            z = model(adv)[0]
            loss = reference.cross_entropy(z, int(y[i]))
            if trades:
                loss = reference.divergence(model(clean)[0].detach(), z)
            grad = torch.autograd.grad(loss, adv)[0]
            delta = (delta + 2.5 * EPS / STEPS * grad.sign()).clamp(-EPS, EPS)
            delta = (clean + delta).clamp(0, 1) - clean
        rows.append(clean + delta)
    return torch.cat(rows)


def whole_loss(model, x, x_adv, y, name, *, clean_first):
    """The objective's mean over the rows, from two forwards (one for Madry) in the order asked."""
    if name == "madry":
        adv = clean = model(x_adv)
    elif clean_first:
        clean, adv = model(x), model(x_adv)
    else:
        adv, clean = model(x_adv), model(x)
    return reference.batch(SLOW[name], clean, adv, y).mean()


def slow_step(model, optimizer, batch, number, objective, *, swapped=False):
    """One step from the papers. `swapped` has the forwards the other way round: a wrong answer."""
    x, y = batch
    inner = objective.objective if isinstance(objective, AWP) else objective
    x_adv = slow_attack(model, x, y, number, objective)
    before = [p.detach().clone() for p in model.parameters()]
    if isinstance(objective, AWP):

        def climbed(proxy):
            return whole_loss(proxy, x, x_adv, y, inner.name, clean_first=True)

        with torch.random.fork_rng():
            moves = reference.proxy_perturbation(model, climbed, GAMMA)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.add_(moves.get(name, 0.0))
    own_first = (inner.name == "trades") != swapped
    loss = whole_loss(model, x, x_adv, y, inner.name, clean_first=own_first)
    optimizer.zero_grad()
    loss.backward()
    with torch.no_grad():
        for p, value in zip(model.parameters(), before, strict=True):
            p.copy_(value)
    optimizer.step()
    return loss.detach()
