"""Is a set-up sound? `python -m tests.zoo.check [NAME …]` asks all of them.

Plain PyTorch: the gradient of the loss on one batch against the mean of the gradients of its
records, each collated alone.
"""

import sys
import time
import warnings

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import default_collate

from tests.zoo.setup import SetUp
from tests.zoo.stilled import stilled

RECORDS = 5
TOLERANCE = 1e-4


def is_sound(setup: SetUp) -> float:
    """How far the gradient of a batch is from the mean of its records' gradients.

    With g the gradient of a batch of five and gᵢ that of record i alone, over parameters p:
    max_p ‖g[p] − (1/5) Σᵢ gᵢ[p]‖ / max(‖g[p]‖, ‖g‖ / 100). The floor is for parameters whose
    gradient is zero but for rounding, as that of the bias of an attention's keys.

    Returns:
        That distance; infinite where g is zero or not finite, or where all records have the same
        gradient, since nothing could be told then.
    """
    module = silent(stilled(setup.module()).train())
    data = setup.data()
    records = [data[i] for i in range(RECORDS)]
    start = {name: buffer.clone() for name, buffer in module.named_buffers()}

    def gradient(chosen: list) -> dict[str, Tensor]:
        with torch.no_grad():  # spectral norm moves its buffers in each forward
            for name, buffer in module.named_buffers():
                buffer.copy_(start[name])
        module.zero_grad(set_to_none=True)
        loss_of(module, collated(setup, chosen)).backward()
        return {n: dense(p) for n, p in module.named_parameters() if p.requires_grad}

    whole = gradient(records)
    alone = [gradient([record]) for record in records]
    length = norm(whole)
    if not 0 < length < float("inf") or norm(less(alone[0], alone[1])) < 1e-3 * length:
        return float("inf")
    mean = {n: torch.stack([g[n] for g in alone]).mean(0) for n in whole}
    apart = {n: g.norm().item() for n, g in less(whole, mean).items()}
    return max(apart[n] / max(whole[n].norm().item(), length / 100) for n in whole)


def silent(module: pl.LightningModule) -> pl.LightningModule:
    """Logging needs a trainer, and there is none."""
    module.log = module.log_dict = lambda *args, **kwargs: None
    return module


def collated(setup: SetUp, records: list):
    return (setup.collate or default_collate)(records)


def loss_of(module: pl.LightningModule, batch) -> Tensor:
    output = module.training_step(batch, 0)
    return output["loss"] if isinstance(output, dict) else output


def dense(parameter: Tensor) -> Tensor:
    """The gradient; zeros where there is none."""
    if parameter.grad is None:
        return torch.zeros_like(parameter)
    return parameter.grad.detach().to_dense().clone()


def less(one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: one[name] - other[name] for name in one}


def norm(gradient: dict[str, Tensor]) -> float:
    return torch.stack([g.norm() for g in gradient.values()]).norm().item()


def milliseconds(setup: SetUp) -> float:
    """One forward and backward of four records, the fastest of three."""
    module, data = silent(setup.module().train()), setup.data()
    times = []
    for _ in range(3):
        batch = collated(setup, [data[i] for i in range(4)])
        begin = time.perf_counter()
        loss_of(module, batch).backward()
        times.append(time.perf_counter() - begin)
    return 1000 * min(times)


def complaints(setup: SetUp, difference: float, time_ms: float) -> list[str]:
    one, other = setup.module().state_dict(), setup.module().state_dict()
    weights = sum(p.numel() for p in setup.module().parameters())
    return [
        text
        for wrong, text in (
            (not difference < TOLERANCE, "unsound"),
            (time_ms > 50, "slow"),
            (weights > 200_000, f"{weights} weights"),
            (any(not one[n].equal(other[n]) for n in one), "other weights each time"),
            (not 8 <= len(setup.data()) <= 16, f"{len(setup.data())} records"),
        )
        if wrong
    ]


def main(names: list[str]) -> int:
    """Prints a line for each set-up; the exit status is 1 where one of them has a complaint."""
    from tests.zoo import all_setups

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    setups = [s for s in all_setups().values() if not names or any(n in s.name for n in names)]
    wrong, worst = 0, 0.0
    for one in setups:
        difference, time_ms = is_sound(one), milliseconds(one)
        found = complaints(one, difference, time_ms)
        wrong, worst = wrong + bool(found), max(worst, difference)
        print(f"{one.name:60} {difference:8.1e} {time_ms:6.1f} ms  {', '.join(found)}", flush=True)
    print(f"{len(setups)} set-ups, {wrong} with complaints, largest difference {worst:.1e}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
