"""The attacks of three other libraries, as functions, and models to attack with them."""

import functools
import math
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import nn

TRAINED, CLASSES = 1197, 10


@functools.cache
def digits():
    """(x, y) to train on and the 600 to attack: scikit-learn's digits, 1 × 8 × 8, in [0, 1]."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    x = (torch.as_tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16)[order]
    y = torch.as_tensor(labels)[order]
    return (x[:TRAINED], y[:TRAINED]), (x[TRAINED:], y[TRAINED:])


@functools.cache
def trained(eps):
    """A small convolutional net in eval mode; adversarially trained in L∞ where eps > 0."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 8, 4, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Flatten(),
            nn.Linear(16 * 16, CLASSES),
        )  # fmt: skip
        (x, y), _ = digits()
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
        for _ in range(15):
            for rows in torch.randperm(len(x)).split(64):
                clean, target = x[rows], y[rows]
                adv = clean if eps == 0 else _madry(model, clean, target, eps)
                optimizer.zero_grad()
                F.cross_entropy(model(adv), target).backward()
                optimizer.step()
        return model.eval()


def _madry(model, x, y, eps, steps=5):
    """PGD in six lines, so that what is trained does not depend on what is tested."""
    adv = x + torch.empty_like(x).uniform_(-eps, eps)
    for _ in range(steps):
        adv = adv.clamp(0, 1).detach().requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(model(adv), y), adv)
        adv = x + (adv.detach() + eps / 2 * grad.sign() - x).clamp(-eps, eps)
    return adv.clamp(0, 1).detach()


def torchattacks(model, x, y, norm, eps, steps, step_size):
    import torchattacks

    attack = {"linf": torchattacks.PGD, "l2": torchattacks.PGDL2}[norm]
    return attack(model, eps=eps, alpha=step_size, steps=steps)(x, y)


def foolbox(model, x, y, norm, eps, steps, step_size):
    import foolbox

    attacks = foolbox.attacks
    attack = {"linf": attacks.LinfPGD, "l2": attacks.L2PGD, "l1": attacks.L1PGD}[norm]
    adv = attack(abs_stepsize=step_size, steps=steps).run(
        foolbox.PyTorchModel(model, bounds=(0, 1)), x, y, epsilon=eps
    )
    model.zero_grad()  # it leaves gradients
    return adv


def art(model, x, y, norm, eps, steps, step_size):
    # Its import resets the handlers of the process's logging.
    with patch("logging.config.dictConfig"):
        from art.attacks.evasion import ProjectedGradientDescentPyTorch
        from art.estimators.classification import PyTorchClassifier
    classifier = PyTorchClassifier(
        model, nn.CrossEntropyLoss(), input_shape=tuple(x.shape[1:]), nb_classes=CLASSES,
        clip_values=(0.0, 1.0), device_type="cpu",
    )  # fmt: skip
    attack = ProjectedGradientDescentPyTorch(
        classifier, norm={"linf": math.inf, "l2": 2}[norm], eps=eps, eps_step=step_size,
        max_iter=steps, num_random_init=1, batch_size=len(x), verbose=False,
    )  # fmt: skip
    return torch.from_numpy(attack.generate(x.numpy(), y.numpy()))
