import numpy as np
import pytest
import torch

from defend import InputError
from defend.privacy import Randomness


def numbers(generator):
    return torch.rand(8, generator=generator)


def test_two_runs_never_share_noise_whatever_the_global_seed():
    torch.manual_seed(42)
    first = Randomness()
    torch.manual_seed(42)
    second = Randomness()
    assert first.private
    assert second.private
    assert not torch.equal(
        numbers(first.generator("noise", 0)), numbers(second.generator("noise", 0))
    )


def test_every_step_and_stream_has_its_own_numbers():
    randomness = Randomness(insecure_seed=1)
    drawn = [
        tuple(numbers(randomness.generator(stream, step)).tolist())
        for stream in ("noise", "sampling")
        for step in range(50)
    ]
    assert len(set(drawn)) == len(drawn)


def test_a_fixed_seed_repeats_and_is_not_private():
    one, two = Randomness(insecure_seed=3), Randomness(insecure_seed=3)
    assert not one.private
    assert torch.equal(numbers(one.generator("noise", 5)), numbers(two.generator("noise", 5)))


def test_ranks_that_share_the_root_agree():
    one = Randomness()
    two = Randomness(root=one.root)
    assert torch.equal(numbers(one.generator("sampling", 2)), numbers(two.generator("sampling", 2)))


def test_the_root_is_not_printed_nor_drawn_from_the_global_rng():
    state = torch.get_rng_state()
    randomness = Randomness()
    assert str(randomness.root) not in repr(randomness)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_whole_state_is_filled_not_32_bits_of_it():
    """`manual_seed` would give the same noise for seeds that agree in their lower 32 bits."""
    one, two = Randomness(root=5), Randomness(root=5 + 2**200)
    states = [r.generator("noise", 0).get_state().numpy()[24 : 24 + 8 * 624] for r in (one, two)]
    words = [state.view(np.uint64) for state in states]
    assert (words[0] != words[1]).mean() > 0.99
    assert all(word.max() > 2**31 and word.max() < 2**32 for word in words)
    assert len(set(words[0].tolist())) > 620


def test_filled_generators_draw_as_the_mersenne_twister_does():
    """numpy's MT19937 from the same words gives the same numbers: none is skipped."""
    sequence = np.random.SeedSequence([9, 1, 4], pool_size=8)
    twister = np.random.MT19937()
    key = sequence.generate_state(624, np.uint32)
    twister.state = {"bit_generator": "MT19937", "state": {"key": key, "pos": 624}}
    generator = Randomness(insecure_seed=9).generator("noise", 4)
    drawn = torch.empty(2000, dtype=torch.int32).random_(generator=generator)
    assert drawn.tolist() == (twister.random_raw(2000) & (2**31 - 1)).tolist()


def test_refuses_a_negative_seed():
    with pytest.raises(InputError, match="`insecure_seed` to be ≥ 0 or None, got -1"):
        Randomness(-1)
