"""The wrapper that attacks of torchattacks see: images of the model, copies of logits."""

import pytest
import torch
from torch import nn

from defend import InputError, InputSpace
from defend.attacks import TorchAttack
from defend.attacks.torchattacks.image_model import ImageModel, image_shape, raw_logits
from tests.attacks.cases import model_for, seeded

CPU = torch.device("cpu")


class Sees(nn.Module):
    """A model of any input that keeps it."""

    def forward(self, x):
        self.seen = x
        return x.flatten(1)[:, :3] * 2


def laid_out(shape, last):
    x = torch.rand(shape, generator=seeded())
    layout = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    return x.to(memory_format=layout) if last else x


@pytest.mark.parametrize(
    ("shape", "last"),
    [((2, 3, 4, 5), False), ((2, 3, 4, 5), True), ((2, 3, 2, 4, 5), False), ((2, 3, 2, 4, 5), True),
     ((2, 12), False), ((2, 3, 4), False)],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_model_sees_what_it_is_trained_on(shape, last, dtype):
    """Rank, layout, dtype and units, whatever the attack hands on."""
    like, model = laid_out(shape, last).to(dtype), Sees()
    space = InputSpace(mean=0.5, std=0.25) if shape[1] == 1 else InputSpace()
    images = torch.rand(6, *image_shape(like), generator=seeded(1))
    logits = raw_logits(model, like, space)(images)
    assert model.seen.shape == (6, *shape[1:])
    assert model.seen.dtype == dtype
    if last:
        assert model.seen.stride() == torch.empty_like(like.repeat(3, *[1] * (like.ndim - 1)),
            memory_format=torch.channels_last if len(shape) == 4 else torch.channels_last_3d
        ).stride()  # fmt: skip
        assert not model.seen.is_contiguous()
    else:
        assert model.seen.is_contiguous()
    torch.testing.assert_close(model.seen.float().reshape(images.shape), images.to(dtype).float())
    assert (logits.dtype, logits.shape) == (torch.float32, (6, 3))


def test_logits_are_a_copy_that_an_attack_may_overwrite():
    """Square does; a model that returns a tensor of its own would be changed by it."""
    own = torch.rand(4, 5)
    images = torch.rand(4, 1, 2, 2)
    logits = raw_logits(lambda x: own, images, InputSpace())(images)
    before = own.clone()
    logits.zero_()
    ImageModel(raw_logits(lambda x: own, images, InputSpace()), CPU)(images).zero_()
    assert torch.equal(own, before)


def test_images_are_a_copy_that_a_model_may_overwrite():
    images = torch.rand(4, 1, 2, 2)
    before = images.clone()
    raw_logits(lambda x: x.mul_(0).flatten(1), images, InputSpace())(images)
    assert torch.equal(images, before)


@pytest.mark.parametrize("retain", [False, True])
def test_activations_are_kept_for_a_second_backward_only_where_there_is_one(retain):
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Tanh())
    images = torch.rand(2, 1, 2, 2, requires_grad=True)
    logits = ImageModel(raw_logits(model, images, InputSpace()), CPU, retain=retain)(images)
    first = torch.autograd.grad(logits[:, 0].sum(), images, retain_graph=True)[0]
    if retain:
        again = torch.autograd.grad(logits[:, 0].sum(), images)[0]
        assert torch.equal(first, again)
    else:
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(logits[:, 0].sum(), images)


@pytest.mark.parametrize(("name", "retains"), [("PGD", False), ("CW", False), ("DeepFool", True)])
def test_only_attacks_that_go_class_by_class_keep_activations(name, retains, monkeypatch):
    asked, init = [], ImageModel.__init__

    def spy(self, logits, device, *, retain=False):
        asked.append(retain)
        init(self, logits, device, retain=retain)

    monkeypatch.setattr(ImageModel, "__init__", spy)
    x, model = torch.rand(3, 1, 4, 4, generator=seeded()), model_for((3, 1, 4, 4))
    TorchAttack(name, {"steps": 2})(model, x, model(x).argmax(1))
    assert asked[-1] == retains  # before it one that only looks at the classes


@pytest.mark.parametrize("name", ["GN", "FGSM", "PGD", "PGDL2", "FAB"])
def test_values_a_hair_outside_the_box_start_inside(name, monkeypatch):
    """Within the rounding that is forgiven; torchattacks alone stops, or leaves them there."""
    import torchattacks

    x = torch.rand(4, 1, 4, 4, generator=seeded())
    x[:, 0, 0, 0], x[:, 0, 0, 1] = -5e-6, 1 + 5e-6
    model = model_for(x.shape)
    given, forward = [], getattr(torchattacks, name).forward

    def spy(self, images, labels):
        given.append(images.clone())
        return forward(self, images, labels)

    monkeypatch.setattr(getattr(torchattacks, name), "forward", spy)
    adv = TorchAttack(name)(model, x, model(x).argmax(1), generator=seeded())
    assert torch.equal(torch.cat(given), x.clamp(0, 1))
    moved = adv != x
    assert moved.any()
    assert 0 <= adv[moved].min() <= adv[moved].max() <= 1


@pytest.mark.parametrize("shape", [(4, 3, 6, 6), (4,), (3, 5)], ids=str)
def test_refuses_outputs_that_are_no_logits(shape):
    images = torch.rand(4, 1, 2, 2)
    with pytest.raises(InputError, match=r"logits of shape \[4, classes\], got \("):
        raw_logits(lambda x: torch.zeros(shape), images, InputSpace())(images)
