"""The same L∞ PGD by defend, by hand and by three other libraries: what attack_speed.py times."""

import dataclasses
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defend import PGD, Linf

Contender = Callable[[], Tensor]


@dataclasses.dataclass(frozen=True)
class Task:
    """A model in eval mode, a batch in [0, 1], and the settings that all contenders share."""

    model: nn.Module
    x: Tensor
    y: Tensor
    eps: float
    steps: int

    @property
    def step_size(self) -> float:
        return 2.5 * self.eps / self.steps

    def channels_last(self) -> "Task":
        """The same batch in the layout that tensor cores like."""
        return dataclasses.replace(self, x=self.x.to(memory_format=torch.channels_last))


def ours(task: Task, *, steps: int | None = None, **settings: object) -> Contender:
    """defend's PGD, as a training calls it."""
    steps = steps or task.steps
    step_size = 2.5 * task.eps / steps
    attack = PGD(Linf(task.eps), steps=steps, step_size=step_size, **settings)
    generator = torch.Generator(task.x.device).manual_seed(0)
    return lambda: attack(task.model, task.x, task.y, generator=generator)


def bare(task: Task) -> Contender:
    """The loop a careful user writes: eval mode, one clamp for ball and box, only ∂loss/∂x."""

    def run() -> Tensor:
        low, high = (task.x - task.eps).clamp_(min=0), (task.x + task.eps).clamp_(max=1)
        adv = torch.clamp(task.x + torch.empty_like(task.x).uniform_(-task.eps, task.eps), 0, 1)
        for _ in range(task.steps):
            adv.requires_grad_()
            loss = F.cross_entropy(task.model(adv), task.y, reduction="sum")
            (grad,) = torch.autograd.grad(loss, adv)
            adv = torch.clamp(adv.detach() + task.step_size * grad.sign(), low, high)
        return adv

    return run


def bare_graphed(task: Task) -> Contender:
    """The same on CUDA: bf16, channels_last, one step captured once and replayed."""
    x = task.x.to(memory_format=torch.channels_last)
    adv, low, high, y = x.clone(), x.clone(), x.clone(), task.y.clone()

    def step() -> None:
        inputs = adv.detach().requires_grad_()
        # A cache of cast weights would outlive the capture.
        with torch.autocast("cuda", dtype=torch.bfloat16, cache_enabled=False):
            logits = task.model(inputs)
        loss = F.cross_entropy(logits.float(), y, reduction="sum")
        (grad,) = torch.autograd.grad(loss, inputs)
        torch.clamp(adv + task.step_size * grad.sign(), low, high, out=adv)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def run() -> Tensor:
        clean = task.x.to(memory_format=torch.channels_last)
        torch.clamp(clean - task.eps, min=0, out=low)
        torch.clamp(clean + task.eps, max=1, out=high)
        adv.copy_(clean + torch.empty_like(clean).uniform_(-task.eps, task.eps)).clamp_(0, 1)
        y.copy_(task.y)
        for _ in range(task.steps):
            graph.replay()
        return adv.clone()

    return run


def by_torchattacks(task: Task) -> Contender:
    import torchattacks

    attack = torchattacks.PGD(task.model, eps=task.eps, alpha=task.step_size, steps=task.steps)
    return lambda: attack(task.x, task.y)


def by_torchattacks_bf16(task: Task) -> Contender:
    """torchattacks by a user who knows autocast and channels_last."""
    attack = by_torchattacks(task.channels_last())

    def run() -> Tensor:
        with torch.autocast(task.x.device.type, dtype=torch.bfloat16):
            return attack()

    return run


def by_foolbox(task: Task) -> Contender:
    import foolbox

    model = foolbox.PyTorchModel(task.model, bounds=(0, 1), device=task.x.device)
    attack = foolbox.attacks.LinfPGD(abs_stepsize=task.step_size, steps=task.steps)
    return lambda: attack(model, task.x, task.y, epsilons=task.eps)[1]


def by_art(task: Task) -> Contender:
    """ART, from NumPy arrays to NumPy arrays, with all records in one batch (its default is 32)."""
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    model = PyTorchClassifier(
        task.model, nn.CrossEntropyLoss(), input_shape=tuple(task.x.shape[1:]), nb_classes=10,
        clip_values=(0.0, 1.0), device_type="gpu" if task.x.is_cuda else "cpu",
    )  # fmt: skip
    attack = ProjectedGradientDescentPyTorch(
        model, norm=math.inf, eps=task.eps, eps_step=task.step_size, max_iter=task.steps,
        num_random_init=1, batch_size=len(task.x), verbose=False,
    )  # fmt: skip

    def run() -> Tensor:
        adv = attack.generate(task.x.cpu().numpy(), task.y.cpu().numpy())
        return torch.from_numpy(adv).to(task.x.device)

    return run


# name → (how it is made, the distribution that it needs)
EVERYWHERE: dict[str, tuple[Callable[[Task], Contender], str | None]] = {
    "defend": (ours, None),
    "defend channels_last": (lambda task: ours(task, channels_last=True), None),
    "bare": (bare, None),
    "torchattacks": (by_torchattacks, "torchattacks"),
    "foolbox": (by_foolbox, "foolbox"),
    "art": (by_art, "adversarial-robustness-toolbox"),
    "defend bf16": (lambda task: ours(task, precision="bf16"), None),
}
ON_CUDA: dict[str, tuple[Callable[[Task], Contender], str | None]] = {
    "defend bf16": (lambda task: ours(task.channels_last(), precision="bf16"), None),
    "defend graphs": (lambda task: ours(task, cuda_graphs=True), None),
    "defend bf16 graphs": (
        lambda task: ours(task.channels_last(), precision="bf16", cuda_graphs=True),
        None,
    ),
    "bare graphed": (bare_graphed, None),
    "torchattacks bf16": (by_torchattacks_bf16, "torchattacks"),
}
