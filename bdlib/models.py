"""The papers' networks by name and width.  Each takes images in [0, 1]: normalization is its first layer."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from bdlib.randomness import seeded


class Normalize(nn.Module):
    """(x - mean) / std for each channel."""

    def __init__(self, mean: torch.Tensor, std: torch.Tensor):
        super().__init__()
        self.register_buffer("mean", mean.reshape(-1, 1, 1).float())
        self.register_buffer("std", std.reshape(-1, 1, 1).float())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return (images - self.mean) / self.std


class Classifier(nn.Module):
    """normalize -> features -> pool -> flatten -> linear; `embed` gives what the last layer sees, (N, D)."""

    def __init__(self, normalize: nn.Module, features: nn.Module, pool: nn.Module, linear: nn.Linear):
        super().__init__()
        self.normalize, self.features, self.pool, self.linear = normalize, features, pool, linear

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        return self.pool(self.features(self.normalize(images))).flatten(1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.linear(self.embed(images))


class PreActBlock(nn.Module):
    """Two 3 x 3 convolutions, batch norm and ReLU before each (He et al., arXiv 1603.05027)."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), _conv(inputs, outputs, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), _conv(outputs, outputs, 1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if stride > 1 or inputs != outputs else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(out)
        return self.conv2(F.relu(self.bn2(self.conv1(out)))) + shortcut


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions, each followed by batch norm (He et al., arXiv 1512.03385)."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = _conv(inputs, outputs, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = _conv(outputs, outputs, 1), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


def _conv(inputs: int, outputs: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)


def _stages(block: type[nn.Module], inputs: int, widths: list[int], depth: int) -> list[nn.Module]:
    """Stages of `depth` blocks; every stage but the first halves the picture."""
    blocks = []
    for stage, outputs in enumerate(widths):
        for k in range(depth):
            blocks.append(block(inputs, outputs, 2 if stage and k == 0 else 1))
            inputs = outputs
    return blocks


def _preact_resnet18(channels: int, width: int) -> tuple[nn.Module, nn.Module, int]:
    # As in BackdoorBench: no batch norm or ReLU between the last block and the pooling.
    blocks = _stages(PreActBlock, width, [width, 2 * width, 4 * width, 8 * width], depth=2)
    return nn.Sequential(_conv(channels, width, 1), *blocks), nn.AdaptiveAvgPool2d(1), 8 * width


def _resnet18(channels: int, width: int) -> tuple[nn.Module, nn.Module, int]:
    blocks = _stages(BasicBlock, width, [width, 2 * width, 4 * width, 8 * width], depth=2)
    return (
        nn.Sequential(_conv(channels, width, 1), nn.BatchNorm2d(width), nn.ReLU(), *blocks),
        nn.AdaptiveAvgPool2d(1),
        8 * width,
    )


def _wrn_16_1(channels: int, width: int) -> tuple[nn.Module, nn.Module, int]:
    # 16 layers = 3 stages of 2 pre-activation blocks (Zagoruyko & Komodakis, arXiv 1605.07146), widening factor 1.
    blocks = _stages(PreActBlock, width, [width, 2 * width, 4 * width], depth=2)
    last = [nn.BatchNorm2d(4 * width), nn.ReLU()]
    return nn.Sequential(_conv(channels, width, 1), *blocks, *last), nn.AdaptiveAvgPool2d(1), 4 * width


def _vgg_small(channels: int, width: int) -> tuple[nn.Module, nn.Module, int]:
    # The small VGG of AWM's code: 32-32-M-64-64-M-128-128-M, ELU, dropout .3 .4 .4, no batch norm.
    layers, inputs = [], channels
    for outputs, dropout in ((width, 0.3), (2 * width, 0.4), (4 * width, 0.4)):
        for _ in range(2):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ELU()]
            inputs = outputs
        layers += [nn.MaxPool2d(2), nn.Dropout(dropout)]
    return nn.Sequential(*layers), nn.AdaptiveAvgPool2d(4), 16 * inputs


# Name -> builder of (features, pool, length of the embedding), and the papers' width: channels of the first stage.
ARCHS: dict[str, tuple[Callable[[int, int], tuple[nn.Module, nn.Module, int]], int]] = {
    "preact_resnet18": (_preact_resnet18, 64),
    "resnet18": (_resnet18, 64),
    "vgg_small": (_vgg_small, 32),
    "wrn_16_1": (_wrn_16_1, 16),
}


def parse(arch: str) -> tuple[str, int]:
    """Name and width of an architecture written "preact_resnet18" (the papers' width) or "preact_resnet18:16".

    Raises ValueError for an unknown name or a width below 1.
    """
    name, colon, width = arch.partition(":")
    if name not in ARCHS or (colon and not (width.isdecimal() and int(width) >= 1)):
        raise ValueError(
            f"arch must be one of {', '.join(ARCHS)}, with :WIDTH (at least 1) behind it for another width, got {arch!r}"
        )
    return name, int(width) if colon else ARCHS[name][1]


def build(arch: str, images: torch.Tensor, classes: int, *, generator: torch.Generator) -> Classifier:
    """A fresh network for images like these: uint8 (N, C, H, W), the training split, whose mean and deviation it normalizes by.

    The weights are PyTorch's default ones, drawn from `generator`; the global random state is left as it was.
    """
    name, width = parse(arch)
    channels = images.shape[1]
    mean, std = channel_statistics(images)
    with seeded(generator):
        features, pool, length = ARCHS[name][0](channels, width)
        model = Classifier(Normalize(mean, std), features, pool, nn.Linear(length, classes))
    return model if _crashes_in_channels_last(model) else model.to(memory_format=torch.channels_last)


def _crashes_in_channels_last(model: nn.Module) -> bool:
    """Whether a strided 1 x 1 convolution has fewer than 8 input channels.

    Channels last gives the same results to rounding and 10 to 30% faster convolutions, but on AVX2 CPUs the kernels of torch 2.14 and
    2.15 for such a layer write past their memory ("double free or corruption").
    """
    convolutions = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    return any(c.kernel_size == (1, 1) and c.stride != (1, 1) and c.in_channels < 8 for c in convolutions)


def channel_statistics(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation (C,) of uint8 images in [0, 1], from exact counts of the 256 levels."""
    levels = torch.arange(256, dtype=torch.float64) / 255
    counts = (
        torch.stack([torch.bincount(images[:, c].flatten(), minlength=256) for c in range(images.shape[1])])
        .cpu()
        .double()
    )
    share = counts / counts.sum(1, keepdim=True)
    mean = share @ levels
    variance = share @ levels.square() - mean.square()
    return mean.float(), variance.clamp(min=1e-4).sqrt().float()
