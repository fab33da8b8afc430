import torch

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
