"""Convolutional nets for images."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from tests.zoo.records import Records, images, numbers
from tests.zoo.setup import Plain, setup

UNSOUND = [
    ("any net with BatchNorm", "each record is normalized by the others"),
    ("segmentation, mean over all pixels that are not ignored", "pixels of the batch are counted"),
    ("detection, losses divided by all boxes of the batch", "boxes of the batch are counted"),
    ("Dice loss over the whole batch", "a ratio of sums over the batch"),
    ("mixup and cutmix", "each record is mixed with another one"),
]


def classified(module, batch):
    x, y = batch
    return F.cross_entropy(module(x), y)


def masks():
    """(image, a class for each pixel)."""
    g = numbers(1)
    return Records((image, torch.randint(3, image.shape[1:], generator=g)) for image, _ in images())


def double_conv(inside, out):
    return nn.Sequential(
        nn.Conv2d(inside, out, 3, padding=1, bias=False),
        nn.GroupNorm(2, out),
        nn.ReLU(inplace=True),
        nn.Conv2d(out, out, 3, padding=1, padding_mode="reflect"),
        nn.GroupNorm(out, out),
        nn.ReLU(inplace=True),
    )


@setup("U-Net with GroupNorm, segmentation", "vision", masks)
class UNet(Plain):
    def __init__(self):
        super().__init__()
        self.down1, self.down2 = double_conv(3, 8), double_conv(8, 16)
        self.pool = nn.MaxPool2d(2)
        self.bottom = double_conv(16, 16)
        self.up2 = nn.ConvTranspose2d(16, 16, 2, stride=2)
        self.right2, self.right1 = double_conv(32, 8), double_conv(16, 8)
        self.out = nn.Conv2d(8, 3, 1)

    def forward(self, x):
        one = self.down1(x)
        two = self.down2(self.pool(one))
        up = self.right2(torch.cat([self.up2(self.bottom(self.pool(two))), two], dim=1))
        up = F.interpolate(up, scale_factor=2, mode="bilinear", align_corners=False)
        return self.out(self.right1(torch.cat([up, one], dim=1)))

    def training_step(self, batch, batch_idx):
        image, mask = batch
        loss = F.cross_entropy(self(image), mask)
        self.log("train/loss", loss)
        return loss


@setup("segmentation by a Dice loss of each record", "vision", masks)
class Dice(Plain):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.GELU(),
            nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=4), nn.GELU(), nn.Dropout2d(0.1),
            nn.Conv2d(8, 3, 1),
        )  # fmt: skip

    def training_step(self, batch, batch_idx):
        image, mask = batch
        p = self.net(image).softmax(1)
        t = F.one_hot(mask, 3).movedim(-1, 1)
        dice = 2 * (p * t).sum((2, 3)) / (p + t).sum((2, 3))
        return (1 - dice.mean(1)).mean()


@setup("VAE with a convolutional encoder", "vision", images)
class VAE(Plain):
    """The reparameterization is drawn in the step, by `noise`."""

    def __init__(self, latent=4):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 8, 4, 2, 1), nn.SiLU(), nn.Conv2d(8, 8, 4, 2, 1), nn.SiLU(), nn.Flatten()
        )
        self.mu, self.log_var = nn.Linear(128, latent), nn.Linear(128, latent)
        self.decode = nn.Linear(latent, 128)
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(8, 8, 4, 2, 1), nn.SiLU(), nn.ConvTranspose2d(8, 3, 4, 2, 1)
        )

    def noise(self, shape):
        return torch.randn(shape, device=self.device)

    def training_step(self, batch, batch_idx):
        x, _ = batch
        h = self.encoder(x)
        mu, log_var = self.mu(h), self.log_var(h)
        z = mu + self.noise(mu.shape) * (0.5 * log_var).exp()
        logits = self.decoder(self.decode(z).view(-1, 8, 4, 4))
        reconstruction = F.binary_cross_entropy_with_logits(logits, x, reduction="none")
        kl = -0.5 * (1 + log_var - mu.pow(2) - log_var.exp())
        elbo = reconstruction.sum(dim=(1, 2, 3)) + kl.sum(dim=1)
        return {"loss": elbo.mean() / 768, "kl": kl.detach().mean()}


class Residual(nn.Module):
    def __init__(self, inside, out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inside, out, 3, stride, 1, bias=False)
        self.norm1 = nn.GroupNorm(4, out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.norm2 = nn.GroupNorm(4, out)
        self.shortcut = nn.Identity()
        if stride != 1 or inside != out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inside, out, 1, stride, bias=False), nn.GroupNorm(4, out)
            )

    def forward(self, x):
        out = F.relu(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


@setup("ResNet with GroupNorm", "vision", images)
class ResNet(Plain):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layers = nn.Sequential(Residual(8, 8, 1), Residual(8, 16, 2), Residual(16, 16, 1))
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(F.adaptive_avg_pool2d(self.layers(self.stem(x)), 1).flatten(1))

    def training_step(self, batch, batch_idx):
        return classified(self, batch)


class DropPath(nn.Module):
    """Leaves the branch out for some of the records."""

    def __init__(self, drop_prob=0.2):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep = 1 - self.drop_prob
        shape = (x.shape[0],) + (1,) * (x.ndim - 1)
        return x * x.new_empty(shape).bernoulli_(keep).div_(keep)


class ConvNeXtBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.grow, self.shrink = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.gamma = nn.Parameter(0.5 * torch.ones(width))
        self.drop_path = DropPath()

    def forward(self, x):
        h = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        h = self.gamma * self.shrink(F.gelu(self.grow(h)))
        return x + self.drop_path(h.permute(0, 3, 1, 2))


@setup("ConvNeXt by hand, with LayerScale and DropPath", "vision", images)
class ConvNeXt(Plain):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 8, 4, 4), ConvNeXtBlock(8), ConvNeXtBlock(8),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(8), nn.Linear(8, 3),
        )  # fmt: skip

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return classified(self, batch)


@dataclass
class Labelled:
    """A batch as a dataclass."""

    image: Tensor
    label: Tensor


def labelled(records):
    return Labelled(*(torch.stack(parts) for parts in zip(*records, strict=True)))


@setup("depthwise separable convolutions, the batch a dataclass", "vision", images, labelled)
class Separable(Plain):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, padding="valid"),
            nn.InstanceNorm2d(8, affine=True), nn.Hardswish(),
            nn.Conv2d(8, 8, 3, padding="same", groups=8), nn.Conv2d(8, 16, 1), nn.Hardswish(),
        )  # fmt: skip
        self.squeeze, self.excite = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.head = nn.Linear(16, 3)

    def training_step(self, batch, batch_idx):
        x = self.features(batch.image)
        gate = x.mean((2, 3), keepdim=True)
        x = x * self.excite(F.relu(self.squeeze(gate))).sigmoid()
        return F.cross_entropy(self.head(x.mean((2, 3))), batch.label)


class StandardizedConv2d(nn.Conv2d):
    """Each filter has mean 0 and deviation 1 before it is used."""

    def forward(self, x):
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        std = self.weight.std((1, 2, 3), keepdim=True) + 1e-5
        weight = (self.weight - mean) / std
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


@setup("weight standardization with GroupNorm", "vision", images)
class Standardized(Plain):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            StandardizedConv2d(3, 8, 3, padding=1), nn.GroupNorm(4, 8), nn.ReLU(), nn.MaxPool2d(4),
            StandardizedConv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 3),
        )  # fmt: skip

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x), y)


@setup("weight_norm as a parametrization", "vision", images)
class WeightNormed(Plain):
    def __init__(self):
        super().__init__()
        self.conv1 = weight_norm(nn.Conv2d(3, 8, 3, stride=2))
        self.conv2 = weight_norm(nn.Conv2d(8, 8, 3, stride=2))
        self.head = weight_norm(nn.Linear(72, 3), dim=None)

    def forward(self, x):
        x = F.elu(self.conv2(F.elu(self.conv1(x))))
        return self.head(x.flatten(1))

    def training_step(self, batch, batch_idx):
        return classified(self, batch)


@setup("convolutions padded in four ways, 1, 2 and 3 dimensions", "vision", images)
class Paddings(Plain):
    def __init__(self):
        super().__init__()
        self.zeros = nn.Conv2d(3, 4, 3, padding=1)
        self.circular = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")
        self.replicate = nn.Conv2d(4, 4, 3, padding=(0, 1), padding_mode="replicate", stride=2)
        self.volume = nn.Conv3d(1, 2, 3, padding="same")
        self.line = nn.Conv1d(8, 3, 3, padding=1)
        self.pad = nn.ZeroPad2d((1, 0, 1, 0))

    def training_step(self, batch, batch_idx):
        x, y = batch
        x = self.replicate(self.pad(F.relu(self.circular(F.relu(self.zeros(x))))))
        x = F.relu(self.volume(x.unsqueeze(1))).flatten(1, 2)
        return F.cross_entropy(self.line(x.mean(-1)).amax(-1), y)


@setup("super-resolution by PixelShuffle, learned prior image", "vision", images)
class SuperResolution(Plain):
    """Target is the image itself; a Charbonnier loss."""

    def __init__(self):
        super().__init__()
        self.prior = nn.Parameter(torch.zeros(1, 3, 16, 16))
        self.body = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.PReLU(12))
        self.up = nn.Sequential(nn.Conv2d(12, 12, 3, padding=1), nn.PixelShuffle(2))

    def training_step(self, batch, batch_idx):
        sharp, _ = batch
        blurred = F.avg_pool2d(sharp, 2)
        guess = self.up(self.body(blurred)) + self.prior
        return ((guess - sharp) ** 2 + 1e-6).sqrt().mean()


def scenes():
    """Images of different sizes, each with one to three boxes."""
    g = numbers(5)

    def scene(i):
        boxes = torch.rand(1 + i % 3, 4, generator=g)
        labels = torch.randint(3, (len(boxes),), generator=g)
        image = torch.rand(3, 12 + 2 * (i % 4), 20 - 3 * (i % 3), generator=g)
        return image, {"boxes": boxes, "labels": labels}

    return Records(scene(i) for i in range(9))


def as_lists(records):
    return tuple(zip(*records, strict=True))


@setup("detection, lists of images and of dicts, one forward each", "vision", scenes, as_lists)
class Detector(Plain):
    """Slots are matched to boxes in order; each image's loss is the mean over its boxes."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()
        )
        self.boxes, self.labels = nn.Linear(8, 12), nn.Linear(8, 9)

    def loss_of(self, image, target):
        feature = self.backbone(image.unsqueeze(0)).mean((2, 3))
        n = len(target["boxes"])
        boxes = self.boxes(feature).view(3, 4)[:n]
        labels = self.labels(feature).view(3, 3)[:n]
        return {
            "box": F.smooth_l1_loss(boxes.sigmoid(), target["boxes"]),
            "label": F.cross_entropy(labels, target["labels"]),
        }

    def training_step(self, batch, batch_idx):
        images, targets = batch
        losses = [self.loss_of(i, t) for i, t in zip(images, targets, strict=True)]
        self.log_dict({"box": sum(x["box"].item() for x in losses) / len(losses)})
        return torch.stack([sum(x.values()) for x in losses]).mean()


@setup("detection, lists padded to one tensor in the step", "vision", scenes, as_lists)
class PaddedDetector(Plain):
    """As torchvision's transform: one tensor for the backbone. Padding is masked out after it."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Conv2d(3, 8, 4, stride=4)
        self.count = nn.Linear(8, 3)

    def training_step(self, batch, batch_idx):
        images, targets = batch
        size = [max(i.shape[d] for i in images) for d in (1, 2)]
        padded = images[0].new_zeros(len(images), 3, *size)
        mask = images[0].new_zeros(len(images), 1, size[0] // 4, size[1] // 4)
        for n, image in enumerate(images):
            h, w = image.shape[1:]
            padded[n, :, :h, :w] = image
            mask[n, :, : h // 4, : w // 4] = 1
        features = self.backbone(padded).relu() * mask
        pooled = features.sum((2, 3)) / mask.sum((2, 3))
        boxes = torch.tensor([len(t["boxes"]) - 1 for t in targets], device=pooled.device)
        return F.cross_entropy(self.count(pooled), boxes)


@setup("diffusion: the noise of an image is guessed", "vision", images)
class Diffusion(Plain):
    """Times come from the record's class, the noise from `noise`; the schedule is a buffer."""

    def __init__(self, steps=10):
        super().__init__()
        kept = torch.linspace(0.99, 0.8, steps).cumprod(0)
        self.register_buffer("kept", kept)
        self.time = nn.Embedding(steps, 8)
        self.inside, self.outside = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)

    def noise(self, shape):
        return torch.randn(shape, device=self.device)

    def training_step(self, batch, batch_idx):
        x, label = batch
        time = 3 * label
        noise = self.noise(x.shape)
        kept = self.kept[time].view(-1, 1, 1, 1)
        noised = kept.sqrt() * x + (1 - kept).sqrt() * noise
        h = self.norm(self.inside(noised)) + self.time(time)[:, :, None, None]
        return F.mse_loss(self.outside(F.silu(h)), noise)
