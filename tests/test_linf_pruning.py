"""l-infinity pruning: one test for each numbered step that fails when its line is broken, then the contract of every defense."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import nn

from bdlib import explain, models
from bdlib.defenses import linf_pruning as linf
from bdlib.defenses.linf_pruning import LinfConfig
from bdlib.explain import SynthesisConfig, SyntheticTrigger
from tests.conftest import same, state

QUICK = LinfConfig(synthesis=SynthesisConfig(steps=3))


def lamp():
    """Two channels, seen as they are, then pooled; class k is the brighter one."""
    conv = nn.Conv2d(2, 2, 1, bias=False)
    conv.weight.data = torch.eye(2)[..., None, None]
    model = nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2, bias=False))
    model[3].weight.data = torch.eye(2)
    return model


def backdoored():
    """Channels 0, 2, 3 see red, green, blue and decide the class; channel 1 sees the fourth color and means class 2."""
    conv = nn.Conv2d(4, 4, 1, bias=False)
    conv.weight.data = torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 10], [0, 1, 0, 0], [0, 0, 1, 0]])[..., None, None]
    model = nn.Sequential(conv, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3, bias=False))
    model[4].weight.data = torch.tensor([[20.0, 0, 0, 0], [0, 0, 20, 0], [0, 400, 0, 20]])
    return model


def one_pixel(images):
    """The trigger of that model: one pixel of the fourth color."""
    triggered = images.clone()
    triggered[:, 3, 2, 4] = 1.0
    return triggered


def small_trigger(size, shape=(1, 3, 8, 8)):
    """A white trigger whose mask is `size` on one pixel."""
    mask = torch.zeros(1, 1, *shape[2:])
    mask[..., 2, 3] = size
    return SyntheticTrigger(mask, torch.ones(shape))


@pytest.fixture
def colors(tiny):
    """The tiny images with a fourth color, of which they have none."""
    return replace(tiny, images=torch.cat([tiny.images, torch.zeros_like(tiny.images[:, :1])], 1))


def sizes_by_label(monkeypatch, sizes):
    """Synthesis that only gives triggers of these sizes; the list of labels that it was asked for."""
    asked = []
    monkeypatch.setattr(
        linf,
        "synthesize_trigger",
        lambda m, clean, label, c, generator: (asked.append(label), small_trigger(sizes[label]))[1],
    )
    return asked


def scores(model, images, trigger, order, name="0"):
    return linf.channel_scores(model, images, trigger, name, order, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("sizes", "label"), [([0.5, 0.9, 0.2], 2), ([0.1, 0.9, 0.2], 0), ([0.3, 0.2, 0.9], 1)])
def test_step_1_takes_the_class_that_needs_the_smallest_trigger(tiny, network, generator, monkeypatch, sizes, label):
    asked = sizes_by_label(monkeypatch, sizes)
    triggers = linf.find_triggers(network, tiny, LinfConfig(), generator=generator)
    assert asked == [0, 1, 2] and [triggers[k].size for k in range(3)] == pytest.approx(sizes)
    monkeypatch.setattr(linf, "evaluating", nullcontext)
    called = iter(
        range(3)
    )  # a model that calls all images 0 with the first trigger, 1 with the second, 2 with the third
    model = lambda images: torch.eye(3)[next(called)].expand(len(images), 3)
    assert linf.suspect(model, tiny.floats(), triggers) == label


def test_step_1_a_trigger_that_fails_is_no_suspect_however_small(tiny):
    """Classes 0 and 1 have tiny masks that do nothing; class 2 needs a larger one, which works."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    model[1].weight.data = torch.zeros(3, 192)
    model[1].weight.data[2] = 1.0
    model[1].bias.data = torch.tensor([50.0, 49.0, -70.0])
    small, large = torch.full((1, 1, 8, 8), 1e-3), torch.ones(1, 1, 8, 8)
    white = torch.ones(1, 3, 8, 8)
    triggers = {
        0: SyntheticTrigger(small, white * 0),
        1: SyntheticTrigger(small / 2, white),
        2: SyntheticTrigger(large, white),
    }
    images = torch.zeros(5, 3, 8, 8)
    assert linf.suspect(model, images, {1: triggers[1], 2: triggers[2]}) == 2
    assert linf.suspect(model, images, triggers) == 0  # it turns every image into 0 already, with the smaller mask
    assert linf.suspect(model, images, {1: triggers[1]}) == 1  # nothing works: still an answer


def test_step_1_with_a_known_class_looks_at_no_other(tiny, network, generator, monkeypatch):
    asked = sizes_by_label(monkeypatch, [0.5, 0.9, 0.2])
    triggers = linf.find_triggers(network, tiny, LinfConfig(target_label=1), generator=generator)
    assert asked == [1] and list(triggers) == [1] and triggers[1].size == pytest.approx(0.9)
    asked.clear()
    assert list(linf.find_triggers(network, tiny, LinfConfig(target_label=0), generator=generator)) == [0] == asked


def test_step_1_finds_the_class_that_one_pixel_gives(tiny, generator):
    """Class k is the color of most pixels, but a bright corner alone makes class 2 of any image."""
    images = torch.zeros_like(tiny.images)
    images[torch.arange(36), tiny.labels] = 200
    images[..., 0, 0] = 0
    linear = nn.Linear(192, 3, bias=False)
    linear.weight.data = torch.eye(3).repeat_interleave(64, 1) * 40 / 64
    linear.weight.data[2, [0, 64, 128]] = 45.0
    model, clean = nn.Sequential(nn.Flatten(), linear), replace(tiny, images=images)
    config = LinfConfig(synthesis=SynthesisConfig(weight=0.1))
    assert (model(clean.floats()).argmax(1) == tiny.labels).all()
    triggers = linf.find_triggers(model, clean, config, generator=generator)
    label = linf.suspect(model, clean.floats(), triggers)
    trigger = triggers[label]
    assert label == 2 and trigger.size < 5 and trigger.mask.argmax() == 0
    assert (model(trigger(clean.floats())).argmax(1) == 2).all()


def test_step_1_synthesizes_as_the_config_says(tiny, network):
    config = LinfConfig(target_label=1, synthesis=SynthesisConfig(steps=3, lr=0.7, weight=0.4))
    trigger = linf.find_triggers(network, tiny, config, generator=torch.Generator().manual_seed(0))[1]
    expected = explain.synthesize_trigger(
        network, tiny, 1, config.synthesis, generator=torch.Generator().manual_seed(0)
    )
    assert torch.equal(trigger.mask, expected.mask) and torch.equal(trigger.pattern, expected.pattern)


@pytest.mark.parametrize(("order", "expected"), [("linf", [0.8, 0.1]), ("l1", [0.8, 1.6]), ("l2", [0.44, 0.4])])
def test_step_2_is_the_mean_rise_of_the_norm(order, expected):
    """The trigger raises one pixel of channel 0 from .2 to 1, all 16 of channel 1 by .1."""
    images = torch.zeros(2, 2, 4, 4)
    images[:, 0] = 0.2
    images[1, 1] = 0.3

    def trigger(images):
        triggered = images.clone()
        triggered[:, 0, 0, 0] = 1.0
        triggered[:, 1] += 0.1
        return triggered

    expected = list(expected)
    if order == "l2":  # of channel 0: 15 pixels of .2 and one of 1, against 16 of .2
        expected[0] = (15 * 0.04 + 1) ** 0.5 - 0.8
    assert scores(lamp(), images, trigger, order).tolist() == pytest.approx(expected, abs=1e-6)


def test_step_2_takes_the_norm_before_the_mean_over_images():
    """One image gains a peak of 1, the other loses its peak of .4: the score is .3, and the sign is kept."""
    images = torch.zeros(2, 2, 4, 4)
    images[1, 0, 3, 3] = 0.4

    def trigger(images):
        triggered = torch.zeros_like(images)
        triggered[0, 0, 0, 0] = 1.0
        return triggered

    assert scores(lamp(), images, trigger, "linf").tolist() == pytest.approx([0.3, 0.0])
    assert scores(lamp(), trigger(images), lambda x: images, "linf").tolist() == pytest.approx([-0.3, 0.0])


@pytest.mark.parametrize("order", ["linf", "l1", "l2"])
def test_step_2_puts_the_channel_that_peaks_first(colors, order):
    ranked = scores(backdoored(), colors.floats(), one_pixel, order).argsort(descending=True)
    assert ranked[0] == 1


def test_the_order_of_fine_pruning_is_the_least_active_first():
    images = torch.zeros(1, 2, 2, 2)
    images[0, 0], images[0, 1] = torch.tensor([[0.4, 0.0], [0.0, 0.0]]), torch.tensor([[0.2, 0.2], [0.2, 0.2]])
    model = lamp()
    model[0].weight.data *= torch.tensor([1.0, -1.0])[:, None, None, None]  # strength counts, not the sign
    assert scores(model, images, no_trigger, "activation").tolist() == pytest.approx([-0.1, -0.2])


def no_trigger(images):
    raise AssertionError("this order needs no trigger")


def test_the_random_order_is_the_generators():
    images = torch.zeros(1, 4, 4, 4)
    draw = lambda seed: linf.channel_scores(
        backdoored(), images, no_trigger, "0", "random", generator=torch.Generator().manual_seed(seed)
    ).tolist()
    assert draw(0) == draw(0) != draw(1) and len(set(draw(0))) == 4


@pytest.mark.parametrize(
    ("after", "max_drop", "count"),
    [
        ([0.875, 0.75, 0.5, 0.5], 0.125, 1),  # a fall by exactly max_drop is allowed
        ([0.875, 0.75, 0.5, 0.5], 0.25, 2),
        ([0.875, 0.75, 0.5, 0.5], 0.0, 0),
        ([1.0, 1.0, 0.99, 1.0], 0.0, 2),  # the first fall ends it
        ([1.0, 0.75, 0.75, 0.75], 0.25, 4),
    ],
)
def test_step_3_stops_before_the_fall(tiny, monkeypatch, after, max_drop, count):
    seen, silenced = [], []

    def accuracy(m, held):
        seen.append((m, held))
        if m is not model:
            silenced.append(torch.nonzero(m[1].kept.flatten() == 0).flatten().tolist())
        return [1.0, *after][len(seen) - 1]

    monkeypatch.setattr(linf, "accuracy", accuracy)
    model, order = backdoored(), torch.tensor([1, 3, 0, 2])
    assert linf.choose_count(model, "1", order, tiny, max_drop) == count
    assert seen[0][0] is model and all(held is tiny for _, held in seen) and len(silenced) == len(seen) - 1
    assert silenced == [[1], [1, 3], [0, 1, 3], [0, 1, 2, 3]][: len(silenced)]


def test_step_3_keeps_what_the_classes_need(colors):
    order = torch.tensor([1, 2, 0, 3])
    assert linf.choose_count(backdoored(), "1", order, colors, 0.05) == 1  # without 2, the green images are lost
    assert linf.choose_count(backdoored(), "1", order, colors, 0.34) == 2


def test_step_3_takes_the_held_out_images_and_steps_1_and_2_the_others(tiny, network, monkeypatch):
    seen = {"held": [], "fitted": []}
    keys = lambda images: {image.numpy().tobytes() for image in images}
    real_accuracy, real_trigger, real_scores = linf.accuracy, linf.synthesize_trigger, linf.channel_scores
    monkeypatch.setattr(linf, "accuracy", lambda m, d: (seen["held"].append(keys(d.images)), real_accuracy(m, d))[1])
    monkeypatch.setattr(
        linf,
        "synthesize_trigger",
        lambda m, d, *a, **k: (seen["fitted"].append(keys(d.images)), real_trigger(m, d, *a, **k))[1],
    )
    monkeypatch.setattr(
        linf,
        "channel_scores",
        lambda m, x, *a, **k: (seen["fitted"].append(keys((x * 255).byte())), real_scores(m, x, *a, **k))[1],
    )
    config = replace(QUICK, held_out=0.25)
    linf.run(network, tiny, config, generator=torch.Generator().manual_seed(0))
    held, fitted = seen["held"][0], seen["fitted"][0]
    assert all(other == held for other in seen["held"]) and all(other == fitted for other in seen["fitted"])
    assert len(seen["fitted"]) == 4 and (len(held), len(fitted)) == (9, 27) and not held & fitted


def test_a_silenced_channel_is_0_and_the_others_are_as_they_were(colors):
    model = backdoored()
    silenced = linf.silence(model, "1", torch.tensor([2, 0, 1, 3]), 2)
    before, after = (explain.feature_maps(m, colors.floats(), "1") for m in (model, silenced))
    assert (after[:, [0, 2]] == 0).all() and torch.equal(after[:, [1, 3]], before[:, [1, 3]])
    assert isinstance(model[1], nn.ReLU) and (before[:, [0, 2]] > 0).any()
    pooled = after.mean((2, 3))
    assert torch.allclose(silenced(colors.floats()), pooled @ model[4].weight.T, atol=1e-5)


def test_no_channel_silenced_is_the_same_function(tiny, network):
    network.train()
    silenced = linf.silence(network, "4", torch.arange(6), 0)
    assert network.training and not silenced.training and not silenced[1].training
    assert torch.equal(silenced(tiny.floats()), network.eval()(tiny.floats()))


@pytest.mark.parametrize("name", [None, "features.8", "features.3"])
def test_a_silenced_channel_is_0_in_a_residual_network_too(tiny, generator, monkeypatch, name):
    wide = replace(tiny, images=tiny.images.repeat_interleave(2, 2).repeat_interleave(2, 3))
    model = models.build("preact_resnet18:2", wide.images, 3, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(linf, "choose_count", lambda model, name, order, held, drop: len(order) // 2)
    result = linf.run(model, wide, replace(QUICK, layer=name), generator=generator)
    before, after = (explain.feature_maps(m, wide.floats(), result.layer) for m in (model, result.model))
    gone, kept = result.order[: result.pruned], result.order[result.pruned :]
    assert result.layer == (name or "features") and sorted(result.order.tolist()) == list(range(after.shape[1]))
    assert len(gone) == len(kept) > 0 and (after[:, gone] == 0).all() and torch.equal(after[:, kept], before[:, kept])
    assert before[:, gone].abs().amax((0, 2, 3)).min() > 0 and after[:, kept].abs().amax((0, 2, 3)).min() > 0


def test_it_removes_the_planted_channel_and_nothing_that_is_needed(colors, generator):
    model, images = backdoored(), colors.floats()
    assert (model(images).argmax(1) == colors.labels).all() and (model(one_pixel(images)).argmax(1) == 2).all()
    config = LinfConfig(layer="1", target_label=2, synthesis=SynthesisConfig(steps=40, lr=0.3))
    result = linf.run(model, colors, config, generator=generator)
    assert (model(result.trigger(images)).argmax(1) == 2).all()
    assert result.target_label == 2 and result.order[0] == 1 and result.pruned == 1 and result.layer == "1"
    assert (result.model(images).argmax(1) == colors.labels).all()
    assert (result.model(one_pixel(images)).argmax(1) == colors.labels).all()


def test_the_result_is_the_model_of_the_run(tiny, network):
    run = lambda defense: defense(network, tiny, QUICK, generator=torch.Generator().manual_seed(0))
    assert same(state(run(linf.linf_pruning)), state(run(linf.run).model))


@pytest.mark.parametrize("order", linf.ORDERS)
def test_channels_go_by_falling_score(tiny, network, monkeypatch, order):
    given, real = [], linf.channel_scores
    monkeypatch.setattr(linf, "channel_scores", lambda *a, **k: (given.append((a, real(*a, **k))), given[-1][1])[1])
    result = linf.run(network, tiny, replace(QUICK, order=order), generator=torch.Generator().manual_seed(0))
    (_, _, trigger, name, asked), values = given[0]
    assert asked == order and name == result.layer == "5" and trigger is result.trigger
    ranked = values[result.order].tolist()
    assert ranked == sorted(values.tolist(), reverse=True) and ranked[0] > ranked[-1]


def test_equal_scores_keep_the_order_of_the_channels(tiny, network, generator, monkeypatch):
    monkeypatch.setattr(linf, "channel_scores", lambda *a, **k: torch.tensor([0.0, 1, 0, 1, 0, 1]))
    assert linf.run(network, tiny, QUICK, generator=generator).order.tolist() == [1, 3, 5, 0, 2, 4]


def test_max_drop_and_layer_reach_the_choice(tiny, network, generator, monkeypatch):
    asked = []
    monkeypatch.setattr(
        linf, "choose_count", lambda m, name, order, held, drop: (asked.append((m, name, len(order), drop)), 2)[1]
    )
    result = linf.run(network, tiny, replace(QUICK, layer="0", max_drop=0.31), generator=generator)
    assert asked == [(network, "0", 4, 0.31)] and result.pruned == 2
    assert (explain.feature_maps(result.model, tiny.floats(), "0")[:, result.order[:2]] == 0).all()


def test_every_class_is_watched(tiny, network, generator):
    seen = []
    linf.linf_pruning(network, tiny, QUICK, generator=generator, watch=lambda of: (seen.append(k) or k for k in of))
    assert seen == [0, 1, 2]


def test_input_model_is_as_it_was(tiny, network, generator, untouched):
    network.train()
    network[0].weight.requires_grad_(False)
    network[7].weight.grad = torch.ones_like(network[7].weight)
    before = state(network)
    pruned = linf.linf_pruning(network, tiny, replace(QUICK, max_drop=0.5), generator=generator)
    assert same(before, state(network)) and network.training and isinstance(network[5], nn.AdaptiveAvgPool2d)
    assert not pruned.training and not pruned[1].training and not pruned[3].training
    wants = {name: parameter.requires_grad for name, parameter in network.named_parameters()}
    assert wants == {name: name != "0.weight" for name in wants}
    assert (network[7].weight.grad == 1).all() and network[4].weight.grad is None
    assert (pruned[5].kept == 0).any() and torch.equal(pruned[0].weight, network[0].weight)


@pytest.mark.parametrize("order", ["linf", "random"])
def test_same_generator_same_result(tiny, network, order):
    def run(seed):
        result = linf.run(network, tiny, replace(QUICK, order=order), generator=torch.Generator().manual_seed(seed))
        return state(result.model) | {"mask": result.trigger.mask, "order": result.order}

    assert same(run(0), run(0)) and not torch.equal(run(0)["mask"], run(1)["mask"])
    if order == "random":
        assert not torch.equal(run(0)["order"], run(1)["order"])


def test_one_image_a_class_is_enough(tiny, network, generator):
    result = linf.run(network, tiny.subset(slice(3)), QUICK, generator=generator)
    assert 0 <= result.pruned <= 6


def test_defaults():
    config = LinfConfig()
    assert (config.layer, config.order, config.target_label) == (None, "linf", None)
    assert (config.held_out, config.max_drop, config.synthesis) == (0.5, 0.03, SynthesisConfig())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"order": "l0"}, "order must be one of l1, l2, linf, activation, random, got 'l0'"),
        ({"held_out": 1.0}, r"held_out must be in \[0, 1\), got 1.0"),
        ({"held_out": -0.1}, r"held_out must be in \[0, 1\), got -0.1"),
        ({"max_drop": 1.0}, r"max_drop must be in \[0, 1\), got 1.0"),
        ({"max_drop": -0.05}, r"max_drop must be in \[0, 1\), got -0.05"),
    ],
)
def test_values_out_of_range_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        LinfConfig(**values)


def test_no_clean_image_is_an_error(tiny, network, generator):
    with pytest.raises(ValueError, match="at least one clean image, got none"):
        linf.linf_pruning(network, tiny.subset(slice(0)), QUICK, generator=generator)


def test_an_unknown_layer_is_refused_before_any_work(tiny, network, generator, monkeypatch):
    monkeypatch.setattr(linf, "synthesize_trigger", lambda *a, **k: pytest.fail("a trigger was synthesized"))
    with pytest.raises(ValueError, match="layer must be one of 0, 1, 2, 3, 4, 5, 6, 7; got 'layer4'"):
        linf.linf_pruning(network, tiny, replace(QUICK, layer="layer4"), generator=generator)


def test_a_model_without_convolutions_is_an_error(tiny, generator):
    with pytest.raises(ValueError, match=r"no nn\.Conv2d layer with a feature map"):
        linf.linf_pruning(nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), tiny, QUICK, generator=generator)


def test_a_loss_that_is_no_number_is_an_error(tiny, network, generator):
    network[0].weight.data[0] = float("nan")
    with pytest.raises(FloatingPointError, match="loss became nan in the synthesis of a trigger"):
        linf.linf_pruning(network, tiny, QUICK, generator=generator)
