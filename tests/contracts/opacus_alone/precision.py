"""Precision and noise."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.contracts.mistakes import ComplexScale
from tests.contracts.opacus_alone.yardstick import (
    added_noise,
    breaks,
    charged,
    judge,
    of_a_step,
    private,
    same_noise,
    train,
)
from tests.contracts.outcomes import Outcome
from tests.contracts.small import DELTA, batch, flat, loss, net, too_long

BREAKS = breaks()


@BREAKS.add
def fp16_grad_scaler() -> Outcome:
    """A record whose gradient is much shorter than C, and a scaler at its usual 2¹⁶."""
    x, y = batch()
    sums = []
    for scale in (1.0, 2.0**16):
        p = private(net(), norm=1e3)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        scaler.scale(loss(p.module, x[:1], y[:1])).backward()
        scaler.step(p.optimizer)
        sums.append(float(flat(q.summed_grad for q in p.optimizer.params).norm()) / 1e3)
    return Outcome(
        "accepts" if sums[1] > 2 * sums[0] else "safe",
        f"a gradient of {sums[0]:.4f} C enters as {sums[1]:.2f} C",
    )


@BREAKS.add
def grad_scaler_skips_the_step() -> Outcome:
    """A record whose scaled gradient overflows: is there a noised step at all?"""
    x, y = too_long(1e36)
    taken = []
    for rows in (slice(0, 8), slice(1, 8)):
        p = private(net()[0])
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale(loss(p.module, x[rows], y[rows])).backward()
        scaler.step(p.optimizer)
        taken.append(charged(p))
    return Outcome(
        "accepts" if taken[0] != taken[1] else "safe",
        f"{taken[0]} noised steps with the record, {taken[1]} without",
    )


@BREAKS.add
def bf16_norms() -> Outcome:
    """Autocast to bfloat16, as mixed precision does it."""

    def one(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            output = module(x)
        return F.cross_entropy(output.float(), y)

    return judge(of_a_step(net, one))


@BREAKS.add
def bf16_weights() -> Outcome:
    def one(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(module(x.bfloat16()).float(), y)

    return judge(of_a_step(lambda: net().bfloat16(), one))


@BREAKS.add
def complex_weights() -> Outcome:
    """The noise on each part of a complex weight: σC is promised, at C = 0.1 and σ = 1."""
    p = private(ComplexScale())
    train(p, *batch())
    size = p.optimizer.expected_batch_size
    noise = next(q.grad * size - q.summed_grad for q in p.optimizer.params if q.is_complex())
    found = float(torch.view_as_real(noise).std()) / 0.1
    return Outcome("accepts" if found < 0.9 else "safe", f"noise of {found:.2f} σC on each part")


# --- noise ---------------------------------------------------------------------------------------


@BREAKS.add
def seeded_noise_replayed_after_resume() -> Outcome:
    """A script that seeds, builds, loads what there is, and trains; run, and run again."""

    def script(saved: dict | None) -> tuple[Tensor, dict]:
        torch.manual_seed(42)
        p = private(net())
        if saved:
            p.module.load_state_dict(saved)
        for _, (x, y) in zip(range(3), p.loader, strict=False):
            train(p, x, y)
        return added_noise(p), copy.deepcopy(p.module.state_dict())

    first, saved = script(None)
    return same_noise(first, script(saved)[0], "before and after the resume")


@BREAKS.add
def noise_32_bit_seed() -> Outcome:
    noise = []
    for seed in (7, 7 + 2**32):
        p = private(net())
        torch.manual_seed(seed)
        train(p, *batch())
        noise.append(added_noise(p))
    return same_noise(*noise, "seeds 7 and 7 + 2³²")


@BREAKS.add
def attack_reseeds_global_rng() -> Outcome:
    p, noise = private(net()), []
    for _ in range(2):
        torch.manual_seed(0)  # what some attacks do in each call
        train(p, *batch())
        noise.append(added_noise(p))
    return same_noise(*noise, "two steps")


@BREAKS.add
def sigma_zero() -> Outcome:
    p = private(net(), sigma=0.0)
    train(p, *batch())
    try:
        reported = f"{p.engine.get_epsilon(DELTA):.2f}"
    except Exception as error:
        reported = f"an {type(error).__name__}"
    silent = bool((added_noise(p) == 0).all())
    return Outcome("accepts" if silent else "safe", f"trains without noise; ε is {reported}")
