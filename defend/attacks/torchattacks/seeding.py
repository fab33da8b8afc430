"""The global random numbers that torchattacks draws, seeded for one call."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def seeded(generator: torch.Generator | None, device: torch.device) -> Iterator[None]:
    """The global RNGs, seeded from `generator` for a while; torch's are restored by `untouched`.

    APGD, APGDT, FAB and Square call `torch.random.manual_seed` in the middle, for every device and,
    before CUDA has started, for when it will. That name does nothing here, so that their numbers
    come from `generator` too and nothing is left behind where `untouched` does not look.
    """
    if generator is None:
        generator = torch.Generator()
        generator.seed()
    words = torch.randint(2**32, (18,), generator=generator, device=generator.device).tolist()
    numpy_state, python_state = np.random.get_state(), random.getstate()  # noqa: NPY002
    reseeding = torch.random.manual_seed, torch.cuda.random.manual_seed
    try:
        np.random.seed(words[:8])  # noqa: NPY002
        random.seed(sum(word << 32 * i for i, word in enumerate(words[8:16])))
        torch.default_generator.manual_seed(words[16])
        if device.type == "cuda":
            torch.cuda.default_generators[device.index].manual_seed(words[17])
        torch.random.manual_seed = lambda seed: torch.default_generator  # noqa: ARG005
        torch.cuda.random.manual_seed = lambda seed: None  # noqa: ARG005
        yield
    finally:
        torch.random.manual_seed, torch.cuda.random.manual_seed = reseeding
        np.random.set_state(numpy_state)  # noqa: NPY002
        random.setstate(python_state)
