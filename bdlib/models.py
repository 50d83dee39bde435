"""The papers' networks, and others in wide use, by name and width.  Each takes images in [0, 1]: normalization is its first layer.

Networks and blocks are torchvision's where it has them; it is imported where one is built, because that takes seconds.  Those made for
224 x 224 pixels have the usual form for 32 x 32: the first convolution 3 x 3 with stride 1, no pooling behind it, one linear layer.
"""

from collections.abc import Callable
from functools import partial
from math import gcd

import torch
import torch.nn.functional as F
from torch import nn

from bdlib.randomness import seeded

Parts = tuple[nn.Module, nn.Module, int]  # features, pool, length of the embedding


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


class Shortcut(nn.Conv2d):
    """A 1 x 1 convolution, with a stride: below 16 channels one without a stride, of every `step`-th pixel of every `step`-th row.

    That is the same to rounding.  With a stride, and channels last, oneDNN writes outside its memory on fewer than 8 channels (16 with
    AVX-512): wrong gradients or a crash (https://github.com/uxlfoundation/oneDNN/issues/6035).
    """

    def __init__(self, inputs: int, outputs: int, stride: int):
        step = stride if inputs < 16 else 1
        super().__init__(inputs, outputs, 1, stride // step, bias=False)
        self.step = step

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x[:, :, :: self.step, :: self.step])


class PreActBlock(nn.Module):
    """Two 3 x 3 convolutions, batch norm and ReLU before each (He et al., arXiv 1603.05027)."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), _conv(inputs, outputs, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), _conv(outputs, outputs, 1)
        self.shortcut = Shortcut(inputs, outputs, stride) if stride > 1 or inputs != outputs else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(out)
        return self.conv2(F.relu(self.bn2(self.conv1(out)))) + shortcut


class PatchEncoder(nn.Module):
    """Features of a Vision Transformer: a convolution embeds the patches, torchvision's encoder relates them; (N, length, h, w)."""

    def __init__(self, shape: torch.Size, patch: int, length: int):
        from torchvision.models.vision_transformer import Encoder

        super().__init__()
        channels, height, width = shape
        self.patches = nn.Conv2d(channels, length, patch, patch)
        tokens = (height // patch) * (width // patch)
        heads = gcd(length, max(1, length // 64))  # of 64 channels, as the 12 of the published network
        self.encoder = Encoder(tokens, 12, heads, length, 4 * length, dropout=0.0, attention_dropout=0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = self.patches(x)
        return self.encoder(maps.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(maps.shape)


def _conv(inputs: int, outputs: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)


def _first(channels: int, old: nn.Conv2d) -> nn.Conv2d:
    """What replaces torchvision's first convolution: any number of channels, 3 x 3, stride 1."""
    return nn.Conv2d(channels, old.out_channels, 3, padding=1, bias=old.bias is not None)


def _stages(
    block: Callable[[int, int, int], nn.Module], inputs: int, outputs: list[int], depths: list[int]
) -> list[nn.Module]:
    """The blocks of all stages, made of (inputs, outputs, stride); every stage but the first halves the picture."""
    blocks = []
    for stage, (size, depth) in enumerate(zip(outputs, depths, strict=True)):
        for k in range(depth):
            blocks.append(block(inputs, size, 2 if stage and k == 0 else 1))
            inputs = size
    return blocks


def _preact_resnet18(shape: torch.Size, width: int) -> Parts:
    # As in BackdoorBench: no batch norm or ReLU between the last block and the pooling.
    blocks = _stages(PreActBlock, width, [width, 2 * width, 4 * width, 8 * width], [2, 2, 2, 2])
    return nn.Sequential(_conv(shape[0], width, 1), *blocks), nn.AdaptiveAvgPool2d(1), 8 * width


def _resnet(shape: torch.Size, width: int, kind: str, depths: list[int]) -> Parts:
    """He et al., arXiv 1512.03385, of torchvision's BasicBlock or Bottleneck."""
    from torchvision.models import resnet

    of_kind = getattr(resnet, kind)

    def block(inputs: int, outputs: int, stride: int) -> nn.Module:
        shortcut = None
        if stride > 1 or inputs != outputs:
            shortcut = nn.Sequential(Shortcut(inputs, outputs, stride), nn.BatchNorm2d(outputs))
        return of_kind(inputs, outputs // of_kind.expansion, stride, shortcut)

    outputs = [of_kind.expansion * width * factor for factor in (1, 2, 4, 8)]
    first = [_conv(shape[0], width, 1), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*first, *_stages(block, width, outputs, depths)), nn.AdaptiveAvgPool2d(1), outputs[-1]


def _wide_resnet(shape: torch.Size, width: int, first: int, depth: int) -> Parts:
    """Zagoruyko & Komodakis, arXiv 1605.07146: 6 `depth` + 4 layers, three stages of `depth` blocks behind `first` channels."""
    blocks = _stages(PreActBlock, first, [width, 2 * width, 4 * width], [depth] * 3)
    last = [nn.BatchNorm2d(4 * width), nn.ReLU()]
    return nn.Sequential(_conv(shape[0], first, 1), *blocks, *last), nn.AdaptiveAvgPool2d(1), 4 * width


def _wrn_16(shape: torch.Size, width: int) -> Parts:
    return _wide_resnet(shape, width, width, depth=2)


def _wrn_28(shape: torch.Size, width: int) -> Parts:
    return _wide_resnet(shape, width, min(16, width), depth=4)  # 16 for every widening factor


def _vgg_small(shape: torch.Size, width: int) -> Parts:
    # The small VGG of AWM's code: 32-32-M-64-64-M-128-128-M, ELU, dropout .3 .4 .4, no batch norm.
    layers, inputs = [], shape[0]
    for outputs, dropout in ((width, 0.3), (2 * width, 0.4), (4 * width, 0.4)):
        for _ in range(2):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ELU()]
            inputs = outputs
        layers += [nn.MaxPool2d(2), nn.Dropout(dropout)]
    return nn.Sequential(*layers), nn.AdaptiveAvgPool2d(4), 16 * inputs


def _vgg19_bn(shape: torch.Size, width: int) -> Parts:
    """Simonyan & Zisserman, arXiv 1409.1556, configuration E, with batch norm.

    One linear layer, as in the VGG for CIFAR-10 of AWM's code; torchvision's VGG has three, of 4,096 units.
    """
    from torchvision.models.vgg import cfgs, make_layers

    features = make_layers([size if size == "M" else size * width // 64 for size in cfgs["E"]], batch_norm=True)
    features[0] = _first(shape[0], features[0])
    return features, nn.AdaptiveAvgPool2d(1), 8 * width


def _alexnet(shape: torch.Size, width: int) -> Parts:
    """Krizhevsky, arXiv 1404.5997, the form that torchvision has, without a choice of width: so the layers are ours.

    One linear layer instead of three, as for CIFAR-10.
    """
    layers, inputs = [], shape[0]
    for size, kernel, pooled in ((64, 3, True), (192, 5, True), (384, 3, False), (256, 3, False), (256, 3, True)):
        outputs = size * width // 64
        layers += [nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2), nn.ReLU()]
        layers += [nn.MaxPool2d(3, 2)] if pooled else []
        inputs = outputs
    return nn.Sequential(*layers), nn.AdaptiveAvgPool2d(1), inputs


def _mobilenet_v2(shape: torch.Size, width: int) -> Parts:
    """Sandler et al., arXiv 1801.04381.  The last convolution has 1,280 channels in narrow networks too, as in the paper."""
    from torchvision.models import MobileNetV2

    # Expansion, channels, blocks, stride: that of the second stage is 2 for 224 x 224.
    stages = [
        [1, 16, 1, 1], [6, 24, 2, 1], [6, 32, 3, 2], [6, 64, 4, 2], [6, 96, 3, 1], [6, 160, 3, 2], [6, 320, 1, 1]
    ]  # fmt: skip
    network = MobileNetV2(width_mult=width / 32, inverted_residual_setting=stages, round_nearest=1)
    network.features[0][0] = _first(shape[0], network.features[0][0])
    return network.features, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Dropout(0.2)), network.last_channel


def _shufflenet_v2(shape: torch.Size, width: int) -> Parts:
    """Ma et al., arXiv 1807.11164, 1x: 116, 232 and 464 channels in the stages for 24 in the first convolution."""
    from torchvision.models import ShuffleNetV2

    stages = [2 * round(size * width / 48) for size in (116, 232, 464)]  # even: a block works on one half of them
    network = ShuffleNetV2([4, 8, 4], [width, *stages, 1024 * width // 24])
    network.conv1[0] = _first(shape[0], network.conv1[0])
    features = nn.Sequential(network.conv1, network.stage2, network.stage3, network.stage4, network.conv5)
    return features, nn.AdaptiveAvgPool2d(1), network.fc.in_features


def _densenet121(shape: torch.Size, width: int) -> Parts:
    """Huang et al., arXiv 1608.06993: every layer adds width / 2 channels."""
    from torchvision.models import DenseNet

    network = DenseNet(growth_rate=max(1, width // 2), num_init_features=width)
    features = network.features
    features.conv0 = _first(shape[0], features.conv0)
    del features.pool0
    features.relu5 = nn.ReLU()  # torchvision's forward has it outside `features`
    return features, nn.AdaptiveAvgPool2d(1), network.classifier.in_features


def _efficientnet_b0(shape: torch.Size, width: int) -> Parts:
    """Tan & Le, arXiv 1905.11946.  torchvision rounds all channels to multiples of 8: the narrowest has 8 in the first convolution."""
    from torchvision.models.efficientnet import EfficientNet, MBConvConfig

    # Expansion, kernel, stride, input channels, output channels, blocks.
    stages = [
        (1, 3, 1, 32, 16, 1), (6, 3, 2, 16, 24, 2), (6, 5, 2, 24, 40, 2), (6, 3, 2, 40, 80, 3), (6, 5, 1, 80, 112, 3),
        (6, 5, 2, 112, 192, 4), (6, 3, 1, 192, 320, 1),
    ]  # fmt: skip
    network = EfficientNet([MBConvConfig(*stage, width_mult=width / 32) for stage in stages], dropout=0.2)
    network.features[0][0] = _first(shape[0], network.features[0][0])
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Dropout(0.2))
    return network.features, pool, network.classifier[1].in_features


def _vit_b_16(shape: torch.Size, width: int) -> Parts:
    """Dosovitskiy et al., arXiv 2010.11929: 12 layers on as many patches as 16 x 16 pixels leave of 224 x 224, or fewer.

    That is at most 14 x 14: a patch has 4 x 4 pixels at 32 x 32, 8 x 8 at 64 x 64.
    DIFFERS: the mean over the patches is classified, as in arXiv 2205.01580, not a class token: so the patches are the last feature
    map, which pruning and Grad-CAM need.
    """
    side = gcd(shape[1], shape[2])
    patch = next(size for size in range(1, side + 1) if side % size == 0 and side <= 14 * size)
    return PatchEncoder(shape, patch, width), nn.AdaptiveAvgPool2d(1), width


# Name -> builder from an image's shape (C, H, W) and a width, and the published width: the channels of the first stage (ResNet, WRN),
# of the first convolution (the others), or of each token (ViT).
ARCHS: dict[str, tuple[Callable[[torch.Size, int], Parts], int]] = {
    "preact_resnet18": (_preact_resnet18, 64),
    "resnet18": (partial(_resnet, kind="BasicBlock", depths=[2, 2, 2, 2]), 64),
    "resnet34": (partial(_resnet, kind="BasicBlock", depths=[3, 4, 6, 3]), 64),
    "resnet50": (partial(_resnet, kind="Bottleneck", depths=[3, 4, 6, 3]), 64),
    "wrn_16_1": (_wrn_16, 16),
    "wrn_28_1": (_wrn_28, 16),
    "wrn_28_2": (_wrn_28, 32),
    "wrn_28_4": (_wrn_28, 64),
    "wrn_28_10": (_wrn_28, 160),
    "vgg_small": (_vgg_small, 32),
    "vgg19_bn": (_vgg19_bn, 64),
    "alexnet": (_alexnet, 64),
    "mobilenet_v2": (_mobilenet_v2, 32),
    "shufflenet_v2": (_shufflenet_v2, 24),
    "densenet121": (_densenet121, 64),
    "efficientnet_b0": (_efficientnet_b0, 32),
    "vit_b_16": (_vit_b_16, 768),
}
SMALLEST = {"vgg19_bn": 32, "alexnet": 15}  # pixels a side, so that the poolings leave one


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


def require_size(arch: str, shape: torch.Size) -> None:
    """Raises ValueError if images of this shape, (C, H, W), are too small for the network."""
    name, _ = parse(arch)
    smallest = SMALLEST.get(name, 1)
    if min(shape[1:]) < smallest:
        raise ValueError(f"{name} needs images of at least {smallest} x {smallest} pixels, got {tuple(shape[1:])}")


def build(arch: str, images: torch.Tensor, classes: int, *, generator: torch.Generator) -> Classifier:
    """A fresh network for images like these: uint8 (N, C, H, W), the training split, whose mean and deviation it normalizes by.

    The weights are drawn from `generator`, the way the network's layers draw theirs: PyTorch's, or torchvision's for MobileNetV2,
    DenseNet, EfficientNet and the ViT's encoder.  The global random state is left as it was.
    Raises ValueError for an unknown `arch` or images that are too small for it.
    """
    name, width = parse(arch)
    shape = images.shape[1:]
    require_size(arch, shape)
    mean, std = channel_statistics(images)
    with seeded(generator):
        features, pool, length = ARCHS[name][0](shape, width)
        model = Classifier(Normalize(mean, std), features, pool, nn.Linear(length, classes))
    for module in model.modules():
        if hasattr(module, "inplace"):
            module.inplace = False  # a hook on a layer sees what the layer gave, not the activation behind it
    # Channels last: the same results to rounding, 10 to 30% faster convolutions on CPUs and GPUs.
    return model.to(memory_format=torch.channels_last)


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
