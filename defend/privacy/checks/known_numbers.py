"""Does a step draw numbers that are known? Tried out, since structure does not tell."""

import contextlib
from typing import Any

from torch import Tensor

from defend.errors import PrivacyError
from defend.privacy.checks.constant_randomness import ConstantRandomness
from defend.privacy.checks.ignored_seeds import ignored_seeds
from defend.privacy.checks.module_copy import rows_differ
from defend.privacy.checks.step_on_copy import StepOnCopy

# A step or an attack that tosses a coin of 20% for each of two records draws alike twice with a
# chance of (0.8² + 0.2²)², and in all of these attempts with one of 1e-8.
_RESEEDED_ATTEMPTS = 24


def refuse_known_starts(copy: StepOnCopy, records: list[Any], before: Any) -> None:
    """Random numbers of the attack come from the generator that it is given, or the globals.

    An attack that draws known numbers gives the same rows from any secret ones, but others when all
    random numbers are constant. So may one that tosses a coin for each record, by chance: it has
    many attempts to show that it can do otherwise.

    Args:
        copy: the step on a copy of the module.
        records: what was attacked.
        before: what came of it.
    """
    if copy.step.attack_reseeded is None:
        return

    def draws_the_same(number: int) -> bool:
        again = copy.attacked_reseeded(records, number)
        return not rows_differ(before, again, len(records) * copy.step.views, first=0)

    with ConstantRandomness():
        if draws_the_same(0):
            return
    if all(draws_the_same(number) for number in range(_RESEEDED_ATTEMPTS)):
        raise PrivacyError(
            "Expected random starts from the generator that the attack is given, which is "
            "secret in a private fit, got an attack that draws the same numbers whatever that "
            "is seeded with. Leaving one record out would change the starts of all others by "
            "a known amount. Draw from `generator`."
        )


def refuse_known_numbers(copy: StepOnCopy, records: list[Any], steps: int = 1) -> None:
    """Random numbers of the step, on clean rows, come from where a fit keeps them secret.

    Args:
        copy: the step on a copy of the module.
        records: of a batch.
        steps: how many in a row: some set a seed now and then only.
    """

    def gradients(seed: int, steps: int = 1) -> list[list[Tensor]]:
        return copy.gradients_in_a_row(records, seed, steps)

    def differ(one: list[list[Tensor]], other: list[list[Tensor]]) -> bool:
        pairs = zip(one, other, strict=True)
        return any(copy.difference(a, b) is not None for a, b in pairs)

    (seen, *_), other = gradients(2, steps), gradients(4)
    known = False
    for seed in (2, 4):  # coins for few records may agree by chance
        with contextlib.suppress(Exception):  # an error proves nothing
            found = gradients(seed, steps)
            with ignored_seeds(copy.generators):
                known |= differ(found, gradients(seed, steps))
    with ConstantRandomness():
        constant = gradients(4)
    if differ(other, constant):  # are they from where no seed is ignored?
        attempts = range(4, 4 + _RESEEDED_ATTEMPTS)
        known |= not any(differ([seen], gradients(seed)) for seed in attempts)
    if known:
        raise PrivacyError(
            "Expected random numbers from the global generators, which are secret in a "
            "private fit, got a step that draws known ones: it seeds them, or makes a "
            "generator from a seed, or hides one. Leaving one record out would change those of "
            "all others by a known amount. Drop the seed; what is to be the same each time, "
            "draw once, and keep it as a buffer."
        )
