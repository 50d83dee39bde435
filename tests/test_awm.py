"""AWM: one test for each numbered step that fails when its line is broken, then the contract of every defense."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bdlib import models
from bdlib.defenses import awm
from bdlib.defenses.awm import AwmConfig
from tests.conftest import same, state

QUICK = AwmConfig(outer_epochs=3, inner_epochs=1, batch_size=12, tau=5.0)


@pytest.fixture
def batch(tiny):
    return tiny.floats(), tiny.labels


def logits_by_hand(model, masks, images):
    """f(x; m * w) without functional_call: a copy whose weights are multiplied."""
    masked = copy.deepcopy(model).eval()
    for name, mask in masks.items():
        layer = masked.get_submodule(name.removesuffix(".weight"))
        layer.weight.data = layer.weight.data * mask.detach()
    return masked(images)


def test_step_1_a_mask_of_ones_on_convolution_weights_alone(network):
    masks = awm.initial_masks(network)
    assert {name: tuple(mask.shape) for name, mask in masks.items()} == {
        "0.weight": (4, 3, 3, 3),
        "4.weight": (6, 4, 1, 1),
    }
    assert all((mask == 1).all() and mask.requires_grad for mask in masks.values())


def test_step_4_goes_uphill_by_the_gradient_times_the_rate(network, batch):
    network.eval()
    masks = {name: mask.detach() * 0.7 for name, mask in awm.initial_masks(network).items()}
    start = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)) / 10
    stepped = awm.perturbation_step(network, masks, start, batch, AwmConfig(perturbation_lr=0.5))
    leaf = start.clone().requires_grad_(True)
    own_labels = logits_by_hand(network, masks, batch[0]).argmax(1)
    gradient = torch.autograd.grad(F.cross_entropy(logits_by_hand(network, masks, batch[0] + leaf), own_labels), leaf)[
        0
    ]
    assert gradient.abs().sum() > 0 and torch.allclose(stepped, start + 0.5 * gradient, atol=1e-6)


def test_step_4_with_the_papers_labels(network, batch):
    network.eval()
    masks = awm.initial_masks(network)
    start = torch.zeros(1, 3, 8, 8)
    own = awm.perturbation_step(network, masks, start, batch, AwmConfig(inner_label="model"))
    true = awm.perturbation_step(network, masks, start, batch, AwmConfig(inner_label="true"))
    leaf = start.clone().requires_grad_(True)
    gradient = torch.autograd.grad(F.cross_entropy(network(batch[0] + leaf), batch[1]), leaf)[0]
    assert torch.allclose(true, 10 * gradient, atol=1e-5) and not torch.allclose(own, true, atol=1e-3)


@pytest.mark.parametrize(("size", "expected"), [(10.0, 4.0), (4.0, 4.0), (1.5, 1.5), (0.0, 0.0)])
def test_step_5_shrinks_to_tau_and_never_stretches(size, expected):
    direction = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    direction = direction / direction.abs().sum()
    projected = awm.project_l1(size * direction, tau=4.0)
    assert projected.abs().sum().item() == pytest.approx(expected, abs=1e-5)
    assert torch.allclose(projected, expected * direction, atol=1e-6)


@pytest.mark.parametrize("clamp", [True, False])
@pytest.mark.parametrize(("beta", "weight"), [(None, 0.3), (2.0, 2.0)])
def test_step_6_objective_by_hand(network, batch, clamp, beta, weight):
    network.eval()
    masks = {name: (mask * 0.6).detach() for name, mask in awm.initial_masks(network).items()}
    delta = torch.full((1, 3, 8, 8), 0.4)
    loss = awm.mask_loss(network, masks, delta, batch, AwmConfig(alpha=0.7, beta=beta, gamma=0.01, clamp=clamp))
    perturbed = (batch[0] + 0.4).clamp(0, 1) if clamp else batch[0] + 0.4
    by_hand = 0.7 * F.cross_entropy(logits_by_hand(network, masks, batch[0]), batch[1])
    by_hand = (
        by_hand
        + weight * F.cross_entropy(logits_by_hand(network, masks, perturbed), batch[1])
        + 0.01 * 0.6 * (108 + 24)
    )
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-4)


def test_step_6_goes_downhill(network, batch):
    network.eval()
    masks = awm.initial_masks(network)
    optimizer = awm.mask_optimizer(masks, AwmConfig())
    delta = torch.zeros(1, 3, 8, 8)
    losses = []
    for _ in range(15):
        loss = awm.mask_loss(network, masks, delta, batch, AwmConfig())
        awm.mask_step(masks, optimizer, loss)
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.001


@pytest.mark.parametrize(("sign", "bound"), [(1, 0.0), (-1, 1.0)])
def test_step_6_clips_to_0_and_1(network, sign, bound):
    masks = awm.initial_masks(network)
    optimizer = awm.mask_optimizer(masks, AwmConfig(mask_lr=3.0))
    awm.mask_step(masks, optimizer, sign * sum(mask.sum() for mask in masks.values()))
    assert all((mask == bound).all() for mask in masks.values())


def test_plain_gradient_step_of_the_paper(network):
    masks = awm.initial_masks(network)
    optimizer = awm.mask_optimizer(masks, AwmConfig(mask_optimizer="sgd", mask_lr=0.25))
    awm.mask_step(masks, optimizer, sum(mask.sum() for mask in masks.values()))
    assert all((mask == 0.75).all() for mask in masks.values())


@pytest.mark.parametrize(("epsilon", "expected"), [(1e-8, [0.925, 0.50, 0.0]), (1e-6, [0.998, 0.990, 0.980])])
def test_gamma_alone_moves_masks_by_half_a_step_because_of_adams_epsilon(network, epsilon, expected):
    masks = awm.initial_masks(network)
    config = AwmConfig(adam_epsilon=epsilon)
    optimizer = awm.mask_optimizer(masks, config)
    seen = {}
    for step in range(1, 201):
        awm.mask_step(masks, optimizer, config.gamma * sum(mask.abs().sum() for mask in masks.values()))
        seen[step] = masks["0.weight"].mean().item()
    assert [seen[15], seen[100], seen[200]] == pytest.approx(expected, abs=0.006)


@pytest.mark.parametrize(
    ("count", "config", "steps"),
    [
        (36, AwmConfig(outer_epochs=2, batch_size=12, inner_epochs=5), 15),
        (36, AwmConfig(outer_epochs=2, batch_size=32, inner_epochs=5), 5),
        (9, AwmConfig(outer_epochs=2), 5),  # a budget far below the batch: still steps
        (3, AwmConfig(outer_epochs=2, batch_size=32, copies=9), 5),
        (1, AwmConfig(outer_epochs=2), 5),
    ],
)
def test_both_phases_take_T_steps_in_every_outer_epoch(tiny, network, monkeypatch, count, config, steps):
    calls = {"inner": [], "outer": 0}
    inner, outer = awm.perturbation_step, awm.mask_step
    monkeypatch.setattr(
        awm,
        "perturbation_step",
        lambda m, k, delta, b, c: (
            calls["inner"].append((delta.abs().sum().item(), len(b[1]))),
            inner(m, k, delta, b, c),
        )[1],
    )
    monkeypatch.setattr(awm, "mask_step", lambda *a: (calls.update(outer=calls["outer"] + 1), outer(*a))[1])
    awm.run(network, tiny.subset(slice(count)), config, generator=torch.Generator().manual_seed(0))
    assert len(calls["inner"]) == calls["outer"] == 2 * steps
    assert [k for k, (norm, _) in enumerate(calls["inner"]) if norm == 0] == [
        0,
        steps,
    ]  # starts at 0 in every outer epoch
    assert max(size for _, size in calls["inner"]) <= count * (1 + config.copies)


def test_the_result_is_the_mask_times_the_weight_and_nothing_else(tiny, network, generator):
    result = awm.run(network, tiny, QUICK, generator=generator)
    before, after = state(network), state(result.model)
    for name in before:
        expected = before[name] * result.masks[name] if name in result.masks else before[name]
        assert torch.equal(after[name], expected), name
    assert all(0 <= mask.min() and mask.max() <= 1 and (mask < 1).any() for mask in result.masks.values())


def test_the_perturbation_is_projected_once_an_outer_epoch_and_then_used(tiny, network, monkeypatch):
    projected, used = [], []
    project, loss = awm.project_l1, awm.mask_loss
    monkeypatch.setattr(awm, "project_l1", lambda delta, tau: (projected.append(tau), project(delta, tau))[1])
    monkeypatch.setattr(awm, "mask_loss", lambda m, k, delta, b, c: (used.append(delta), loss(m, k, delta, b, c))[1])
    config = AwmConfig(outer_epochs=3, inner_epochs=2, batch_size=12, tau=1e-3)
    result = awm.run(network, tiny, config, generator=torch.Generator().manual_seed(0))
    assert projected == [1e-3] * 3 and len(used) == 18
    assert all(delta.abs().sum().item() == pytest.approx(1e-3, rel=1e-3) for delta in [*used, result.perturbation])


def test_one_optimizer_for_the_whole_run_and_the_decay_of_its_rate(tiny, network, monkeypatch):
    seen = []
    step = awm.mask_step
    monkeypatch.setattr(
        awm,
        "mask_step",
        lambda m, optimizer, loss: (
            seen.append((id(optimizer), optimizer.param_groups[0]["lr"])),
            step(m, optimizer, loss),
        )[1],
    )
    config = AwmConfig(outer_epochs=3, inner_epochs=1, batch_size=36, lr_decay=0.5)
    awm.run(network, tiny, config, generator=torch.Generator().manual_seed(0))
    assert len({who for who, _ in seen}) == 1 and [rate for _, rate in seen] == pytest.approx([0.01, 0.005, 0.0025])


def test_copies_are_the_images_then_their_augmented_versions(tiny, generator):
    three = tiny.subset(slice(3))
    images, labels = awm.defense_images(three, AwmConfig(copies=2), torch.device("cpu"), generator=generator)
    assert torch.equal(images[:3], three.floats()) and labels.tolist() == three.labels.tolist() * 3
    assert not torch.equal(images[3:6], images[:3]) and not torch.equal(images[3:6], images[6:])


def test_a_copy_shows_as_much_as_the_dataset_or_the_config_says(tiny, monkeypatch):
    asked = []
    monkeypatch.setattr(
        awm, "random_resized_crop", lambda images, flip, generator, scale: (asked.append((scale, flip)), images)[1]
    )
    for config in (AwmConfig(copies=1), AwmConfig(copies=1, least_area=0.08)):
        awm.defense_images(tiny, config, torch.device("cpu"), generator=torch.Generator())
    assert asked == [((0.5, 1.0), True), ((0.08, 1.0), True)]


def test_input_model_is_as_it_was(tiny, network, generator, untouched):
    network.train()
    network[0].weight.requires_grad_(False)
    network[7].weight.grad = torch.ones_like(network[7].weight)
    before = state(network)
    result = awm.awm(network, tiny, QUICK, generator=generator)
    assert same(before, state(network)) and network.training and not result.training
    assert (
        not network[0].weight.requires_grad and network[4].weight.requires_grad and (network[7].weight.grad == 1).all()
    )


def test_same_generator_same_weights(tiny, network):
    run = lambda seed: state(awm.awm(network, tiny, QUICK, generator=torch.Generator().manual_seed(seed)))
    assert same(run(0), run(0)) and not same(run(0), run(1))


def test_official_recipes():
    assert awm.recipe(500, 10) == AwmConfig()
    one_shot = awm.recipe(10, 10)
    assert (one_shot.batch_size, one_shot.tau, one_shot.alpha, one_shot.copies) == (32, 100, 0.99, 9)
    assert awm.recipe(43, 43) == one_shot  # CIFAR-10's, not GTSRB's own
    few = awm.recipe(50, 10)
    assert (few.batch_size, few.tau, few.alpha, few.copies) == (32, 100, 0.9, 1)
    assert awm.recipe(128, 10) == awm.recipe(499, 10) == AwmConfig(lr_decay=0.9)
    assert few.lr_decay == one_shot.lr_decay == 1


@pytest.mark.parametrize(("config", "decay"), [(AwmConfig(), "lr_decay=0.9"), (AwmConfig(lr_decay=0.9), "lr_decay=1")])
def test_sensitivity_changes_something_each_time(config, decay):
    settings = awm.sensitivity(config)
    assert config not in settings.values() and len(set(settings.values())) == len(settings)
    assert [name for name in settings if name.startswith("lr_decay")] == [decay]


def test_the_papers_variant_differs_where_alg_1_does():
    paper = awm.paper_variant(AwmConfig())
    assert (paper.inner_label, paper.clamp, paper.mask_optimizer, paper.alpha) == ("true", False, "sgd", 0.9)


def test_the_hard_mask_is_0_up_to_the_threshold():
    assert awm.binarize({"w": torch.tensor([0.0, 0.5, 0.51, 1.0])})["w"].tolist() == [0, 0, 1, 1]


def test_it_removes_a_planted_weight_that_answers_to_a_constant():
    """A network whose class 1 fires on overall brightness: AWM on dark images must cut that weight, not the useful one."""
    conv = nn.Conv2d(2, 2, 1, bias=False)
    conv.weight.data = torch.tensor([[4.0, 0.0], [0.0, 30.0]])[..., None, None]
    model = nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2))
    model[3].weight.data, model[3].bias.data = torch.tensor([[2.0, 0.0], [-2.0, 1.0]]), torch.tensor([-4.0, 4.0])
    images = torch.zeros(60, 2, 4, 4)
    images[::2, 0] = 1.0  # class 0 has channel 0 lit; channel 1, the trigger's, is dark everywhere
    from bdlib.data import Dataset

    clean = Dataset("lamp", (images * 255).to(torch.uint8), (torch.arange(60) + 1) % 2 ^ 1, ("lit", "dark"))
    result = awm.run(model, clean, AwmConfig(batch_size=20, tau=10.0), generator=torch.Generator().manual_seed(0))
    mask = result.masks["0.weight"][:, :, 0, 0]
    assert mask[0, 0] > 0.8 and mask[1, 1] < 0.3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"alpha": 1.5}, r"alpha must be in \[0, 1\], got 1.5"),
        ({"tau": 0}, "tau must be above 0, got 0"),
        ({"gamma": -1e-8}, "gamma must not be negative, got -1e-08"),
        ({"copies": -1}, "copies must not be negative, got -1"),
        ({"outer_epochs": 0}, "outer_epochs must be above 0, got 0"),
        ({"inner_label": "own"}, "inner_label must be one of model, true, got 'own'"),
        ({"mask_optimizer": "adamw"}, "mask_optimizer must be one of adam, sgd, got 'adamw'"),
        ({"least_area": 0.0}, r"least_area must be in \(0, 1\], got 0.0"),
    ],
)
def test_values_out_of_range_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        AwmConfig(**values)


def test_no_clean_image_and_no_convolution_are_errors(tiny, network, generator):
    with pytest.raises(ValueError, match="at least one clean image"):
        awm.awm(network, tiny.subset(slice(0)), QUICK, generator=generator)
    with pytest.raises(ValueError, match=r"no nn\.Conv2d layer"):
        awm.awm(nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), tiny, QUICK, generator=generator)


def test_a_loss_that_is_no_number_is_an_error(tiny, network, generator):
    network[0].weight.data[0] = float("nan")
    with pytest.raises(FloatingPointError, match="loss became nan in outer epoch 1 of AWM"):
        awm.awm(network, tiny, QUICK, generator=generator)


def test_a_model_whose_weights_are_hardly_convolutions_is_refused():
    transformer = models.build(
        "vit_b_16:64", torch.zeros(2, 3, 16, 16, dtype=torch.uint8), 3, generator=torch.Generator().manual_seed(0)
    )
    with pytest.raises(ValueError, match=r"only 0\.\d\d% of the model's weights .* needs at least 1%"):
        awm.initial_masks(transformer)
