"""What the hooks do not see as the user means it."""

from typing import Any

import torch
from opacus import PrivacyEngine
from opacus.schedulers import ExponentialGradClip
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests.contracts.mistakes import (
    Checkpointed,
    Direct,
    Positions,
    Words,
    positions_before_records,
    sequences,
    tokens_as_rows,
    words,
)
from tests.contracts.opacus_alone.yardstick import (
    breaks,
    clipped,
    equals_reference,
    judge,
    of_a_step,
    private,
)
from tests.contracts.outcomes import Outcome
from tests.contracts.small import (
    CLASSES,
    NORMS,
    ROWS,
    TOLERANCE,
    batch,
    flat,
    loss,
    net,
    off_reference,
    same_weights,
    sensitivity,
)

BREAKS = breaks()


@BREAKS.add
def tied_weights() -> Outcome:
    return equals_reference(lambda: Words("layer"), *words())


@BREAKS.add
def weight_outside_module() -> Outcome:
    return equals_reference(lambda: Words("function"), *words())


def _ghost(module: nn.Module, norm: float) -> tuple[Any, Any, Any]:
    """Module, optimizer and loss in Opacus' ghost mode, which has no per-record gradients."""
    module, optimizer, criterion, _ = PrivacyEngine().make_private(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=1.0),
        data_loader=DataLoader(TensorDataset(*batch(64)), 4),
        noise_multiplier=1.0,
        max_grad_norm=norm,
        grad_sample_mode="ghost",
    )
    return module, optimizer, criterion


@BREAKS.add
def weight_outside_module_ghost() -> Outcome:
    """The function's part of the gradient is in the sum, but not in the norm."""
    worst = 0.0

    def total(x: Tensor, y: Tensor) -> Tensor:
        with same_weights():
            words = Words("function")
        module, optimizer, criterion = _ghost(words, norm)
        criterion(module(x), y).backward()
        optimizer.accumulate()
        return flat(q.summed_grad for q in optimizer.params)

    for norm in NORMS:
        worst = max(worst, sensitivity(total, *words()) / norm)
    return judge(worst)


@BREAKS.add
def clip_scheduler_in_ghost_mode() -> Outcome:
    """A schedule takes C to a tenth: of the noise, or of the gradients too?"""

    def total(x: Tensor, y: Tensor) -> Tensor:
        module, optimizer, criterion = _ghost(net(), 0.1)
        ExponentialGradClip(optimizer, gamma=0.1).step()
        criterion(module(x), y).backward()
        optimizer.accumulate()
        return flat(q.summed_grad for q in optimizer.params)

    return judge(sensitivity(total, *batch()) / 0.01)


@BREAKS.add
def direct_parameter() -> Outcome:
    return equals_reference(Direct, *batch())


@BREAKS.add
def position_table_broadcast() -> Outcome:
    return judge(of_a_step(lambda: Positions(5)))


@BREAKS.add
def position_table_as_long_as_the_batch() -> Outcome:
    """Where rows and places happen to be equally many. A record's label is replaced, so that they
    stay so; that may move the sum by 2 C, and the sensitivity is half of what it moves."""
    x, _ = batch()
    y = Positions(ROWS)(x).argmax(1)

    def total(y: Tensor) -> Tensor:
        p = private(Positions(ROWS), norm=norm)
        loss(p.module, x, y).backward()
        return clipped(p)

    worst = 0.0
    for norm in (0.01, *NORMS):
        for i in range(ROWS):
            other = torch.where(torch.arange(ROWS) == i, (y + 1) % CLASSES, y)
            worst = max(worst, float((total(y) - total(other)).norm()) / (2 * norm))
    return judge(worst)


@BREAKS.add
def sequence_first_batch() -> Outcome:
    """[time, record, feature], as recurrent layers like it, and the default batch_first=True."""
    return judge(of_a_step(net, positions_before_records, sequences()))


@BREAKS.add
def records_flattened_into_rows() -> Outcome:
    """Five tokens of a record as five rows of every layer."""
    return judge(of_a_step(net, tokens_as_rows, sequences()))


@BREAKS.add
def gradient_checkpointing() -> Outcome:
    return equals_reference(Checkpointed, *batch())


@BREAKS.add
def compiled_module() -> Outcome:
    """Compiled first, without the slow part of the compiler (backend="eager")."""
    x, y = batch()
    module = torch.compile(net(), backend="eager", dynamic=True)
    p = private(module, norm=1.0)

    def total(x: Tensor, y: Tensor) -> Tensor:
        p.optimizer.zero_grad()
        loss(p.module, x, y).backward()
        return clipped(p)

    off = off_reference(total(x, y), net(), x, y)
    if off > TOLERANCE:
        return Outcome("accepts", f"the gradient is {off:.0%} off")
    return judge(sensitivity(total, x, y))
