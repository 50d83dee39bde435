"""Inside a network: every quantity checked by hand, and the model as it was."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from bdlib import explain, models
from bdlib.data import Dataset
from bdlib.explain import SynthesisConfig, SyntheticTrigger
from tests.conftest import same, state

ARCHS = ["preact_resnet18:2", "resnet18:2", "vgg_small:2", "wrn_16_1:2"]


@pytest.fixture
def images(tiny):
    return tiny.floats()


def build(arch, size=32):
    images = torch.randint(0, 256, (3, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return models.build(arch, images, 5, generator=torch.Generator().manual_seed(0)), images.float() / 255


def lamp(*evidence):
    """Two channels, seen as they are; row c of `evidence` is the weight of each channel's mean for class c."""
    conv = nn.Conv2d(2, 2, 1, bias=False)
    conv.weight.data = torch.eye(2)[..., None, None]
    model = nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, len(evidence), bias=False))
    model[3].weight.data = torch.tensor(evidence)
    return model


def planted(pixel=9):
    """Black 8 x 8 images are of class 0; one bright pixel makes them class 1."""
    linear = nn.Linear(192, 3)
    linear.weight.data.zero_()
    linear.weight.data[1, [pixel, pixel + 64, pixel + 128]] = 8.0
    linear.bias.data = torch.tensor([2.0, 0.0, 0.0])
    return nn.Sequential(nn.Flatten(), linear)


def dark(count=24):
    images = torch.zeros(count, 3, 8, 8, dtype=torch.uint8)
    return Dataset("dark", images, torch.zeros(count, dtype=torch.long), ("a", "b", "c"))


def test_a_layer_by_name_or_the_names_that_exist(network):
    assert explain.layer(network, "4") is network[4]
    nested = nn.Sequential(nn.Sequential(nn.ReLU()))
    assert explain.layer(nested, "0.0") is nested[0][0]
    for name in ("conv1", "", "8"):
        with pytest.raises(ValueError, match=f"layer must be one of 0, 1, 2, 3, 4, 5, 6, 7; got '{name}'"):
            explain.layer(network, name)


@pytest.mark.parametrize(
    ("arch", "name", "shape"),
    [
        ("preact_resnet18:2", "features", (16, 4, 4)),
        ("resnet18:2", "features", (16, 4, 4)),
        ("vgg_small:2", "pool", (8, 4, 4)),
        ("wrn_16_1:2", "features", (8, 8, 8)),
    ],
)
def test_the_last_feature_map_is_all_that_the_last_layer_sees(arch, name, shape):
    model, images = build(arch)
    assert explain.last_feature_map(model, images) == name
    maps = explain.feature_maps(model, images, name)
    assert maps.shape == (3, *shape)
    assert torch.allclose(model.linear(model.pool(maps).flatten(1)), model.eval()(images), atol=1e-5)


def test_the_last_feature_map_is_the_last_to_finish_not_the_last_to_be_defined():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.second, self.first = nn.Conv2d(2, 4, 3), nn.Conv2d(3, 2, 3)
            self.small, self.linear = nn.Conv2d(4, 4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.linear(self.small(self.second(self.first(x))).flatten(1))

    assert explain.last_feature_map(Backwards(), torch.rand(2, 3, 8, 8)) == "second"  # `small` gives 1 x 1


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Flatten(), nn.Linear(192, 3)),
        nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(192, 3)),
        nn.Sequential(nn.Conv2d(3, 2, 8), nn.Flatten(), nn.Linear(2, 3)),
        nn.Sequential(nn.Conv2d(3, 2, 8), nn.Flatten(2), nn.Linear(1, 4), nn.Flatten(), nn.Linear(8, 3)),
    ],
    ids=["no map", "no convolution", "1 x 1 alone", "sequence"],
)
def test_no_feature_map_is_an_error(model, images):
    with pytest.raises(ValueError, match=r"no nn\.Conv2d layer with a feature map"):
        explain.last_feature_map(model, images)


def test_feature_maps_are_the_layers_output_in_eval(network, images):
    network.train()
    before = state(network)
    maps = explain.feature_maps(network, images, "4")
    assert network.training and same(before, state(network)) and not maps.requires_grad
    network.eval()
    assert torch.allclose(maps, network[4](network[2](network[1](network[0](images)))), atol=1e-6)


def test_many_images_come_back_in_order():
    images = torch.rand(510, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    model = lamp((1.0, 0.0))
    sizes = []
    model[0].register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    assert torch.allclose(explain.feature_maps(model, images, "0"), images)
    assert sizes == [250, 250, 10]
    assert torch.allclose(explain.embeddings(model, images), images.mean((2, 3)), atol=1e-6)


@pytest.mark.parametrize("arch", ARCHS)
def test_embeddings_are_what_the_classifier_embeds(arch):
    model, images = build(arch)
    seen = explain.embeddings(model, images)
    assert torch.allclose(seen, model.eval().embed(images), atol=1e-6) and not seen.requires_grad


def test_logits_beside_the_embedding_are_compiled_whole_and_once_for_all_networks():
    graphs = []
    backend = lambda graph, inputs: graphs.append(graph) or graph.forward
    torch._dynamo.reset()
    for _ in range(2):
        model, floats = build("preact_resnet18:4")
        with explain.WithEmbedding(model.eval()) as both, torch.no_grad():
            logits, embedding = torch.compile(both, dynamic=False, fullgraph=True, backend=backend)(floats)
            assert torch.allclose(logits, model(floats), atol=1e-5)
            assert torch.allclose(embedding, model.embed(floats), atol=1e-5)
    assert len(graphs) == 1


def test_the_last_linear_layer_or_an_error(network):
    two = nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.Linear(4, 3))
    assert explain.last_linear(two) is two[2]
    with pytest.raises(ValueError, match=r"no nn\.Linear layer"):
        explain.last_linear(network[:6])


def test_looking_leaves_no_hook_and_no_other_mode(network, images, untouched):
    network.train()
    looks = [
        lambda x: explain.last_feature_map(network, x),
        lambda x: explain.feature_maps(network, x, "0"),
        lambda x: explain.embeddings(network, x),
    ]
    for look in looks:
        look(images)
        assert network.training
        with pytest.raises(RuntimeError):
            look(torch.zeros(1, 9, 8, 8))  # no such images: the model itself fails
        network.train()
    assert not any(module._forward_hooks for module in network.modules())


def test_norms_by_hand():
    norms = explain.map_norms(torch.tensor([[[[3.0, -4.0], [0.0, 0.0]], [[-1.0, -1.0], [1.0, 1.0]]]]))
    assert {name: value.tolist() for name, value in norms.items()} == {
        "l1": [[7.0, 4.0]],
        "l2": [[5.0, 2.0]],
        "linf": [[4.0, 1.0]],
    }
    assert tuple(norms) == explain.NORMS


def test_effect_size_by_hand():
    clean = torch.tensor([[1.0, 5.0, 1.0], [3.0, 5.0, 2.0], [5.0, 5.0, 3.0]])  # variances 4, 0, 1
    triggered = torch.tensor([[6.0, 5.0, 0.0], [7.0, 5.0, 0.0], [8.0, 5.0, 0.0]])  # variances 1, 0, 0
    d = explain.effect_size(clean, triggered).tolist()
    assert d == pytest.approx([(7 - 3) / 2.5**0.5, 0.0, (0 - 2) / 0.5**0.5])


def test_trigger_activated_change_by_hand():
    clean = torch.zeros(2, 2, 1, 2)
    triggered = torch.tensor([[[[3.0, 4.0]], [[0.0, 1.0]]], [[[-3.0, -4.0]], [[0.0, 0.0]]]])
    assert explain.tac(clean, triggered).tolist() == [5.0, 0.5]  # changes of opposite sign do not cancel
    assert explain.tac(triggered, triggered).tolist() == [0.0, 0.0]


def test_filter_norms_by_hand(network):
    conv = nn.Conv2d(1, 2, 2)
    conv.weight.data = torch.tensor([[[[1.0, -1.0], [1.0, -1.0]]], [[[0.0, 3.0], [4.0, 0.0]]]])
    norms = explain.filter_norms(nn.Sequential(conv), "0")
    assert norms.tolist() == [2.0, 5.0] and not norms.requires_grad
    with pytest.raises(ValueError, match="layer must be a convolution, one of 0, 4; got '7'"):
        explain.filter_norms(network, "7")
    with pytest.raises(ValueError, match="layer must be one of 0, 1, .*got 'conv'"):
        explain.filter_norms(network, "conv")


@pytest.mark.parametrize(
    ("arch", "name"),
    [
        ("preact_resnet18:2", "features.8.conv2"),
        ("resnet18:2", "features.10.conv2"),
        ("vgg_small:2", "features.14"),
        ("wrn_16_1:2", "features.6.conv2"),
    ],
)
def test_the_last_convolution_is_no_shortcut(arch, name):
    assert explain.last_convolution(build(arch)[0]) == name


def test_the_last_convolution_larger_than_1_x_1_or_an_error(network):
    assert explain.last_convolution(network) == "0"
    assert explain.last_convolution(nn.Sequential(nn.Conv2d(3, 3, (1, 3)))) == "0"
    with pytest.raises(ValueError, match=r"no nn\.Conv2d layer larger than 1 x 1"):
        explain.last_convolution(network[4:])


def test_grad_cam_by_hand():
    """Evidence for class 0 is 2 A_0 - A_1, for class 1 it is A_1: each where that is above 0, over its largest value."""
    images = torch.zeros(3, 2, 2, 2)
    images[:, 0] = torch.tensor([[0.4, 0.2], [0.1, 0.0]])
    images[:, 1] = torch.tensor([[0.0, 0.2], [0.4, 0.1]])
    images[2, :] = 0  # nothing there: no evidence, and no division by 0
    maps = explain.grad_cam(lamp((2.0, -1.0), (0.0, 1.0)), images, torch.tensor([0, 1, 0]), "0")
    assert torch.allclose(maps[0], torch.tensor([[1.0, 0.25], [0.0, 0.0]]), atol=1e-6)
    assert torch.allclose(maps[1], torch.tensor([[0.0, 0.5], [1.0, 0.25]]), atol=1e-6)
    assert (maps[2] == 0).all() and not maps.requires_grad


def test_grad_cam_is_stretched_to_the_image():
    conv = nn.Conv2d(1, 1, 2, stride=2, bias=False)
    conv.weight.data.fill_(0.25)
    model = nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 1, bias=False))
    model[3].weight.data.fill_(3.0)
    images = torch.zeros(1, 1, 4, 8)
    images[..., :2, :2] = 0.8  # the map is 2 x 4, and only its first value is above 0
    maps = explain.grad_cam(model, images, torch.tensor([0]), "0")
    rows, columns = torch.tensor([1.0, 0.75, 0.25, 0]), torch.tensor([1.0, 0.75, 0.25, 0, 0, 0, 0, 0])
    assert maps.shape == (1, 4, 8) and torch.allclose(maps[0], rows[:, None] * columns, atol=1e-6)


def test_grad_cam_stretches_what_is_left_after_evidence_against_the_class_is_cut():
    """The map is 1, -1: stretched first and cut then, the second and third column would be .5 and 0."""
    conv = nn.Conv2d(1, 1, (1, 2), stride=(1, 2), bias=False)
    conv.weight.data = torch.tensor([[[[1.0, -1.0]]]])
    model = nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 1, bias=False))
    model[3].weight.data.fill_(2.0)
    maps = explain.grad_cam(model, torch.tensor([[[[1.0, 0.0, 0.0, 1.0]]]]), torch.tensor([0]), "0")
    assert maps[0, 0].tolist() == pytest.approx([1.0, 0.75, 0.25, 0.0])


def test_grad_cam_leaves_the_model_as_it_was(network, images, untouched):
    network.train()
    network[0].weight.requires_grad_(False)
    network[7].weight.grad = torch.ones_like(network[7].weight)
    before = state(network)
    first, second = (explain.grad_cam(network, images, torch.zeros(36, dtype=torch.long), "4") for _ in range(2))
    assert torch.equal(first, second) and first.max() == 1  # no dropout in it
    assert network.training and same(before, state(network)) and not images.requires_grad
    assert not network[0].weight.requires_grad and network[4].weight.requires_grad
    assert (network[7].weight.grad == 1).all() and network[4].weight.grad is None
    with pytest.raises(ValueError, match="layer must be one of 0, .*got 'conv1'"):
        explain.grad_cam(network, images, torch.zeros(36, dtype=torch.long), "conv1")


def test_a_synthetic_trigger_paints_its_pattern_where_its_mask_is():
    mask = torch.tensor([[[[1.0, 0.0], [0.25, 0.0]]]])
    trigger = SyntheticTrigger(mask, torch.full((1, 3, 2, 2), 0.8))
    painted = trigger(torch.full((5, 3, 2, 2), 0.4))
    assert painted.shape == (5, 3, 2, 2)
    assert torch.allclose(painted[4, 2], torch.tensor([[0.8, 0.4], [0.5, 0.4]]))
    assert trigger.size == 1.25


def synthesis_by_hand(model, clean, target, config, generator):
    """The logits of mask and pattern after so many steps of Adam, and the batches."""
    size = clean.images.shape[2:]
    mask = (torch.randn(1, 1, *size, generator=generator) * 0.1 - 2).requires_grad_(True)
    pattern = (torch.randn(1, 3, *size, generator=generator) * 0.1).requires_grad_(True)
    picks = torch.randint(len(clean), (config.steps, min(config.batch_size, len(clean))), generator=generator)
    adam = torch.optim.Adam([mask, pattern], lr=config.lr)
    for batch in picks:
        m, p = 1 / (1 + (-mask).exp()), 1 / (1 + (-pattern).exp())
        logits = model(clean.images[batch] / 255 * (1 - m) + m * p)
        probability = logits.softmax(1)[:, target]
        adam.zero_grad()
        # |m|_1 counts pixels of an image of 32 x 32: 1024 times the mean
        (config.weight * 1024 * m.abs().mean() - probability.log().mean()).backward()
        adam.step()
    return mask.sigmoid(), pattern.sigmoid()


@pytest.mark.parametrize(
    "config",
    [
        SynthesisConfig(steps=4, batch_size=10, lr=0.5, weight=0.02),
        SynthesisConfig(steps=4, batch_size=500, weight=0.0),
    ],
)
@pytest.mark.parametrize("times", [1, 4, 8], ids=["8 x 8", "32 x 32", "64 x 64"])
def test_synthesis_by_hand(network, tiny, config, times):
    tiny = replace(tiny, images=tiny.images.repeat_interleave(times, 2).repeat_interleave(times, 3))
    network.eval()
    mask, pattern = synthesis_by_hand(network, tiny, 2, config, torch.Generator().manual_seed(0))
    network.train()
    trigger = explain.synthesize_trigger(network, tiny, 2, config, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(trigger.mask, mask, atol=1e-5) and torch.allclose(trigger.pattern, pattern, atol=1e-5)
    assert not trigger.mask.requires_grad and not trigger.pattern.requires_grad


def test_synthesis_finds_the_planted_pixel(generator):
    model, clean = planted(pixel=9), dark()
    assert (model(clean.floats()).argmax(1) == 0).all()
    trigger = explain.synthesize_trigger(model, clean, 1, SynthesisConfig(weight=0.1), generator=generator)
    mask = trigger.mask[0, 0]
    assert (model(trigger(clean.floats())).argmax(1) == 1).all()
    assert mask.argmax() == 9 and mask[1, 1] > 10 * mask.flatten().topk(2).values[1] and trigger.size < 1
    assert (trigger.pattern[0, :, 1, 1] > 0.8).all()


def test_a_dearer_mask_is_a_smaller_one():
    sizes = [
        explain.synthesize_trigger(
            planted(), dark(), 1, SynthesisConfig(weight=weight), generator=torch.Generator().manual_seed(0)
        ).size
        for weight in (0.0, 0.01, 0.1)
    ]
    assert sizes[0] > 1.2 * sizes[1] and sizes[1] > 1.1 * sizes[2]


def test_synthesis_leaves_the_model_as_it_was(network, tiny, generator, untouched):
    network.train()
    network[0].weight.requires_grad_(False)
    network[7].weight.grad = torch.ones_like(network[7].weight)
    before, steps = state(network), []
    config = SynthesisConfig(steps=3, batch_size=8)
    watch = lambda of: (steps.append(len(step)) or step for step in of)
    explain.synthesize_trigger(network, tiny, 1, config, generator=generator, watch=watch)
    assert network.training and same(before, state(network)) and steps == [8, 8, 8]
    wants = {name: parameter.requires_grad for name, parameter in network.named_parameters()}
    assert wants == {name: name != "0.weight" for name in wants}
    assert (network[7].weight.grad == 1).all() and network[4].weight.grad is None


def test_same_generator_same_trigger(network, tiny):
    config = SynthesisConfig(steps=3)
    run = lambda seed: explain.synthesize_trigger(
        network, tiny, 1, config, generator=torch.Generator().manual_seed(seed)
    )
    assert torch.equal(run(0).mask, run(0).mask) and torch.equal(run(0).pattern, run(0).pattern)
    assert not torch.equal(run(0).mask, run(1).mask) and not torch.equal(run(0).pattern, run(1).pattern)


def test_a_loss_that_is_no_number_is_an_error(network, tiny, generator):
    network.train()
    network[0].weight.data[0] = float("nan")
    with pytest.raises(FloatingPointError, match="loss became nan in the synthesis of a trigger"):
        explain.synthesize_trigger(network, tiny, 1, SynthesisConfig(steps=2), generator=generator)
    assert network.training and all(parameter.requires_grad for parameter in network.parameters())


def test_defaults_of_the_synthesis():
    config = SynthesisConfig()
    assert (config.steps, config.batch_size, config.lr, config.weight) == (100, 64, 0.1, 0.01)
    assert replace(config, weight=0.0).weight == 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "steps must be above 0, got 0"),
        ({"batch_size": -1}, "batch_size must be above 0, got -1"),
        ({"lr": 0.0}, "lr must be above 0, got 0.0"),
        ({"weight": -0.1}, "weight must not be negative, got -0.1"),
    ],
)
def test_values_out_of_range_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        SynthesisConfig(**values)


def test_values_by_poison_keep_epoch_image_and_flag_together():
    table = explain.by_poison(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), torch.tensor([False, True, False]))
    assert table.query("images == 'poisoned'")[["epoch", "value"]].to_numpy().tolist() == [[1, 2], [2, 5]]
    assert table.query("images == 'clean'")[["epoch", "value"]].to_numpy().tolist() == [[1, 1], [1, 3], [2, 4], [2, 6]]
