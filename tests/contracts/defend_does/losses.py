"""Losses and steps in which records meet, or come twice; and attacks."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import defend
from tests.contracts import mistakes
from tests.contracts.defend_does.yardstick import (
    Plain,
    breaks,
    dp,
    fit,
    holds,
    loader,
    measure,
)
from tests.contracts.outcomes import Outcome
from tests.contracts.small import ROWS, Wrap, batch, loss, net, one_hard_record, sure

BREAKS = breaks()


@BREAKS.add
def loss_divided_by_batch_statistic() -> Outcome:
    return measure(sure, mistakes.divided_by_batch_mean, one_hard_record())


@BREAKS.add
def weighted_cross_entropy() -> Outcome:
    return measure(net, mistakes.class_weighted, mistakes.one_rare_class())


@BREAKS.add
def weight_on_a_class_that_is_rare() -> Outcome:
    """One record in 64 has the class that is weighted, as where weights are used at all."""
    x, _ = batch(64)
    y = torch.zeros(64, dtype=torch.long)
    y[5] = 1
    fit(Plain(net(), mistakes.class_weighted), DataLoader(TensorDataset(x, y), 4))
    return Outcome("open", "it went on")


@BREAKS.add
def sum_reduction() -> Outcome:
    return measure(net, mistakes.summed)


@BREAKS.add
def in_batch_negatives() -> Outcome:
    return measure(net, mistakes.contrastive)


@BREAKS.add
def mixup_in_step() -> Outcome:
    return measure(net, mistakes.mixed)


@BREAKS.add
def mixup_from_the_second_epoch_on() -> Outcome:
    class Later(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return (mistakes.mixed if self.current_epoch else loss)(self, *batch)

    fit(Later(), max_epochs=2)
    return Outcome("open", "it went on")


@BREAKS.add
def mixup_in_collate() -> Outcome:
    fit(Plain(), loader(collate_fn=mistakes.mixing_collate))
    return Outcome("open", "it went on")


@BREAKS.add
def padding_to_the_longest() -> Outcome:
    return measure(net, mistakes.padded, mistakes.sentences())


@BREAKS.add
def concatenated_adversarial_rows() -> Outcome:
    return measure(net, mistakes.concatenated)


@BREAKS.add
def permuted_second_forward() -> Outcome:
    return measure(net, mistakes.permuted)


@BREAKS.add
def second_forward_on_a_selection() -> Outcome:
    return measure(net, mistakes.selected)


@BREAKS.add
def two_backwards() -> Outcome:
    return measure(net, mistakes.twice)


@BREAKS.add
def two_backwards_without_poisson() -> Outcome:
    """Batches are Poisson-sampled whatever the loader says; both backwards are found."""
    return two_backwards()


@BREAKS.add
def gradient_accumulation() -> Outcome:
    fit(Plain(), accumulate_grad_batches=2)
    return Outcome("open", "it went on")


@BREAKS.add
def forgotten_zero_grad() -> Outcome:
    """A loop of one's own has no `zero_grad` to forget; under the Trainer it is switched off."""

    class Forgetful(Plain):
        def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
            pass

    x, y = batch()
    spies = []
    for module in (Forgetful, Plain):
        spies.append(_weights_after(module(), x, y))
    return holds(torch.equal(*spies), "the release replaces what is in p.grad")


def _weights_after(module: Plain, x: Tensor, y: Tensor) -> Tensor:
    torch.manual_seed(1)
    data = DataLoader(TensorDataset(x, y), len(x))
    fit(module, data, dp(insecure_seed=7, ledger=False), max_epochs=3)
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@BREAKS.add
def attack_through_hooks() -> Outcome:
    return measure(net, mistakes.attacked)


@BREAKS.add
def attack_through_hooks_without_poisson() -> Outcome:
    return attack_through_hooks()


@BREAKS.add
def attack_then_zero_grad() -> Outcome:
    """The attack comes first, and `zero_grad` wipes what it left on the parameters."""

    def one(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        adversarial = mistakes.fgsm(module, x, y)
        module.zero_grad()
        return loss(module, adversarial, y)

    return measure(net, one)


@BREAKS.add
def attack_in_eval_mode() -> Outcome:
    return measure(net, mistakes.attacked_in_eval_mode)


@BREAKS.add
def attack_by_the_callback() -> Outcome:
    """The cure for the four above."""
    space = defend.InputSpace(low=-100.0, high=100.0)
    attack = defend.PGD(defend.Linf(0.1), steps=2, random_start=False, inputs=space)
    return measure(extra=(defend.AdversarialTraining(attack),))


@BREAKS.add
def dropout_with_a_known_seed() -> Outcome:
    """Are the masks of two runs the same, where a script seeds before each?"""
    masks: list[Tensor] = []

    class Watched(nn.Dropout):
        def forward(self, h: Tensor) -> Tensor:
            out = super().forward(torch.ones_like(h))
            masks.append(out)
            return h * out

    for _ in range(2):
        torch.manual_seed(0)
        fit(Plain(Wrap(Watched(0.5))), DataLoader(TensorDataset(*batch()), ROWS))
    last, first = masks[-1], masks[len(masks) // 2 - 1]
    return holds(not torch.equal(last, first), "masks are secret: two runs of a seed differ")
