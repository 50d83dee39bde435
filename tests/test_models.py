"""The networks: sizes known from the papers' code, normalization first, weights from the generator alone."""

import numpy as np
import pytest
import torch
from torch import nn

from bdlib import models
from tests.conftest import same, state


def build(arch, images=None, classes=10, seed=0):
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8) if images is None else images
    return models.build(arch, images, classes, generator=torch.Generator().manual_seed(seed))


def conv_weights(model):
    return sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Conv2d))


# ResNet-18 and the small VGG: number of AWM's masks; ResNet-18's 4,800 batch-norm channels: the mask file of RNP's code.
@pytest.mark.parametrize(
    ("arch", "weights"), [("resnet18", 11_159_232), ("vgg_small", 286_560), ("preact_resnet18", 11_159_232)]
)
def test_convolution_weights_are_as_many_as_in_the_papers(arch, weights):
    assert conv_weights(build(arch)) == weights


def test_resnet18_has_the_papers_batch_norm_channels():
    assert sum(layer.num_features for layer in build("resnet18").modules() if isinstance(layer, nn.BatchNorm2d)) == 4800


def test_wrn_16_1_has_16_layers_and_64_features():
    model = build("wrn_16_1")
    deep = [
        layer
        for layer in model.modules()
        if isinstance(layer, (nn.Conv2d, nn.Linear)) and getattr(layer, "kernel_size", None) != (1, 1)
    ]
    assert len(deep) == 14 and model.linear.in_features == 64  # 16 with the two 1 x 1 shortcuts, as the name counts


@pytest.mark.parametrize("arch", [f"{name}:4" for name in models.ARCHS])
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 32, 32), (3, 64, 64)])
def test_any_arch_takes_images_of_any_size(arch, shape):
    images = torch.randint(0, 256, (4, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    model = build(arch, images, classes=7).eval()
    floats = images.float() / 255
    assert model(floats).shape == (4, 7)
    assert torch.allclose(model(floats), model.linear(model.embed(floats)))


def test_normalization_is_inside_the_network():
    images = torch.randint(0, 256, (50, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    normalized = build("wrn_16_1:2", images).normalize(images.float() / 255)
    assert torch.allclose(normalized.mean((0, 2, 3)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(normalized.std((0, 2, 3)), torch.ones(3), atol=1e-3)


def test_images_reach_the_features_normalized():
    images = torch.randint(100, 256, (8, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    model = build("wrn_16_1:2", images).eval()
    seen = []
    model.features.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
    model(images.float() / 255)
    assert torch.allclose(seen[0].mean((0, 2, 3)), torch.zeros(3), atol=1e-5)


def test_channel_statistics_equal_numpys():
    images = np.random.default_rng(0).integers(0, 256, (30, 2, 9, 9), dtype=np.uint8)
    mean, std = models.channel_statistics(torch.from_numpy(images))
    assert np.allclose(mean, (images / 255).mean((0, 2, 3))) and np.allclose(std, (images / 255).std((0, 2, 3)))


def test_same_generator_same_weights(untouched):
    assert same(state(build("preact_resnet18:2", seed=1)), state(build("preact_resnet18:2", seed=1)))
    assert not same(state(build("preact_resnet18:2", seed=1)), state(build("preact_resnet18:2", seed=2)))


@pytest.mark.parametrize(
    "arch", ["preact_resnet", "preact_resnet18:", "preact_resnet18:0", "preact_resnet18:-4", "preact_resnet18:wide", ""]
)
def test_unknown_arch_or_width_says_what_is_allowed(arch):
    with pytest.raises(ValueError, match=r"arch must be one of preact_resnet18, .*got"):
        models.parse(arch)
