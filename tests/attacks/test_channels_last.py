"""channels_last=True: how the model sees its images, and nothing else."""

import pytest
import torch
from torch import nn

from defend import PGD, InputError, InputSpace
from tests.attacks.cases import BALLS, batch, seeded

SPACE = InputSpace(mean=(0.5, 0.4), std=(0.25, 0.2))


class Looks(nn.Module):
    """A convolutional model that keeps the layout and dtype of what it was asked."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head, self.seen = nn.Conv2d(2, 6, 3), nn.Linear(6, 4), []

    def forward(self, x):
        last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        self.seen.append(last)
        return self.head(self.conv(x).tanh().mean((2, 3)))


@pytest.mark.parametrize("ball", BALLS, ids=lambda b: b.name)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"iterate": "best", "restarts": 2},
        {"stop_when_fooled": True},
        {"loss": "kl", "inputs": SPACE},
    ],
    ids=str,
)
@pytest.mark.parametrize("asked", [{}, {"chunk_size": 3}, {"eps": torch.linspace(0, 0.2, 7)}])
def test_the_model_sees_it_and_the_result_is_that_of_a_contiguous_batch(ball, settings, asked):
    space = settings.get("inputs", InputSpace())
    x, y = batch((7, 2, 5, 5), space, torch.float64, classes=4)
    x_last = x.to(memory_format=torch.channels_last)
    model = Looks().double()
    attack = PGD(ball, steps=3, channels_last=True, **settings)
    adv = attack(model, x, y, generator=seeded(), **asked)
    assert len(model.seen) >= 3
    assert all(model.seen)
    assert adv.stride() == x.stride()
    of_last = attack(model, x_last, y, generator=seeded(), **asked)
    assert of_last.stride() == x_last.stride()
    assert torch.equal(of_last, adv)
    # The start is drawn in the order of memory: the same one as for a batch that comes so.
    model.seen.clear()
    plain = PGD(ball, steps=3, **settings)(model, x_last, y, generator=seeded(), **asked)
    torch.testing.assert_close(adv, plain, rtol=0, atol=1e-9)


def test_without_it_the_model_sees_what_came():
    x, y = batch((4, 2, 5, 5))
    for images, last in ((x, False), (x.to(memory_format=torch.channels_last), True)):
        model = Looks()
        PGD(BALLS[0], steps=2)(model, images, y)
        assert model.seen == [last] * 2


@pytest.mark.parametrize("shape", [(3, 2), (3, 2, 4), (3, 2, 4, 4, 4)], ids=str)
def test_refuses_what_is_no_image(shape):
    message = r"images \[N, C, H, W\] with channels_last=True, got shape \(3, 2"
    with pytest.raises(InputError, match=message):
        PGD(BALLS[0], channels_last=True)(Looks(), torch.rand(shape), torch.zeros(3).long())
