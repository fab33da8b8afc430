"""Where noise and sampling get their randomness: the operating system, unless told otherwise."""

import secrets
from typing import Literal

import numpy as np
import torch

_STREAMS = {"sampling": 0, "noise": 1}


class Randomness:
    """One secret root, and from it an independent generator for each step of each stream.

    A DP guarantee counts on an adversary who does not know the noise. So the root is drawn from
    OS entropy, is never written to a checkpoint, and is drawn anew when training resumes: no
    noise is ever replayed. `seed_everything` has no say in it.

    Args:
        insecure_seed: a fixed root, to make a run repeat exactly when debugging or testing. The
            run is then not private, and says so (`private` is False).
        root: the root itself, to give all ranks of a distributed run the same one.
    """

    def __init__(self, insecure_seed: int | None = None, *, root: int | None = None) -> None:
        self.private = insecure_seed is None
        if insecure_seed is not None:
            self.root = insecure_seed
        else:
            self.root = secrets.randbits(128) if root is None else root

    def generator(
        self, stream: Literal["sampling", "noise"], step: int, device: torch.device | str = "cpu"
    ) -> torch.Generator:
        """The generator for one step of one stream; the same for equal arguments.

        Args:
            stream: "sampling" for the Poisson mask, "noise" for the Gaussian noise.
            step: number of the step, from 0.
            device: where the generator lives.
        """
        sequence = np.random.SeedSequence([self.root, _STREAMS[stream], step])
        seed = int(sequence.generate_state(1, np.uint64)[0])
        return torch.Generator(device=device).manual_seed(seed)

    def __repr__(self) -> str:  # the root is a secret; keep it out of logs
        return f"{type(self).__name__}(private={self.private})"
