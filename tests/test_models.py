"""The networks: sizes known from the papers' code, normalization first, weights from the generator alone."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from bdlib import explain, models
from bdlib.data import Dataset
from bdlib.defenses import linf_pruning, rnp
from bdlib.randomness import seeded
from tests.conftest import same, state

NARROW = [f"{name}:4" for name in models.ARCHS]


def build(arch, images=None, classes=10, seed=0):
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8) if images is None else images
    return models.build(arch, images, classes, generator=torch.Generator().manual_seed(seed))


def pictures(*shape, count=4):
    return torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def parts(arch, *shape):
    """Features, pool and length without memory for the weights: only their shapes count."""
    name, width = models.parse(arch)
    with torch.device("meta"):
        return models.ARCHS[name][0](torch.Size(shape), width)


def convolutions(model):
    return [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]


def shapes(model):
    kinds = (nn.Conv2d, nn.BatchNorm2d)
    return [tuple(layer.weight.shape) for layer in model.modules() if isinstance(layer, kinds)]


def conv_weights(model):
    return sum(layer.weight.numel() for layer in convolutions(model))


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


REFERENCES = [
    "resnet18",
    "resnet34",
    "resnet50",
    "vgg19_bn",
    "alexnet",
    "mobilenet_v2",
    "densenet121",
    "efficientnet_b0",
]


@pytest.mark.parametrize(
    ("arch", "reference"), [*((name, name) for name in REFERENCES), ("shufflenet_v2", "shufflenet_v2_x1_0")]
)
def test_layers_are_torchvisions_but_for_the_first_convolution(arch, reference):
    with torch.device("meta"):
        theirs = torchvision.models.get_model(reference)
    features, _, length = parts(arch, 1, 32, 32)
    assert shapes(features)[0] == (shapes(theirs)[0][0], 1, 3, 3) and convolutions(features)[0].stride == (1, 1)
    assert shapes(features)[1:] == shapes(theirs)[1:]
    assert length == shapes(features)[-1][0]  # nothing but the pooling between the last convolution or norm and the end


@pytest.mark.parametrize("arch", ["mobilenet_v2", "efficientnet_b0"])
def test_dropout_before_the_linear_layer_is_torchvisions(arch):
    with torch.device("meta"):
        theirs = torchvision.models.get_model(arch).classifier[0]
    _, pool, _ = parts(arch, 3, 32, 32)
    assert isinstance(pool[-1], nn.Dropout) and pool[-1].p == theirs.p


@pytest.mark.parametrize(("side", "patch"), [(28, 2), (32, 4), (64, 8), (224, 16)])
def test_vit_has_torchvisions_encoder_and_at_most_14_patches_a_side(side, patch):
    with torch.device("meta"):
        theirs = torchvision.models.vit_b_16()
    features, _, length = parts("vit_b_16", 3, side, side)
    layers = [
        {name: value.shape for name, value in encoder.layers.named_parameters()}
        for encoder in (features.encoder, theirs.encoder)
    ]
    assert layers[0] == layers[1] and features.encoder.layers[0].num_heads == 12 and length == 768
    assert features.patches.kernel_size == features.patches.stride == (patch, patch)
    assert features.encoder.pos_embedding.shape == (1, (side // patch) ** 2, 768)


def test_vits_patches_stay_where_they_are():
    features = build("vit_b_16:4").features.eval()
    features.encoder = nn.Identity()
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(features(images), features.patches(images))


# 36.5 million for k = 10 in the paper; to the last weight, what its ports to PyTorch count with 10 classes.
def test_wide_resnets_have_the_papers_numbers_of_weights():
    counts = {}
    for k in (1, 2, 4, 10):
        features, _, length = parts(f"wrn_28_{k}", 3, 32, 32)
        counts[k] = sum(weight.numel() for weight in features.parameters()) + 10 * (length + 1)
        assert shapes(features)[0] == (16, 3, 3, 3) and length == 64 * k
        assert len([layer for layer in convolutions(features) if layer.kernel_size == (3, 3)]) == 25
    assert counts[10] == 36_479_194 and counts[2] == 1_467_610 and counts[1] < counts[2] < counts[4] < counts[10]


def test_vgg19_bn_has_16_convolutions_and_one_linear_layer():
    model = build("vgg19_bn:4")
    assert (
        len(convolutions(model)) == 16 and len([part for part in model.modules() if isinstance(part, nn.Linear)]) == 1
    )
    assert model.features(torch.zeros(1, 3, 32, 32)).shape == (1, 32, 1, 1)


@pytest.mark.parametrize("name", models.ARCHS)
def test_width_is_the_number_of_channels_of_the_first_convolution(name):
    wide, narrow = (parts(f"{name}:{width}", 3, 32, 32)[0] for width in (40, 20))
    expected = {"efficientnet_b0": (40, 24), **{f"wrn_28_{k}": (16, 16) for k in (1, 2, 4, 10)}}
    assert (shapes(wide)[0][0], shapes(narrow)[0][0]) == expected.get(name, (40, 20))
    counts = [sum(weight.numel() for weight in features.parameters()) for features in (wide, narrow)]
    assert 2.3 < counts[0] / counts[1] < 4.2  # all layers grow, nearly all of them in both directions


@pytest.mark.parametrize("arch", NARROW)
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 32, 32), (3, 64, 64)])
def test_any_arch_takes_images_of_any_size(arch, shape):
    images = pictures(*shape)
    model = build(arch, images, classes=7).eval()
    floats = images.float() / 255
    assert model(floats).shape == (4, 7)
    assert torch.allclose(model(floats), model.linear(model.embed(floats)))


@pytest.mark.parametrize(("arch", "smallest"), [("vgg19_bn:4", 32), ("alexnet:4", 15)])
def test_images_too_small_for_the_poolings_are_refused(arch, smallest):
    images = pictures(3, smallest, smallest + 1)
    assert build(arch, images).eval()(images.float() / 255).isfinite().all()
    with pytest.raises(ValueError, match=f"at least {smallest} x {smallest} pixels, got"):
        build(arch, images[:, :, 1:])


@pytest.mark.parametrize("arch", NARROW)
def test_a_network_is_compiled_whole_and_once_for_all_of_its_architecture(arch):
    """As `gpu.compiled` asks for, but for the kernels, which need a GPU."""
    graphs = []
    backend = lambda graph, inputs: graphs.append(graph) or graph.forward
    torch._dynamo.reset()
    floats = pictures(3, 32, 32).float() / 255
    for seed in (0, 1):
        model = build(arch, seed=seed).train()
        compiled = torch.compile(model, dynamic=False, fullgraph=True, backend=backend)
        with seeded(torch.Generator().manual_seed(0)):
            expected = model(floats)
        with seeded(torch.Generator().manual_seed(0)):
            assert torch.allclose(compiled(floats), expected, atol=1e-5)
    assert len(graphs) == 1


@pytest.mark.parametrize("arch", NARROW)
def test_gradient_reaches_the_first_convolution_and_no_layer_works_in_place(arch):
    images = pictures(3, 32, 32)
    model = build(arch, images).train()
    F.cross_entropy(model(images.float() / 255), torch.arange(4)).backward()
    norms = [weight.grad.norm() for weight in model.parameters()]
    assert torch.stack(norms).isfinite().all() and convolutions(model)[0].weight.grad.norm() > 0
    assert not [name for name, part in model.named_modules() if getattr(part, "inplace", False)]


# Height and width of the last feature map at 32 x 32: how often a network halves the picture.
SIDES = {
    **{f"wrn_{name}": 8 for name in ("16_1", "28_1", "28_2", "28_4", "28_10")},
    **{"vgg19_bn": 2, "efficientnet_b0": 2, "alexnet": 3, "vit_b_16": 8},
}
# Those that do not end with a ReLU.
SIGNED = ("preact_resnet18", "vgg_small", "efficientnet_b0", "vit_b_16")


@pytest.mark.parametrize("arch", NARROW)
def test_last_feature_map_is_all_that_the_classes_hang_on(arch):
    images = pictures(3, 32, 32)
    floats, model = images.float() / 255, build(arch, images).eval()
    name = explain.last_feature_map(model, floats)
    maps = explain.feature_maps(model, floats, name)
    side = SIDES.get(arch.partition(":")[0], 4)
    assert maps.shape[2:] == (side, side) and (maps.min() >= 0) == (arch.partition(":")[0] not in SIGNED)
    silent = linf_pruning.silence(model, name, torch.arange(maps.shape[1]), maps.shape[1])
    assert model.embed(floats).any() and not silent.embed(floats).any()


@pytest.mark.parametrize("arch", NARROW)
def test_rnp_says_which_networks_have_no_batch_norm(arch, generator):
    images = pictures(3, 32, 32)
    model, clean = build(arch, images, classes=2), Dataset("clean", images, torch.arange(4) % 2, ("a", "b"))
    if arch.partition(":")[0] not in ("vgg_small", "alexnet", "vit_b_16"):
        assert rnp.scales(model)
        return
    with pytest.raises(ValueError, match="no nn.BatchNorm2d"):
        rnp.rnp(model, clean, rnp.RnpConfig(), generator=generator)


@pytest.mark.parametrize("inputs", [3, 8, 16])
def test_shortcut_equals_a_strided_convolution(inputs, generator):
    layer = models.Shortcut(inputs, 5, 2).to(memory_format=torch.channels_last)
    images = torch.randn(6, inputs, 9, 9, generator=generator)
    weight = layer.weight.detach().clone(memory_format=torch.contiguous_format).requires_grad_(True)
    expected, given = F.conv2d(images, weight, stride=2), layer(images.to(memory_format=torch.channels_last))
    for output in (expected, given):
        output.square().sum().backward()
    assert torch.allclose(given, expected, atol=1e-6) and torch.allclose(layer.weight.grad, weight.grad, rtol=1e-4)
    assert (layer.stride == (1, 1)) == (inputs < 16)  # what oneDNN cannot do with so few channels is not asked of it


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


@pytest.mark.parametrize("arch", ["preact_resnet18:2", *NARROW])
def test_same_generator_same_weights(arch, untouched):
    assert same(state(build(arch, seed=1)), state(build(arch, seed=1)))
    assert not same(state(build(arch, seed=1)), state(build(arch, seed=2)))


@pytest.mark.parametrize(
    "arch", ["preact_resnet", "preact_resnet18:", "preact_resnet18:0", "preact_resnet18:-4", "preact_resnet18:wide", ""]
)
def test_unknown_arch_or_width_says_what_is_allowed(arch):
    with pytest.raises(ValueError, match=r"arch must be one of preact_resnet18, .*got"):
        models.parse(arch)
