"""Losses and steps in which records meet, or come twice."""

from torch import Tensor, nn

from tests.contracts.mistakes import (
    attacked,
    attacked_in_eval_mode,
    class_weighted,
    concatenated,
    contrastive,
    divided_by_batch_mean,
    fgsm,
    mixed,
    mixing_collate,
    one_rare_class,
    padded,
    permuted,
    selected,
    sentences,
    summed,
    twice,
)
from tests.contracts.opacus_alone.yardstick import (
    breaks,
    clipped,
    judge,
    loader_of,
    of_a_step,
    private,
)
from tests.contracts.outcomes import Outcome
from tests.contracts.small import (
    ROWS,
    Wrap,
    batch,
    loss,
    net,
    one_hard_record,
    raw_gradient,
    sensitivity,
    sure,
)

BREAKS = breaks()


@BREAKS.add
def loss_divided_by_batch_statistic() -> Outcome:
    return judge(of_a_step(sure, divided_by_batch_mean, one_hard_record()))


@BREAKS.add
def weighted_cross_entropy() -> Outcome:
    return judge(of_a_step(net, class_weighted, one_rare_class()))


@BREAKS.add
def sum_reduction() -> Outcome:
    """A summed loss, where the default loss_reduction="mean" multiplies by the batch's size."""
    x, y = (v[:1] for v in batch())
    norm = ROWS * float(raw_gradient(x, y).norm())  # as long as Opacus takes each gradient for
    return judge(of_a_step(net, summed, (x.expand(ROWS, -1), y.expand(ROWS)), (norm,)))


@BREAKS.add
def in_batch_negatives() -> Outcome:
    """A contrastive loss: each record is told from the others of its batch."""
    return judge(of_a_step(net, contrastive))


@BREAKS.add
def mixup_in_step() -> Outcome:
    return judge(of_a_step(net, mixed))


@BREAKS.add
def mixup_in_collate() -> Outcome:
    loader = loader_of(collate_fn=mixing_collate)
    collated = private(net(), loader=loader).loader.collate_fn

    def one(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return loss(module, *collated(list(zip(x, y, strict=True))))

    return judge(of_a_step(net, one))


@BREAKS.add
def padding_to_the_longest() -> Outcome:
    """Sequences padded to the longest of their batch, and a mean that counts the padding."""
    return judge(of_a_step(net, padded, sentences()))


@BREAKS.add
def concatenated_adversarial_rows() -> Outcome:
    return judge(of_a_step(net, concatenated))


@BREAKS.add
def permuted_second_forward() -> Outcome:
    return judge(of_a_step(net, permuted))


@BREAKS.add
def second_forward_on_a_selection() -> Outcome:
    """A second loss on the records of one class: fewer rows, and other records in them."""
    return judge(of_a_step(net, selected))


@BREAKS.add
def two_backwards() -> Outcome:
    return judge(of_a_step(net, twice))


@BREAKS.add
def two_backwards_without_poisson() -> Outcome:
    return judge(of_a_step(net, twice, poisson_sampling=False))


@BREAKS.add
def gradient_accumulation() -> Outcome:
    p, (x, y) = private(net()), batch()
    for rows in (slice(0, 4), slice(4, 8)):
        loss(p.module, x[rows], y[rows]).backward()
    p.optimizer.step()
    return Outcome("accepts", f"{p.optimizer.accumulated_iterations} batches in one step")


@BREAKS.add
def forgotten_zero_grad() -> Outcome:
    p, (x, y) = private(net()), batch()
    for _ in range(2):
        loss(p.module, x, y).backward()
        p.optimizer.step()
    return Outcome("accepts", "the first batch is in both steps")


@BREAKS.add
def attack_through_hooks() -> Outcome:
    return judge(of_a_step(net, attacked))


@BREAKS.add
def attack_through_hooks_without_poisson() -> Outcome:
    return judge(of_a_step(net, attacked, poisson_sampling=False))


@BREAKS.add
def attack_then_zero_grad() -> Outcome:
    """The attack comes first, and `zero_grad` wipes what it left on the parameters."""

    def total(x: Tensor, y: Tensor) -> Tensor:
        p = private(net())
        adversarial = fgsm(p.module, x, y)
        p.optimizer.zero_grad()
        loss(p.module, adversarial, y).backward()
        return clipped(p)

    return judge(sensitivity(total, *batch()) / 0.1)


@BREAKS.add
def attack_in_eval_mode() -> Outcome:
    return judge(of_a_step(net, attacked_in_eval_mode))


@BREAKS.add
def dropout_with_a_known_seed() -> Outcome:
    """`of_a_step` gives both runs the same seed, as `seed_everything` would."""
    return judge(of_a_step(lambda: Wrap(nn.Dropout(0.5))))
