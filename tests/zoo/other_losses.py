"""What is in the loss: several towers, derivatives, likelihoods, several labels."""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from tests.zoo.records import Records, numbers, points, regression
from tests.zoo.setup import Plain, setup

UNSOUND = [
    ("contrastive loss with negatives from the batch (SimCLR, CLIP)", "records are negatives"),
    ("Barlow Twins, VICReg", "correlations over the batch"),
    ("Cox partial likelihood", "risk sets from the batch"),
    ("cross-entropy with class weights", "divided by the weights of the batch"),
    ("focal loss divided by the positives of the batch", "positives of the batch are counted"),
]


def pairs_of_points():
    g = numbers(1)
    return Records(
        (torch.randn(6, generator=g), torch.randn(6, generator=g), float(i % 2)) for i in range(12)
    )


def tower(width=6, out=4):
    return nn.Sequential(nn.Linear(width, 12), nn.ReLU(), nn.Dropout(0.1), nn.Linear(12, out))


def contrast(a, b, same, margin=1.0):
    """Each pair's own contrastive loss."""
    distance = (a - b).square().sum(1).add(1e-6).sqrt()
    return (same * distance**2 + (1 - same) * F.relu(margin - distance) ** 2).mean()


@setup("siamese network, the tower called twice", "other", pairs_of_points)
class SiameseTwice(Plain):
    def __init__(self):
        super().__init__()
        self.tower = tower()

    def training_step(self, batch, batch_idx):
        left, right, same = batch
        return contrast(self.tower(left), self.tower(right), same.float())


@setup("siamese network, both inputs in one call by torch.cat", "other", pairs_of_points)
class SiameseCat(Plain):
    """Twice as many rows as records, and a record's two rows stand apart."""

    def __init__(self):
        super().__init__()
        self.tower = tower()

    def training_step(self, batch, batch_idx):
        left, right, same = batch
        a, b = self.tower(torch.cat([left, right], dim=0)).chunk(2)
        return contrast(a, b, same.float())


@setup("siamese network, both inputs in one call, interleaved", "other", pairs_of_points)
class SiameseStack(Plain):
    """[N, 2, F] is flattened, so a record's two rows stand together."""

    def __init__(self):
        super().__init__()
        self.tower = tower()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.shift = nn.Parameter(torch.tensor(0.0))

    def training_step(self, batch, batch_idx):
        left, right, same = batch
        z = self.tower(torch.stack([left, right], dim=1).flatten(0, 1)).unflatten(0, (-1, 2))
        logits = self.scale * F.cosine_similarity(z[:, 0], z[:, 1]) + self.shift
        return F.binary_cross_entropy_with_logits(logits, same.float())


def triplets():
    g = numbers(2)
    return Records(
        {"user": i % 7, "liked": (3 * i) % 11, "other": torch.randint(11, (4,), generator=g)}
        for i in range(14)
    )


@setup("two towers of embeddings, margin to the record's own negatives", "other", triplets)
class TwoTower(Plain):
    """Negatives come with the record, not from the batch."""

    def __init__(self):
        super().__init__()
        self.users, self.items = nn.Embedding(7, 8), nn.Embedding(11, 8)
        self.user_net, self.item_net = nn.Linear(8, 6), nn.Linear(8, 6)

    def training_step(self, batch, batch_idx):
        user = self.user_net(self.users(batch["user"]))
        liked = self.item_net(self.items(batch["liked"]))
        other = self.item_net(self.items(batch["other"]))
        good = (user * liked).sum(-1, keepdim=True)
        bad = torch.einsum("nd,nkd->nk", user, other)
        return F.relu(0.5 - good + bad).mean()


def triple_points():
    g = numbers(3)
    return Records(tuple(torch.randn(6, generator=g) for _ in range(3)) for _ in range(10))


@setup("triplet loss on unit vectors", "other", triple_points)
class Triplet(Plain):
    def __init__(self):
        super().__init__()
        self.net = tower()
        self.criterion = nn.TripletMarginLoss(margin=0.5)

    def training_step(self, batch, batch_idx):
        return self.criterion(*(F.normalize(self.net(x), dim=-1) for x in batch))


def labelled_with_many():
    g = numbers(4)
    return Records(
        {"x": torch.randn(6, generator=g), "labels": torch.randint(2, (5,), generator=g).float()}
        for _ in range(12)
    )


@setup("several labels, BCE with weights for positives", "other", labelled_with_many)
class MultiLabel(Plain):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.Mish(), nn.Dropout(0.2), nn.Linear(16, 5))
        self.criterion = nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1.0, 2.0, 1.0, 3.0, 1.0]))

    def training_step(self, batch, batch_idx):
        return self.criterion(self.net(batch["x"]), batch["labels"])


@setup("regression with targets [N, 1]", "other", regression)
class Regression(Plain):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.Softplus(), nn.Linear(16, 1))
        self.loss = nn.MSELoss()

    def training_step(self, batch, batch_idx):
        x, y = batch
        y_hat = self.net(x)
        assert y_hat.shape == y.shape == (len(x), 1)
        return self.loss(y_hat, y)


@setup("Gaussian likelihood, one log σ for all", "other", partial(regression, outputs=2))
class LogSigma(Plain):
    """The parameter is used in the step itself."""

    def __init__(self):
        super().__init__()
        self.mean = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2))
        self.log_sigma = nn.Parameter(torch.zeros(2))

    def training_step(self, batch, batch_idx):
        x, y = batch
        z = (y - self.mean(x)) * torch.exp(-self.log_sigma)
        nll = 0.5 * z**2 + self.log_sigma + 0.5 * math.log(2 * math.pi)
        return nll.sum(dim=1).mean()


@setup("mean and variance by two heads, nn.GaussianNLLLoss", "other", regression)
class Heteroscedastic(Plain):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 12), nn.ReLU())
        self.mean, self.variance = nn.Linear(12, 1), nn.Linear(12, 1)

    def training_step(self, batch, batch_idx):
        h = self.body(batch[0])
        return nn.GaussianNLLLoss()(self.mean(h), batch[1], F.softplus(self.variance(h)) + 1e-3)


@setup("mixture density network", "other", regression)
class MixtureDensity(Plain):
    def __init__(self, parts=3):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3 * parts))

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits, mean, scale = self.net(x).chunk(3, dim=-1)
        mixture = torch.distributions.MixtureSameFamily(
            torch.distributions.Categorical(logits=logits),
            torch.distributions.Normal(mean, F.softplus(scale) + 0.1),
        )
        return -mixture.log_prob(y.squeeze(-1)).mean()


@setup("several tasks weighed by their trained uncertainty", "other",
       partial(regression, outputs=3))  # fmt: skip
class Uncertainty(Plain):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(6, 12)
        self.heads = nn.ModuleDict({"a": nn.Linear(12, 1), "b": nn.Linear(12, 2)})
        self.log_vars = nn.ParameterDict({k: nn.Parameter(torch.zeros(())) for k in "ab"})

    def training_step(self, batch, batch_idx):
        x, y = batch
        h = F.gelu(self.body(x))
        losses = {
            "a": F.mse_loss(self.heads["a"](h), y[:, :1]),
            "b": F.l1_loss(self.heads["b"](h), y[:, 1:]),
        }
        return sum(losses[k] * torch.exp(-s) + s for k, s in self.log_vars.items())


@setup("gradient penalty on each record's own input", "other", points)
class GradientPenalty(Plain):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 12), nn.SiLU(), nn.Linear(12, 3))

    def training_step(self, batch, batch_idx):
        x, y = batch
        x = x.clone().requires_grad_(True)
        logits = self.net(x)
        score = logits.gather(1, y[:, None]).sum()
        (slope,) = torch.autograd.grad(score, x, create_graph=True)
        return F.cross_entropy(logits, y) + 0.1 * (slope.norm(dim=1) - 1).pow(2).mean()


def collocation():
    g = numbers(5)
    return Records(torch.rand(2, generator=g) for _ in range(12))


@setup("physics-informed net: residual of the heat equation", "other", collocation)
class HeatEquation(Plain):
    """u_t = κ u_xx, with κ trained too; first and second derivatives by autograd."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(2, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 1)
        )
        self.kappa = nn.Parameter(torch.tensor(0.5))

    def derivative(self, y, x):
        return torch.autograd.grad(y, x, torch.ones_like(y), create_graph=True)[0]

    def training_step(self, batch, batch_idx):
        t, x = (c.clone().requires_grad_() for c in batch.split(1, dim=1))
        u = self.net(torch.cat([t, x], dim=1))
        u_xx = self.derivative(self.derivative(u, x), x)
        residual = self.derivative(u, t) - self.kappa * u_xx
        start = self.net(torch.cat([torch.zeros_like(t), x], dim=1))
        return residual.pow(2).mean() + (start - torch.sin(torch.pi * x)).pow(2).mean()


@setup("energy-based model with a scalar parameter, score matching", "other", points)
class Energy(Plain):
    """½ ‖∇E‖² − tr ∇²E along a fixed direction, for each record."""

    def __init__(self):
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(6, 12), nn.Softplus(), nn.Linear(12, 1))
        self.stiffness = nn.Parameter(torch.tensor(1.0))
        self.register_buffer("direction", torch.ones(6) / 6**0.5)

    def training_step(self, batch, batch_idx):
        x = batch[0].detach().requires_grad_()
        energy = self.energy(x).squeeze(1) + 0.5 * self.stiffness * x.square().sum(1)
        score = -torch.autograd.grad(energy.sum(), x, create_graph=True)[0]
        along = (score * self.direction).sum(1)
        bend = torch.autograd.grad(along.sum(), x, create_graph=True)[0] @ self.direction
        return (0.5 * along**2 + bend).mean()


@setup("distillation from a frozen teacher", "other", points)
class Distilled(Plain):
    """The teacher's weights require no gradient and are in eval mode."""

    def __init__(self):
        super().__init__()
        self.teacher = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Linear(16, 3))
        self.teacher.eval().requires_grad_(False)  # Lightning calls `train` after a validation
        self.student = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

    def train(self, mode=True):
        super().train(mode)
        self.teacher.eval()
        return self

    def training_step(self, batch, batch_idx):
        x, y = batch
        with torch.no_grad():
            target = self.teacher(x).div(2).softmax(1)
        logits = self.student(x)
        soft = F.kl_div((logits / 2).log_softmax(1), target, reduction="batchmean")
        return F.cross_entropy(logits, y) + 4 * soft


@setup("BYOL on two views, a target net without gradient", "other", triple_points)
class Byol(Plain):
    """The target is a frozen copy; nothing is normalized over the batch."""

    def __init__(self):
        super().__init__()
        self.online, self.predictor = tower(), nn.Linear(4, 4)
        self.target = tower()
        for p in self.target.parameters():
            p.requires_grad = False

    def training_step(self, batch, batch_idx):
        one, two, _ = batch
        loss = 0.0
        for seen, aimed in ((one, two), (two, one)):
            guess = self.predictor(self.online(seen))
            loss = loss + 2 - 2 * F.cosine_similarity(guess, self.target(aimed).detach()).mean()
        return loss


@setup("policy gradient with a baseline, rewards in the record", "other", pairs_of_points)
class ActorCritic(Plain):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 12), nn.Tanh())
        self.actor, self.critic = nn.Linear(12, 4), nn.Linear(12, 1)

    def training_step(self, batch, batch_idx):
        state, other, reward = batch
        h = self.body(state)
        value = self.critic(h).squeeze(-1)
        policy = torch.distributions.Categorical(logits=self.actor(h))
        action = other[:, :4].argmax(-1)
        advantage = (reward - value).detach()
        loss = -policy.log_prob(action) * advantage - 0.01 * policy.entropy()
        return (loss + 0.5 * F.smooth_l1_loss(value, reward.float(), reduction="none")).mean()
