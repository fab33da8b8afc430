"""Where noise and sampling get their randomness: the operating system, unless told otherwise."""

import secrets
from typing import Literal

import numpy as np
import torch

from defend.errors import InputError

_STREAMS = {"sampling": 0, "noise": 1}

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
        self, stream: Literal["sampling", "noise"], step: int, device: torch.device | str = "cpu"
    ) -> torch.Generator:
        """The generator for one step of one stream; the same for equal arguments.

        Args:
            stream: "sampling" for the Poisson mask, "noise" for the Gaussian noise.
            step: number of the step, from 0.
            device: where the generator lives. On the CPU its whole state is filled; elsewhere
                (CUDA's Philox) its 64-bit key.
        """
        sequence = np.random.SeedSequence([self.root, _STREAMS[stream], step], pool_size=8)
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
