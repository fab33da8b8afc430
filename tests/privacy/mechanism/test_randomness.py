import sys

import numpy as np
import pytest
import torch
from scipy import stats

from defend import InputError
from defend.privacy import Randomness
from defend.privacy.mechanism.secure import Keystream, gaussians_from, label_of, uniforms_from

STREAMS = ("sampling", "noise", "attack", "count", "probe")


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
        for stream in STREAMS
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
    assert repr(randomness) == "Randomness(private=True, secure=False)"
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


@pytest.mark.parametrize("root", [-1, 2**256])
def test_refuses_a_root_that_does_not_fit_and_does_not_print_it(root):
    with pytest.raises(InputError, match=r"`root` to be in \[0, 2\^256\) or None") as caught:
        Randomness(root=root)
    assert str(root) not in str(caught.value)


# --- what the default draws: torch's generators, as they come ---


def test_default_uniforms_are_those_of_the_sampling_generator():
    randomness = Randomness(root=2**255 + 3)
    generator = randomness.generator("sampling", 6)
    expected = torch.rand(1000, generator=generator, dtype=torch.float64)
    assert torch.equal(randomness.uniforms(6, 1000), expected)
    assert randomness.uniforms(6, 0).shape == (0,)


@pytest.mark.parametrize("stream", ["noise", "count"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_default_gaussians_are_those_of_the_noise_generator(stream, dtype):
    """Tensor by tensor, and to the last bit once they are scaled: large ones, at least."""
    randomness = Randomness(root=2**255 + 3)
    generator = randomness.generator(stream, 6)
    draw = randomness.gaussian(6, "cpu", stream)
    wide = torch.promote_types(dtype, torch.float32)
    for shape in ((40, 30), (16,), (3,), (), (0,)):
        like = torch.zeros(shape, dtype=dtype)
        expected = torch.empty(shape, dtype=wide).normal_(0.0, 0.37, generator=generator)
        drawn = draw(like).mul_(0.37)
        assert drawn.dtype == wide
        # Below 16 numbers torch scales in float64 and rounds once.
        assert torch.equal(drawn, expected) or like.numel() < 16
        torch.testing.assert_close(drawn, expected, rtol=1e-6, atol=0)


# --- secure ---


def test_secure_numbers_come_from_the_keystream_of_the_root():
    root = 2**255 + 3
    randomness = Randomness(root=root, secure=True)
    assert randomness.private
    assert randomness.secure
    key = root.to_bytes(32, "little")
    expected = uniforms_from(Keystream(key, label_of(0, 6)), 1000)
    assert torch.equal(randomness.uniforms(6, 1000), expected)
    for stream, number in (("noise", 1), ("count", 3)):
        keystream = Keystream(key, label_of(number, 6))
        draw = randomness.gaussian(6, "cpu", stream)
        for shape in ((40, 30), (3,), (), (0,)):
            expected = gaussians_from(keystream, torch.Size(shape).numel()).view(shape)
            drawn = draw(torch.zeros(shape, dtype=torch.bfloat16))
            assert drawn.dtype == torch.float64
            assert torch.equal(drawn, expected)


def secure_numbers(randomness, step):
    """Eight numbers of every kind that a step draws."""
    like = torch.zeros(8)
    first_and_second = randomness.gaussian(step, "cpu")
    return [
        randomness.uniforms(step, 8),
        first_and_second(like),
        first_and_second(like),
        randomness.gaussian(step, "cpu", "count")(like),
        *(numbers(randomness.generator(s, step, rank=r)) for s in STREAMS for r in (0, 1)),
    ]


def test_secure_numbers_are_the_same_for_a_root_and_differ_otherwise():
    one, two = Randomness(root=5, secure=True), Randomness(root=5, secure=True)
    for a, b in zip(secure_numbers(one, 3), secure_numbers(two, 3), strict=True):
        assert torch.equal(a, b)
    others = [Randomness(root=5 + 2**200, secure=True), Randomness(secure=True)]
    drawn = [
        tuple(kind.tolist())
        for randomness in (one, *others)
        for step in range(20)
        for kind in secure_numbers(randomness, step)
    ]
    assert len(set(drawn)) == len(drawn) == 3 * 20 * 14


def test_secure_steps_and_streams_do_not_correlate():
    randomness, like = Randomness(root=5, secure=True), torch.zeros(200_000)
    rows = [
        randomness.gaussian(step, "cpu", stream)(like)
        for stream in ("noise", "count")
        for step in (0, 1, 256)
    ]

    def largest(rows):
        matrix = torch.corrcoef(torch.stack(rows)).fill_diagonal_(0)
        return matrix.abs().max().item() * len(like) ** 0.5

    assert largest(rows) < 4
    assert largest([*rows, 0.02 * rows[0] + rows[1]]) > 4


def test_secure_masks_hold_each_record_with_probability_q():
    randomness, q, steps = Randomness(root=5, secure=True), 0.03, 400
    hits = torch.stack([randomness.uniforms(step, 500) < q for step in range(steps)])

    def p(mask):
        by_record = (mask.sum(0).double() - steps * q).square().sum().item()
        law = stats.chi2(mask.shape[1])
        spread = by_record / (steps * q * (1 - q))
        total = stats.binomtest(int(mask.sum()), mask.numel(), q).pvalue
        return min(total, 2 * law.sf(spread), 2 * law.cdf(spread))

    assert p(hits) > 1e-3
    assert p(hits[:1].expand(steps, -1)) < 1e-6  # the same mask in every step


def test_secure_generators_are_filled_from_a_keystream_of_their_own():
    """What they are started with gives away neither the key nor a byte of the noise."""
    randomness = Randomness(root=5, secure=True)
    state = randomness.generator("noise", 4, rank=2).get_state().numpy()
    words = state[24 : 24 + 8 * 624].view(np.uint64).astype(np.uint32)
    label = label_of(1, 4, rank=2, seeds=True)
    keystream = Keystream((5).to_bytes(32, "little"), label)
    assert words.tobytes() == bytes(keystream.take(4 * 624))


def test_secure_numbers_leave_the_global_rng_alone():
    state = torch.get_rng_state()
    secure_numbers(Randomness(secure=True), 0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.cuda
def test_secure_gaussians_come_to_the_device_of_the_tensor():
    randomness = Randomness(root=5, secure=True)
    like = torch.zeros(3, 4, device="cuda")
    drawn = randomness.gaussian(0, like.device)(like)
    assert (drawn.device, drawn.dtype) == (like.device, torch.float64)
    assert torch.equal(drawn.cpu(), randomness.gaussian(0, "cpu")(like.cpu()))


def test_refuses_a_seed_together_with_secure_noise():
    with pytest.raises(InputError, match="either `insecure_seed` or secure noise, got both"):
        Randomness(0, secure=True)


def test_refuses_secure_noise_without_cryptography_at_once(monkeypatch):
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.ciphers", None)
    assert Randomness().private
    with pytest.raises(InputError, match=r"pip install 'lightning-defend\[secure\]'"):
        Randomness(secure=True)
