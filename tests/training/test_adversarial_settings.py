"""What is asked of adversarial training: what goes together, and what the objective says."""

import dataclasses

import pytest

from defend import L2, PGD, InputError, InputSpace, Linf
from defend.attacks.free import Free
from defend.attacks.presets import fgsm_rs
from defend.objectives import AWP, MART, TRADES
from defend.training.adversarial_settings import AdversarialSettings
from tests.training.adversarial_cases import ATTACK


def attack_of(attack=ATTACK, **settings):
    return AdversarialSettings(attack, **settings).training_attack()


def test_the_objective_says_what_the_attack_increases():
    assert attack_of() == ATTACK
    assert attack_of(objective=MART()) == ATTACK
    trades = attack_of(objective=AWP(TRADES()))
    assert trades == dataclasses.replace(ATTACK, loss="kl", start_radius=0.001)
    mine = dataclasses.replace(ATTACK, loss="margin")
    assert attack_of(mine, objective=TRADES()) == mine
    near = dataclasses.replace(ATTACK, start_radius=0.01)
    assert attack_of(near, objective=TRADES()).start_radius == 0.01


@pytest.mark.parametrize(
    ("inputs", "eps", "radius"),
    [
        (InputSpace(high=255.0), 8.0, 0.255),
        (InputSpace(low=(0.0, -1.0), high=(4.0, 1.0)), 1.0, 0.002),
        (InputSpace(low=(0.0, -1.0), high=(4.0, 1.0), immutable=(1,)), 1.0, 0.004),
        (InputSpace(high=255.0), 0.1, 0.1),  # not beyond the ball
        (InputSpace(low=float("-inf"), high=float("inf")), 1.0, 1.0),
        (InputSpace(), 0.0, None),
    ],
)
def test_trades_starts_in_parts_of_the_narrowest_box(inputs, eps, radius):
    attack = PGD(Linf(eps), step_size=0.1, inputs=inputs)
    assert attack_of(attack, objective=TRADES()).start_radius == radius


def without_a_generator(model, x, y):
    return x


def noise(model, x, y, *, generator=None, chunk_size=None):
    return x


class Noise:
    def __call__(self, model, x, y, **settings):
        return x


@pytest.mark.parametrize("attack", [noise, Noise(), Noise().__call__, lambda *_, **__: None])
def test_anything_that_is_called_as_an_attack_is_one(attack):
    assert attack_of(attack) == attack


REFUSED = [
    ({"attack": fgsm_rs}, r"got fgsm_rs, which is not.* call it: fgsm_rs\(8 / 255\)"),
    ({"attack": PGD}, r"chunk_size=...\), got PGD, which is not"),
    ({"attack": Free}, r"chunk_size=...\), got Free, which is not"),
    ({"attack": without_a_generator}, r"got without_a_generator, .* let it take those"),
    ({"attack": "pgd"}, r"`attack` to be an attack such as PGD.* got 'pgd'"),
    ({"attack": PGD(L2(1.0), targeted=True)}, r"untargeted attack to train on, got targeted=True"),
    ({"objective": "trades"}, r"`objective` to be Madry\(\), .* got 'trades'"),
    ({"chunk_size": 0}, r"`chunk_size` to be 'auto', None or an integer ≥ 1, got 0"),
    ({"clean_fraction": 1.0}, r"`clean_fraction` to be in \[0, 1\), got 1.0"),
    ({"clean_fraction": 0.5, "objective": MART()}, r"`clean_fraction=0` with mart, got 0.5"),
    ({"warmup_epochs": -1}, r"the warm-up to be ≥ 0 and finite, got -1"),
    ({"warmup_epochs": float("inf")}, r"the warm-up to be ≥ 0 and finite, got inf"),
    ({"warmup_epochs": 1, "attack": lambda *_, **__: None}, r"with `eps` and `with_eps` to warm"),
    ({"attack": Free(Linf(0.1)), "clean_fraction": 0.5}, r"no clean fraction with Free, got oth"),
    ({"attack": Free(Linf(0.1)), "objective": TRADES()}, r"Expected objective=Madry\(\) and no"),
    (
        {"attack": PGD(Linf(0.1), random_start=False), "objective": TRADES()},
        r"`random_start=True` with loss='kl', got False",
    ),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        AdversarialSettings(**{"attack": ATTACK, **settings})
