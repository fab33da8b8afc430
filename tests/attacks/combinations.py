"""Combinations of what an attack can be asked: every two values of two factors meet in one."""

import dataclasses
import itertools
import random

import torch
from torch import nn

from defend import L2, PGD, InputSpace, Linf
from defend.attacks.presets import fgsm_rs, n_fgsm
from defend.objectives.losses import cross_entropy, kl, margin
from defend.threat import L1
from tests.attacks.cases import DTYPES, model_for, seeded

N, CHANNELS, CLASSES = 6, 2, 4
BALLS = [Linf(0.1), L2(0.5), L1(1.0), L1(1.0, density=0.3)]


def squares(logits, y):
    return (logits - 3 * nn.functional.one_hot(y, CLASSES)).square().sum(1)


LOSSES = {"ce": cross_entropy, "margin": margin, "kl": kl, "own": squares}
SPACES = {
    "raw": InputSpace(),
    "normalized": InputSpace(mean=(0.5, 0.3), std=(0.25, 0.6)),
    "box by channel": InputSpace(low=(-1 / 3, 0.0), high=(2 / 3, 0.3)),
    "immutable": InputSpace(mean=(0.5, 0.3), std=(0.25, 0.6), immutable=(1,)),
}
PRESETS = {
    "plain": {},
    "clean start": {"random_start": False},
    "restarts": {"restarts": 3},
    "targeted": {"targeted": True},
    "best": {"iterate": "best"},
    "stop": {"stop_when_fooled": True},
    "stop and restart": {"stop_when_fooled": True, "restarts": 2, "iterate": "best"},
    "narrow start": {"start_radius": 0.01},
    "bf16": {"precision": "bf16"},
    "fgsm_rs": fgsm_rs,
    "n_fgsm": n_fgsm,
    "radii": {},  # one a record
    "mask": {},
}
SHAPES = {2: (), 3: (3,), 4: (3, 4), 5: (2, 3, 2)}
LAYOUTS = ["contiguous", "channels last", "transposed", "every second"]
FACTORS = {
    "ball": BALLS, "loss": list(LOSSES), "preset": list(PRESETS), "dtype": DTYPES,
    "layout": LAYOUTS, "rank": list(SHAPES), "space": list(SPACES),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """One combination, and what follows from it."""

    ball: object
    loss: str
    preset: str
    dtype: torch.dtype
    layout: str
    rank: int
    space: str

    def possible(self):
        """Divergence needs a random start and knows no target; FGSM is of L∞."""
        without_kl = self.loss != "kl" or self.preset not in ("clean start", "targeted")
        of_linf = "fgsm" not in self.preset or self.ball.name == "linf"
        return without_kl and of_linf and (self.layout != "channels last" or self.rank > 3)

    def attack(self):
        inputs, chosen = SPACES[self.space], PRESETS[self.preset]
        loss = squares if self.loss == "own" else self.loss
        if callable(chosen):
            return dataclasses.replace(chosen(self.ball.eps, inputs=inputs), loss=loss)
        return PGD(self.ball, steps=5, loss=loss, inputs=inputs, **chosen)

    def radii(self):
        scale = torch.ones(N) if self.preset != "radii" else torch.linspace(0, 2.5, N)
        return scale * self.attack().ball.eps

    def asked(self):
        """What the call is told on top."""
        if self.preset == "radii":
            return {"eps": self.radii()}
        return {"mask": self.mask()} if self.preset == "mask" else {}

    def mask(self):
        return torch.rand((N, CHANNELS, *SHAPES[self.rank]), generator=seeded(6)) > 0.3

    def held(self):
        """What may not change."""
        held = torch.zeros((N, CHANNELS, *SHAPES[self.rank]), dtype=torch.bool)
        held[:, list(SPACES[self.space].immutable)] = True
        return held | ~self.mask() if self.preset == "mask" else held

    def batch(self):
        """x of this dtype and layout, and y; the first record lies in corners of the box."""
        space, shape = SPACES[self.space], (N, CHANNELS, *SHAPES[self.rank])
        unit = torch.rand(shape, generator=seeded(2), dtype=torch.float64)
        unit[0] = unit[0].round()
        free = dataclasses.replace(space, immutable=())
        low, high = free.bounds(unit)
        raw = (low + unit * (high - low)).clamp(low, high)
        x = space.to_model(raw).to(self.dtype)
        return laid_out(x, self.layout), torch.randint(0, CLASSES, (N,), generator=seeded(3))

    def model(self, dtype=None):
        shape = (N, CHANNELS, *SHAPES[self.rank])
        return model_for(shape, dtype or self.dtype, CLASSES)


def laid_out(x, layout):
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "every second":
        return x.repeat_interleave(2, dim=-1)[..., ::2]
    if layout == "channels last":
        last = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
        return x.to(memory_format=last)
    return x


def pairs_of(case):
    values = [(name, getattr(case, name)) for name in FACTORS]
    return set(itertools.combinations(values, 2))


def pairwise(tries=60):
    """Cases that hold every possible pair of values, chosen greedily."""
    rng = random.Random(0)

    def draw(**fixed):
        while True:
            case = Case(**{k: fixed.get(k, rng.choice(v)) for k, v in FACTORS.items()})
            if case.possible():
                return case

    left = set()
    for (a, xs), (b, ys) in itertools.combinations(FACTORS.items(), 2):
        left |= {((a, x), (b, y)) for x in xs for y in ys if may_meet(a, x, b, y)}
    cases = []
    while left:
        pair = min(left, key=repr)
        best = max(
            (draw(**dict(pair)) for _ in range(tries)), key=lambda c: len(pairs_of(c) & left)
        )
        left -= pairs_of(best)
        cases.append(best)
    return cases


def may_meet(*pair):
    """Whether some case holds both values."""
    fixed = dict(zip(pair[::2], pair[1::2], strict=True))
    plain = {"ball": BALLS[0], "loss": "ce", "preset": "plain", "layout": LAYOUTS[0], "rank": 4}
    rest = {"dtype": torch.float32, "space": "raw"}
    return Case(**{**plain, **rest, **fixed}).possible()


CASES = pairwise()


def named(case):
    """An id that a reader can tell the combination from."""
    dtype = str(case.dtype).removeprefix("torch.")
    density = getattr(case.ball, "density", None) or ""
    words = (f"{case.ball.name}{density}", case.loss, case.preset, dtype, case.layout)
    return "-".join(map(str, (*words, case.rank, case.space)))
