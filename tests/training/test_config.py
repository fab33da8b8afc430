"""What is asked for: what goes together, what the objective says, and that it is written once."""

import dataclasses
import inspect

import pytest

from defend import L2, PGD, AdversarialTraining, DifferentialPrivacy, InputError, InputSpace, Linf
from defend.attacks.free import Free
from defend.attacks.presets import fgsm_rs
from defend.objectives import AWP, MART, TRADES
from defend.training.config import Adversarial, Execution, Privacy
from tests.training.adversarial_cases import ATTACK


def attack_of(attack=ATTACK, **settings):
    return Adversarial(attack, **settings).training_attack().source


def fields_of(settings):
    """Name → default; an objective or a rule by what it is."""
    found = {}
    for field in dataclasses.fields(settings):
        made = field.default_factory is not dataclasses.MISSING
        default = field.default_factory() if made else field.default
        found[field.name] = inspect.Parameter.empty if default is dataclasses.MISSING else default
    return found


@pytest.mark.parametrize(
    ("callback", "settings", "own"),
    [(AdversarialTraining, Adversarial, "alarm"), (DifferentialPrivacy, Privacy, "release")],
)
def test_a_callback_takes_flat_what_the_settings_hold(callback, settings, own):
    """Its arguments are spelled out for command lines: the same names, the same defaults."""
    parameters = inspect.signature(callback).parameters
    found = {name: p.default for name, p in parameters.items() if name != own}
    assert own in parameters
    assert found == fields_of(settings)


def test_what_changes_no_result_stands_apart():
    assert [field.name for field in dataclasses.fields(Execution)] == ["chunk_size"]
    assert issubclass(Privacy, Execution)
    assert issubclass(Adversarial, Execution)


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


class LeastLikely(Noise):
    """Has a target, of its own choice."""

    targeted = True


def test_an_attack_that_chooses_its_target_is_none_of_ours_to_refuse():
    attack = LeastLikely()
    assert attack_of(attack) is attack


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
    ({"seed": -1}, r"`seed` to be an integer ≥ 0 or None, got -1"),
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
        Adversarial(**{"attack": ATTACK, **settings})


def test_a_name_of_the_data_is_a_name():
    settings = {"delta": 1e-3, "max_grad_norm": 1.0, "noise_multiplier": 1.0}
    assert Privacy(**settings, data_id="mine").data_id == "mine"
    for wrong in ("", 7, True):
        with pytest.raises(InputError, match=r"`data_id` to be a name .*, got"):
            Privacy(**settings, data_id=wrong)
