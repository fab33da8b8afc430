"""Where noise and sampling get their randomness: the operating system, unless told otherwise."""

import random
import secrets
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch

from defend.errors import InputError

_STREAMS = {"sampling": 0, "noise": 1, "attack": 2}

# torch's CPU generator is a Mersenne Twister, and `manual_seed` fills its 624 words from 32 bits:
# noise that is known at one coordinate would give the seed, and with it all the rest, in hours.
# So the words themselves are set. They lie in the generator's state after a header of 24 bytes,
# each in a slot of 8.
_WORDS = 624
_HEADER = 24


class Randomness:
    """One secret root, and from it an independent generator for each step of each stream.

    A DP guarantee counts on an adversary who does not know the noise. So the root is drawn from
    OS entropy, is never written to a checkpoint, and is drawn anew when training resumes: no
    noise is ever replayed. `seed_everything` has no say in it.

    Args:
        insecure_seed: a fixed root ≥ 0, to make a run repeat exactly when debugging or testing.
            The run is then not private, and says so (`private` is False).
        root: the root itself, to give all ranks of a distributed run the same one.

    Raises:
        InputError: for a negative seed.
    """

    def __init__(self, insecure_seed: int | None = None, *, root: int | None = None) -> None:
        if insecure_seed is not None and insecure_seed < 0:
            raise InputError(f"Expected `insecure_seed` to be ≥ 0 or None, got {insecure_seed}.")
        self.private = insecure_seed is None
        if insecure_seed is not None:
            self.root = insecure_seed
        else:
            self.root = secrets.randbits(256) if root is None else root

    def generator(
        self,
        stream: Literal["sampling", "noise", "attack"],
        step: int,
        device: torch.device | str = "cpu",
        *,
        rank: int = 0,
    ) -> torch.Generator:
        """The generator for one step of one stream; the same for equal arguments.

        Args:
            stream: "sampling" for the Poisson mask, "noise" for the Gaussian noise, "attack" for
                random starts.
            step: number of the step, from 0.
            device: where the generator lives. On the CPU its whole state is filled; elsewhere
                (CUDA's Philox) its 64-bit key.
            rank: the process that draws, where each draws its own.
        """
        key = [self.root, _STREAMS[stream], step, rank]
        sequence = np.random.SeedSequence(key, pool_size=8)
        generator = torch.Generator(device=device)
        if generator.device.type == "cpu":
            return _fill(generator, sequence.generate_state(_WORDS, np.uint32))
        return generator.manual_seed(int(sequence.generate_state(1, np.uint64)[0]))

    def __repr__(self) -> str:  # the root is a secret; keep it out of logs
        return f"{type(self).__name__}(private={self.private})"


def _fill(generator: torch.Generator, words: np.ndarray) -> torch.Generator:
    """Set the 624 words of a CPU generator, none of them drawn from yet."""
    state = generator.manual_seed(0).get_state().numpy().copy()
    state[_HEADER : _HEADER + 8 * _WORDS] = words.astype(np.uint64).view(np.uint8)
    generator.set_state(torch.from_numpy(state))
    return generator


def make_global_rng_secret() -> Callable[[], None]:
    """Seed the global RNGs of torch, numpy and Python from OS entropy.

    A record's dropout mask or augmentation is drawn from them at its place in the batch. Were the
    seed known (`seed_everything`), leaving one record out would change those of all records after
    it, by a known amount, and the sum would move by more than C. With secret numbers each
    record's are independent of the others', and they may be thought of as belonging to it.

    Returns:
        A function that puts the global RNGs back to where they were.
    """
    cuda = torch.cuda.is_available()
    before = (torch.get_rng_state(), np.random.get_state(), random.getstate())  # noqa: NPY002
    before_cuda = torch.cuda.get_rng_state_all() if cuda else []

    def restore() -> None:
        torch.set_rng_state(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        random.setstate(before[2])
        if cuda:
            torch.cuda.set_rng_state_all(before_cuda)

    _fill(torch.default_generator, np.random.SeedSequence().generate_state(_WORDS, np.uint32))
    np.random.seed(np.random.SeedSequence().generate_state(8, np.uint32))  # noqa: NPY002
    random.seed(secrets.randbits(256))
    if cuda:
        torch.cuda.manual_seed_all(secrets.randbits(63))
    return restore
