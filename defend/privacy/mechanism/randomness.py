"""Where noise and sampling get their randomness: the operating system, unless told otherwise."""

import secrets
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from defend.errors import InputError
from defend.privacy.mechanism.generators import WORDS, start
from defend.privacy.mechanism.secure import (
    Keystream,
    gaussians_from,
    label_of,
    require_cryptography,
    uniforms_from,
)

Stream = Literal["sampling", "noise", "attack", "count", "probe", "look"]
_STREAMS: dict[str, int] = {
    "sampling": 0, "noise": 1, "attack": 2, "count": 3, "probe": 4, "look": 5,
}  # fmt: skip


class Randomness:
    """One secret root, and from it an independent generator for each step of each stream.

    A DP guarantee counts on an adversary who does not know the noise. So the root is drawn from
    OS entropy, is never written to a checkpoint, and is drawn anew when training resumes: no
    noise is ever replayed. `seed_everything` has no say in it.

    Args:
        insecure_seed: a fixed root ≥ 0, to make a run repeat exactly when debugging or testing.
            The run is then not private, and says so (`private` is False).
        root: the root itself, in [0, 2²⁵⁶), to give all ranks of a distributed run the same one.
        secure: take masks and noise from ChaCha20 keyed by the root, instead of from torch's
            generators, and guard the noise against floating-point attacks
            (defend.privacy.mechanism.secure). Slower; needs the package `cryptography`.

    Raises:
        InputError: for a negative seed or a root that does not fit, for a seed together with
            `secure`, or if `cryptography` is missing.

    *Guarantees.* Equal roots give equal numbers, on every rank; different streams or steps of one
    root give independent ones. When `secure`, to tell the bits from random ones is to break
    ChaCha20.
    """

    def __init__(
        self, insecure_seed: int | None = None, *, root: int | None = None, secure: bool = False
    ) -> None:
        if insecure_seed is not None and insecure_seed < 0:
            raise InputError(f"Expected `insecure_seed` to be ≥ 0 or None, got {insecure_seed}.")
        if insecure_seed is not None and secure:
            raise InputError(
                "Expected either `insecure_seed` or secure noise, got both. A known seed gives "
                "all noise away; leave one of them out."
            )
        if root is not None and not 0 <= root < 2**256:  # the number itself stays out of logs
            raise InputError("Expected `root` to be in [0, 2^256) or None, got one outside.")
        if secure:
            require_cryptography()  # at once, not at the first step
        self.private = insecure_seed is None
        self.secure = secure
        if insecure_seed is not None:
            self.root = insecure_seed
        else:
            self.root = secrets.randbits(256) if root is None else root

    def uniforms(self, step: int, size: int) -> Tensor:
        """The uniform numbers behind the Poisson mask of one step, 53 random bits each.

        Args:
            step: number of the step, from 0.
            size: how many, ≥ 0.

        Returns:
            float64 on the CPU, shape `[size]`, in [0, 1): the 24 bits of float32 would round a
            small q. The same for equal arguments.
        """
        if self.secure:
            return uniforms_from(self._keystream("sampling", step), size)
        generator = self.generator("sampling", step)
        return torch.rand(size, generator=generator, dtype=torch.float64)

    def gaussian(
        self,
        step: int,
        device: torch.device | str,
        stream: Literal["noise", "count"] = "noise",
    ) -> Callable[[Tensor], Tensor]:
        """The standard normals of one step of one stream.

        Args:
            step: number of the step, from 0.
            device: where the tensors to be noised are.
            stream: "noise" for the gradients, "count" for the number of records.

        Returns:
            A function `draw(like)` that gives independent N(0, 1) of the shape of `like`, on its
            device, and goes on in the stream at each call. Their dtype is that of `like`, float32
            at least; when `secure` float64. Scale and add them in that dtype, then round:
            noise that is rounded before it is added loses its guard.
        """
        if self.secure:
            keystream = self._keystream(stream, step)
            return lambda like: (
                gaussians_from(keystream, like.numel()).view(like.shape).to(like.device)
            )
        generator = self.generator(stream, step, device)

        def draw(like: Tensor) -> Tensor:
            dtype = torch.promote_types(like.dtype, torch.float32)
            return torch.empty_like(like, dtype=dtype).normal_(generator=generator)

        return draw

    def generator(
        self,
        stream: Stream,
        step: int,
        device: torch.device | str = "cpu",
        *,
        rank: int = 0,
    ) -> torch.Generator:
        """The generator for one step of one stream; the same for equal arguments.

        Args:
            stream: "sampling" for the Poisson mask, "noise" for the Gaussian noise, "attack" for
                random starts, "count" for noise on the number of records, "probe" for what is
                drawn to try a step out before training, "look" for when to do so later.
            step: number of the step, from 0.
            device: where the generator lives. On the CPU its whole state is filled; elsewhere
                (CUDA's Philox) its 64-bit key.
            rank: the process that draws, where each draws its own.
        """
        generator = torch.Generator(device=device)
        words = self._words(stream, step, rank)
        start(generator, words)
        return generator

    def _words(self, stream: Stream, step: int, rank: int) -> np.ndarray:
        """624 words of 32 bits to start a generator with."""
        if self.secure:
            # SeedSequence is no one-way function: a generator started by it from the root may,
            # through numbers that others see, give away the key of the noise. A keystream does not.
            keystream = self._keystream(stream, step, rank=rank, seeds=True)
            return np.frombuffer(keystream.take(4 * WORDS), np.uint32)
        sequence = np.random.SeedSequence([self.root, _STREAMS[stream], step, rank], pool_size=8)
        return sequence.generate_state(WORDS, np.uint32)

    def _keystream(
        self, stream: Stream, step: int, *, rank: int = 0, seeds: bool = False
    ) -> Keystream:
        label = label_of(_STREAMS[stream], step, rank=rank, seeds=seeds)
        return Keystream(self.root.to_bytes(32, "little"), label)

    def __repr__(self) -> str:  # the root is a secret; keep it out of logs
        return f"{type(self).__name__}(private={self.private}, secure={self.secure})"
