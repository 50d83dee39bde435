"""RNP: one test for each numbered step that fails when its line is broken, then the contract of every defense."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bdlib import selection, train
from bdlib.defenses import rnp
from bdlib.defenses.rnp import RnpConfig
from tests.conftest import same, state

# A network of three classes that forgot them calls everything one class: a third is right.
QUICK = RnpConfig(batch_size=10, unlearn_lr=0.2, accuracy_floor=0.4, recover_epochs=3)
GRADUAL = replace(QUICK, batch_size=6, unlearn_lr=0.02)


@pytest.fixture
def plain(tiny):
    """The images without crops and flips, so that a batch of all of them can be worked out by hand."""
    return replace(tiny, crop_padding=0, flip=False)


@pytest.fixture
def trained(network, tiny):
    """The network, without dropout, with batch-norm scales of every size and sign, trained to tell the classes apart."""
    network[1].weight.data = torch.tensor([0.5, 1.0, -1.5, 2.0])
    network[1].bias.data = torch.tensor([0.1, -0.2, 0.3, -0.4])
    network[3].p = 0.0
    config = train.TrainConfig(epochs=6, batch_size=12, lr=0.1)
    return train.fit(network, tiny, config, generator=torch.Generator().manual_seed(0))


def accuracy_by_hand(model, dataset):
    with torch.no_grad():
        return (copy.deepcopy(model).eval()(dataset.floats()).argmax(1) == dataset.labels).float().mean().item()


def accuracy_of_one_batch(model, dataset):
    """With the batch-norm statistics of the images themselves."""
    with torch.no_grad():
        return (copy.deepcopy(model).train()(dataset.floats()).argmax(1) == dataset.labels).double().mean().item()


def statistics_by_hand(model, batches):
    """Mean and unbiased variance of what the batch norm sees, averaged over the batches."""
    with torch.no_grad():
        seen = [model[0](images).transpose(0, 1).flatten(1) for images in batches]
    return torch.stack([each.mean(1) for each in seen]).mean(0), torch.stack([each.var(1) for each in seen]).mean(0)


def recorded_unlearning(monkeypatch, model, clean, config):
    """The unlearned network and copies of the network after every step."""
    copies = []
    step = rnp.unlearn_step

    def spy(unlearned, *rest):
        loss = step(unlearned, *rest)
        copies.append(copy.deepcopy(unlearned))
        return loss

    monkeypatch.setattr(rnp, "unlearn_step", spy)
    return rnp.unlearn(model, clean, config, generator=torch.Generator().manual_seed(0)), copies


@pytest.mark.parametrize("limit", [None, 0.01, 1e6])
def test_step_1_goes_uphill_in_training_mode_no_further_than_the_limit(trained, plain, limit):
    images, labels = plain.floats(), plain.labels
    start = copy.deepcopy(trained).train()
    loss = F.cross_entropy(start(images), labels)
    gradients = torch.autograd.grad(loss, list(start.parameters()))
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm().item()
    assert norm > 0.02
    factor = 0.01 / norm if limit == 0.01 else 1.0
    trained[1].weight.grad = torch.full((4,), 9.0)  # what is left from before does not count
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.3)
    returned = rnp.unlearn_step(trained, optimizer, images, labels, RnpConfig(clip_gradient=limit))
    assert returned.item() == pytest.approx(loss.item()) and not returned.requires_grad and trained.training
    for after, before, gradient in zip(trained.parameters(), start.parameters(), gradients, strict=True):
        assert torch.allclose(after - before, 0.3 * factor * gradient, rtol=1e-3, atol=1e-7)
    assert torch.allclose(trained[1].running_mean, start[1].running_mean)


def test_step_1_by_hand_with_momentum_decay_and_milestones(trained, plain, generator):
    config = RnpConfig(
        batch_size=36,
        unlearn_lr=0.3,
        milestones=(3,),
        momentum=0.8,
        weight_decay=0.1,
        max_unlearn_epochs=60,
        accuracy_floor=0.4,
    )
    model = copy.deepcopy(trained)
    weights = list(model.parameters())
    velocity = [torch.zeros_like(weight) for weight in weights]
    steps = 0
    while accuracy_of_one_batch(model, plain) > 0.4 and steps < 60:
        model.train()
        gradients = torch.autograd.grad(F.cross_entropy(model(plain.floats()), plain.labels), weights)
        rate = 0.3 if steps < 3 else 0.03
        for weight, speed, gradient in zip(weights, velocity, gradients, strict=True):
            speed.mul_(0.8).add_(0.1 * weight.detach() - gradient)
            weight.data -= rate * speed
        steps += 1
    assert 4 < steps < 60
    unlearned = rnp.unlearn(trained, plain, config, generator=generator)
    for (name, after), before in zip(unlearned.named_parameters(), weights, strict=True):
        assert torch.allclose(after, before, rtol=1e-3, atol=1e-4), name


def test_step_1_hands_on_the_very_network_that_passed_the_floor(trained, tiny, monkeypatch):
    unlearned, copies = recorded_unlearning(monkeypatch, trained, tiny, GRADUAL)
    reached = [accuracy_of_one_batch(each, tiny) for each in copies]
    assert all(value > 0.4 for value in reached[:-1]) and reached[-1] <= 0.4
    assert len(copies) > 6 and len(copies) % 6, len(copies)  # within an epoch, not at its end
    for after, before in zip(unlearned.parameters(), copies[-1].parameters(), strict=True):
        assert torch.equal(after, before)
    mean, variance = statistics_by_hand(unlearned, tiny.floats().split(6))
    assert torch.allclose(unlearned[1].running_mean, mean, atol=1e-5) and not unlearned.training
    assert torch.allclose(unlearned[1].running_var, variance, atol=1e-5)


def test_step_1_stops_at_the_floor_itself(trained, tiny, monkeypatch):
    _, copies = recorded_unlearning(monkeypatch, trained, tiny, GRADUAL)
    floor = accuracy_of_one_batch(copies[-1], tiny)
    monkeypatch.undo()
    _, again = recorded_unlearning(monkeypatch, trained, tiny, replace(GRADUAL, accuracy_floor=floor))
    assert len(again) == len(copies)


def test_the_accuracy_of_a_step_is_of_one_batch_and_leaves_the_statistics(trained, tiny):
    trained.train()
    trained[1].running_mean += 5.0  # which would turn the answers
    wrong = replace(tiny, labels=torch.where(torch.arange(36) < 9, (tiny.labels + 1) % 3, tiny.labels))
    before = state(trained)
    reached = rnp.accuracy_now(trained, wrong.floats(), wrong.labels)
    assert reached == accuracy_of_one_batch(trained, wrong) == 0.75 != accuracy_by_hand(trained, wrong)
    assert same(before, state(trained))


@pytest.mark.parametrize(("level", "moved"), [("neuron", {"0", "1", "4", "7"}), ("filter", {"1"})])
def test_step_1_moves_all_weights_or_the_scales_alone(trained, tiny, generator, level, moved):
    trained.requires_grad_(False)
    config = replace(QUICK, unlearn_level=level, unlearn_lr=0.1 if level == "neuron" else 1.0)
    unlearned = rnp.unlearn(trained, tiny, config, generator=generator)
    changed = {
        name
        for (name, before), after in zip(trained.named_parameters(), unlearned.parameters(), strict=True)
        if not torch.equal(before, after)
    }
    assert {name.split(".")[0] for name in changed} == moved
    if level == "filter":
        assert changed == {"1.weight"}


def test_a_floor_never_reached_is_an_error_that_says_how_far_it_came(trained, tiny, generator):
    tiny = replace(tiny, labels=torch.where(torch.arange(36) < 9, (tiny.labels + 1) % 3, tiny.labels))
    reached = accuracy_of_one_batch(trained, tiny)
    assert 0.5 < reached < 0.9
    # With such a rate the weights stay.
    config = replace(QUICK, batch_size=16, unlearn_lr=1e-9, max_unlearn_epochs=2, accuracy_floor=0.15)
    message = rf"clean accuracy of {reached:.3f} in 2 epochs of 3 steps, not the floor of 0\.15"
    epochs = []
    with pytest.raises(selection.NoResult, match=message):
        rnp.unlearn(trained, tiny, config, generator=generator, watch=lambda each: (epochs.extend(each), each)[1])
    assert epochs == [0, 1]


@pytest.mark.parametrize("limit", [None, 0.2])
def test_step_2_by_hand_the_masks_alone_go_downhill_and_are_clipped(trained, plain, generator, limit):
    config = RnpConfig(
        batch_size=36, recover_epochs=4, recover_lr=2.0, momentum=0.7, loss_weight=0.3, clip_gradient=limit
    )
    trained[4].weight.data[:3] *= -1.0  # a network that forgot half of its task
    unlearned = copy.deepcopy(trained)
    scale = trained[1].weight.detach().clone()
    mask, velocity, unclipped, norms = torch.ones(4), torch.zeros(4), [], []
    model = copy.deepcopy(trained).train()
    for _ in range(4):
        model[1].weight.data = mask * scale
        gradient = torch.autograd.grad(0.3 * F.cross_entropy(model(plain.floats()), plain.labels), model[1].weight)[0]
        slope = gradient * scale
        norms.append(slope.norm().item())
        velocity = 0.7 * velocity + (slope * 0.2 / norms[-1] if limit and norms[-1] > limit else slope)
        unclipped.append(mask - 2.0 * velocity)
        mask = unclipped[-1].clamp(0, 1)
    masks = rnp.recover(unlearned, plain, config, generator=generator)
    assert list(masks) == ["1.weight"] and torch.allclose(masks["1.weight"], mask, atol=1e-4)
    assert max(norms) > 0.2
    assert torch.stack(unclipped).min() < 0 and torch.stack(unclipped).max() > 1 and ((mask > 0) & (mask < 1)).any()
    assert not masks["1.weight"].requires_grad


def test_step_2_leaves_the_unlearned_network_as_it_was(trained, tiny, generator):
    trained.eval()
    before = state(trained)
    rnp.recover(trained, tiny, QUICK, generator=generator)
    assert same(before, state(trained)) and not trained.training
    assert all(weight.requires_grad for weight in trained.parameters())


def test_step_2_on_convolution_weights(trained, tiny, generator):
    trained[7].weight.data *= -1.0
    config = replace(QUICK, recover_level="neuron", recover_lr=1.0)
    masks = rnp.recover(trained, tiny, config, generator=generator)
    shapes = {name: tuple(mask.shape) for name, mask in masks.items()}
    assert shapes == {"0.weight": (4, 3, 3, 3), "4.weight": (6, 4, 1, 1)}
    assert all(0 <= mask.min() < 1 and mask.max() <= 1 for mask in masks.values())


@pytest.mark.parametrize(
    ("threshold", "kept"), [(0.0, [0, 1, 1, 1]), (0.25, [0, 0, 1, 1]), (0.9, [0, 0, 0, 1]), (1.0, [0, 0, 0, 0])]
)
def test_step_3_zeroes_scales_up_to_the_threshold_and_no_shifts(trained, threshold, kept):
    trained.train()
    before = state(trained)
    masks = {"1.weight": torch.tensor([0.0, 0.25, 0.5, 1.0])}
    pruned = rnp.prune(trained, masks, threshold)
    after = state(pruned)
    assert torch.equal(after.pop("1.weight"), before["1.weight"] * torch.tensor(kept))
    assert same(after, {name: value for name, value in before.items() if name != "1.weight"})
    assert (before["1.bias"] != 0).all() and not pruned.training
    assert same(before, state(trained)) and trained.training


def test_the_masks_come_from_the_unlearned_network_and_prune_the_original(trained, tiny, generator, monkeypatch):
    recovered = []
    recover = rnp.recover
    monkeypatch.setattr(rnp, "recover", lambda model, *a, **k: (recovered.append(model), recover(model, *a, **k))[1])
    result = rnp.run(trained, tiny, replace(QUICK, thresholds=(0.3, 0.6, 0.97), max_drop=0.9), generator=generator)
    assert recovered == [result.unlearned] and not torch.equal(result.unlearned[0].weight, trained[0].weight)
    assert (result.masks["1.weight"] <= result.threshold).any()
    expected = state(trained)
    expected["1.weight"] = torch.where(result.masks["1.weight"] <= result.threshold, 0.0, expected["1.weight"])
    assert same(state(result.model), expected)


def test_fitting_and_choosing_use_different_images_and_the_original_chooses(trained, tiny, generator, monkeypatch):
    used = {}
    for name, position in (("unlearn", 1), ("recover", 1), ("choose_threshold", 2)):
        function = getattr(rnp, name)
        spy = lambda *a, f=function, n=name, p=position, **k: (used.update({n: a[p], n + " with": a[0]}), f(*a, **k))[1]
        monkeypatch.setattr(rnp, name, spy)
    rnp.run(trained, tiny, replace(QUICK, held_out=0.25, max_drop=0.9), generator=generator)
    assert used.pop("choose_threshold with") is trained is used.pop("unlearn with") is not used.pop("recover with")
    pictures = {name: {image.numpy().tobytes() for image in each.images} for name, each in used.items()}
    assert pictures["unlearn"] == pictures["recover"] and len(pictures["unlearn"]) == 27
    assert len(pictures["choose_threshold"] - pictures["unlearn"]) == 9


@pytest.mark.parametrize(
    ("accuracies", "expected"),
    [
        ({0.1: 1.0, 0.2: 0.75, 0.3: 0.7, 0.4: 1.0}, 0.2),  # a loss of just max_drop is allowed; after .3 no more
        ({0.1: 0.9, 0.2: 1.0, 0.3: 0.8, 0.4: 0.76}, 0.4),
        ({0.1: 0.8, 0.2: 0.5, 0.3: 0.1, 0.4: 0.8}, 0.1),
    ],
)
def test_the_threshold_is_the_last_before_the_first_large_drop(tiny, monkeypatch, accuracies, expected):
    measured = []
    monkeypatch.setattr(rnp, "prune", lambda model, masks, threshold: threshold)
    monkeypatch.setattr(
        selection, "accuracy", lambda model, held: (measured.append(held), {"original": 1.0, **accuracies}[model])[1]
    )
    config = RnpConfig(max_drop=0.25, thresholds=(0.3, 0.1, 0.4, 0.2))
    assert rnp.choose_threshold("original", {}, tiny, config) == expected
    assert all(held is tiny for held in measured)


def test_the_threshold_by_hand(trained, tiny):
    masks = {"1.weight": torch.tensor([0.1, 0.4, 0.6, 0.8])}
    original, scale = accuracy_by_hand(trained, tiny), trained[1].weight.detach().clone()
    drops = {}
    for threshold, count in ((0.05, 0), (0.2, 1), (0.5, 2), (0.7, 3), (0.9, 4)):
        pruned = copy.deepcopy(trained)
        pruned[1].weight.data = torch.cat([torch.zeros(count), scale[count:]])
        drops[threshold] = original - accuracy_by_hand(pruned, tiny)
    assert drops[0.9] > 0.5 and drops[0.05] == 0
    first_large = next(threshold for threshold, drop in drops.items() if drop > 0.3)
    expected = max(threshold for threshold in drops if threshold < first_large)
    config = RnpConfig(max_drop=0.3, thresholds=tuple(drops))
    assert rnp.choose_threshold(trained, masks, tiny, config) == expected


def test_a_smallest_threshold_that_costs_too_much_is_an_error(trained, tiny):
    masks = {"1.weight": torch.zeros(4)}
    with pytest.raises(selection.NoResult, match=r"smallest threshold, 0\.1, costs more than 0\.05 of clean accuracy"):
        rnp.choose_threshold(trained, masks, tiny, RnpConfig(thresholds=(0.2, 0.1)))


def test_input_model_and_images_are_as_they_were(trained, tiny, generator, untouched):
    trained.train()
    trained[0].weight.requires_grad_(False)
    trained[7].weight.grad = torch.ones_like(trained[7].weight)
    before, images = state(trained), tiny.sha256()
    result = rnp.rnp(trained, tiny, replace(QUICK, max_drop=0.9), generator=generator)
    assert same(before, state(trained)) and trained.training and not result.training and tiny.sha256() == images
    assert not trained[0].weight.requires_grad and trained[4].weight.requires_grad
    assert (trained[7].weight.grad == 1).all() and trained[4].weight.grad is not None
    assert not result[0].weight.requires_grad and result[4].weight.requires_grad


def test_same_generator_same_weights(trained, tiny, untouched):
    trained[3].p = 0.2

    def once(seed):
        result = rnp.run(trained, tiny, replace(QUICK, max_drop=0.9), generator=torch.Generator().manual_seed(seed))
        return state(result.unlearned) | result.masks

    assert same(once(0), once(0)) and not same(once(0), once(1))


def test_defaults_are_the_official_codes():
    config = RnpConfig()
    assert (config.batch_size, config.unlearn_lr, config.milestones, config.max_unlearn_epochs) == (
        128,
        0.01,
        (10, 20),
        21,
    )
    assert (config.accuracy_floor, config.momentum, config.weight_decay) == (0.2, 0.9, 5e-4)
    assert (config.recover_epochs, config.recover_lr, config.loss_weight) == (20, 0.2, 0.2)
    assert (config.unlearn_level, config.recover_level) == ("neuron", "filter")
    assert config.thresholds == pytest.approx([0.05 * k for k in range(20)])


def test_500_images_and_a_wide_network_have_the_official_setting_and_others_a_slow_recovery_in_four_steps():
    wide, narrow = nn.Sequential(*(nn.BatchNorm2d(500) for _ in range(2))), nn.BatchNorm2d(999)
    assert rnp.recipe(wide, 500) == rnp.recipe(wide, 5000) == RnpConfig()
    batches = [rnp.recipe(wide, count).batch_size for count in (499, 100, 10)] + [rnp.recipe(narrow, 500).batch_size]
    assert batches == [100, 20, 8, 100]
    for slow in (rnp.recipe(wide, 499), rnp.recipe(narrow, 500)):
        assert slow == RnpConfig(recover_lr=0.003, batch_size=100)


def test_the_variants_are_named_by_their_levels():
    variants = rnp.variants(QUICK)
    named = {f"{each.unlearn_level}s forget, {each.recover_level}s recover" for each in variants.values()}
    assert named == set(variants) and len(variants) == 3 and QUICK not in variants.values()
    assert {each.unlearn_level: each.unlearn_lr for each in variants.values()} == {"filter": 2.0, "neuron": 0.2}
    usual = {"unlearn_level": "neuron", "recover_level": "filter", "unlearn_lr": QUICK.unlearn_lr}
    assert all(replace(each, **usual) == QUICK for each in variants.values())


def test_the_suspected_label_is_what_the_unlearned_network_calls_most(tiny):
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    model[1].weight.data = torch.zeros(3, 192)
    model[1].weight.data[0, :64] = 1.0  # the red channel speaks for class 0
    model[1].bias.data = torch.tensor([-38.0, 0.0, -5.0])
    label, shares = rnp.suspected_label(model, tiny)
    called = torch.bincount(model(tiny.floats()).argmax(1), minlength=3) / 36
    assert label == 1 and shares.tolist() == called.tolist() and 0 < shares[0] < 0.5


def test_a_sample_scores_high_where_the_unlearned_network_still_agrees(tiny):
    says = lambda logits: nn.Sequential(nn.Flatten(), constant(logits))
    scores = rnp.sample_scores(says([0.0, 9.0, 0.0]), says([1.0, 2.0, 3.0]), tiny)
    by_hand = 2.0 - torch.tensor([1.0, 2.0, 3.0]).logsumexp(0)
    assert scores.tolist() == pytest.approx([by_hand.item()] * 36, abs=1e-5)


def constant(logits):
    layer = nn.Linear(192, 3)
    layer.weight.data, layer.bias.data = torch.zeros(3, 192), torch.tensor(logits)
    return layer


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch_size": 0}, "batch_size must be above 0, got 0"),
        ({"unlearn_lr": -0.1}, "unlearn_lr must be above 0, got -0.1"),
        ({"max_unlearn_epochs": 0}, "max_unlearn_epochs must be above 0, got 0"),
        ({"recover_epochs": 0}, "recover_epochs must be above 0, got 0"),
        ({"recover_lr": float("nan")}, "recover_lr must be above 0, got nan"),
        ({"loss_weight": 0.0}, "loss_weight must be above 0, got 0.0"),
        ({"accuracy_floor": 1.0}, r"accuracy_floor must be in \[0, 1\), got 1.0"),
        ({"held_out": -0.1}, r"held_out must be in \[0, 1\), got -0.1"),
        ({"max_drop": 5}, r"max_drop must be in \[0, 1\), got 5"),
        ({"clip_gradient": -1.0}, "clip_gradient must be above 0 or None, got -1.0"),
        ({"unlearn_level": "layer"}, "unlearn_level must be one of neuron, filter, got 'layer'"),
        ({"recover_level": "channel"}, "recover_level must be one of neuron, filter, got 'channel'"),
        ({"thresholds": ()}, r"thresholds must be values in \[0, 1\], at least one, got \(\)"),
        ({"thresholds": (0.5, 1.2)}, r"thresholds must be values in \[0, 1\], at least one, got \(0.5, 1.2\)"),
    ],
)
def test_values_out_of_range_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        RnpConfig(**values)


def test_no_clean_image_is_an_error(trained, tiny, generator):
    with pytest.raises(ValueError, match="at least one image"):
        rnp.rnp(trained, tiny.subset(slice(0)), QUICK, generator=generator)


@pytest.mark.parametrize(
    "layers", [[nn.Conv2d(3, 4, 3)], [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False)]], ids=["none", "no scales"]
)
def test_a_network_without_batch_norm_is_told_what_is_needed(tiny, generator, layers):
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    with pytest.raises(ValueError, match=r"no nn\.BatchNorm2d layer with affine=True: use a network with batch norm"):
        rnp.rnp(model, tiny, QUICK, generator=generator)


def test_a_loss_that_is_no_number_is_an_error_in_both_steps(trained, tiny, generator):
    trained[0].weight.data[0] = float("nan")
    for floor in (0.2, 0.5):  # such a network calls everything the first class: a third is right
        with pytest.raises(FloatingPointError, match="loss became nan in epoch 1 of RNP's unlearning"):
            rnp.rnp(trained, tiny, replace(QUICK, accuracy_floor=floor), generator=generator)
    with pytest.raises(FloatingPointError, match="loss became nan in epoch 1 of RNP's recovery"):
        rnp.recover(trained, tiny, QUICK, generator=generator)
