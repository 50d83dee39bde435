"""ANP: noise, loss and mask by hand, then the choice of the threshold."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from bdlib.defenses import anp
from bdlib.defenses.anp import AnpConfig
from tests.conftest import same, state


@pytest.fixture
def scaled(network):
    """Scales and shifts of every sign, no dropout, in train()."""
    network[1].weight.data = torch.tensor([0.5, -1.0, 1.5, 2.0])
    network[1].bias.data = torch.tensor([0.3, -0.2, 0.1, 0.4])
    network[3].p = 0.0
    return network.requires_grad_(False).train()


@pytest.fixture
def batch(tiny):
    return tiny.floats()[:12], tiny.labels[:12]


def masks_of(values):
    return {"1.weight": torch.tensor(values, requires_grad=True)}


def loss_at(model, scale, shift, batch):
    """The loss by hand, with these scales and shifts, in train()."""
    other = copy.deepcopy(model).train()
    other[1].weight.data, other[1].bias.data = scale.detach(), shift.detach()
    return F.cross_entropy(other(batch[0]), batch[1])


def test_step_3_starts_within_epsilon_and_goes_uphill_by_the_sign(scaled, batch):
    masks, config = masks_of([1.0, 0.5, 1.0, 0.2]), AnpConfig(epsilon=0.4)
    found = anp.worst_noise(scaled, masks, batch, config, generator=torch.Generator().manual_seed(2))
    source = torch.Generator().manual_seed(2)
    drawn = {name: torch.rand(4, generator=source) * 0.8 - 0.4 for name in ("1.weight", "1.bias")}
    leaf = {name: part.clone().requires_grad_(True) for name, part in drawn.items()}
    other = copy.deepcopy(scaled)
    weights = {
        "1.weight": (masks["1.weight"].detach() + leaf["1.weight"]) * scaled[1].weight,
        "1.bias": (1 + leaf["1.bias"]) * scaled[1].bias,
    }
    gradients = torch.autograd.grad(
        F.cross_entropy(torch.func.functional_call(other, weights, (batch[0],)), batch[1]), list(leaf.values())
    )
    for (name, part), gradient in zip(drawn.items(), gradients, strict=True):
        assert torch.allclose(found[name], (part + 0.4 * gradient.sign()).clamp(-0.4, 0.4)), name
        assert not found[name].requires_grad


def test_step_3_makes_the_loss_larger(scaled, batch, generator):
    config = AnpConfig(epsilon=0.3, noise_steps=5)
    masks = masks_of([1.0] * 4)
    noise = anp.worst_noise(scaled, masks, batch, config, generator=generator)
    worst = loss_at(scaled, (1 + noise["1.weight"]) * scaled[1].weight, (1 + noise["1.bias"]) * scaled[1].bias, batch)
    still = loss_at(scaled, scaled[1].weight, scaled[1].bias, batch)
    assert worst > still and all(part.abs().max() <= 0.3 + 1e-6 for part in noise.values())


@pytest.mark.parametrize("alpha", [0.0, 0.2, 1.0])
def test_step_4_weighs_both_losses(scaled, batch, alpha):
    masks = masks_of([1.0, 0.5, 0.0, 0.8])
    noise = {"1.weight": torch.tensor([0.1, -0.2, 0.3, 0.0]), "1.bias": torch.tensor([0.2, 0.1, -0.4, 0.3])}
    gamma, beta = scaled[1].weight, scaled[1].bias
    still = loss_at(scaled, masks["1.weight"] * gamma, beta, batch)
    noisy = loss_at(scaled, (masks["1.weight"] + noise["1.weight"]) * gamma, (1 + noise["1.bias"]) * beta, batch)
    assert abs(still - noisy) > 1e-3
    loss = anp.mask_loss(scaled, masks, noise, batch, AnpConfig(alpha=alpha))
    assert loss.item() == pytest.approx((alpha * still + (1 - alpha) * noisy).item(), rel=1e-4)


def test_masks_by_hand_over_two_steps(scaled, tiny):
    """SGD with momentum on the loss, clipped to [0, 1], a new batch each step, over the end of an epoch."""
    plain = replace(tiny, crop_padding=0, flip=False)
    config = AnpConfig(steps=2, batch_size=36, mask_lr=0.5, momentum=0.8, epsilon=0.0)
    found = anp.learn_masks(scaled, plain, config, generator=torch.Generator().manual_seed(0))["1.weight"]
    mask, speed = torch.ones(4), torch.zeros(4)
    model = copy.deepcopy(scaled)
    for _ in range(2):
        leaf = mask.clone().requires_grad_(True)
        loss = F.cross_entropy(
            torch.func.functional_call(model, {"1.weight": leaf * scaled[1].weight}, (plain.floats(),)), plain.labels
        )
        (gradient,) = torch.autograd.grad(loss, leaf)
        speed = 0.8 * speed + gradient
        mask = (mask - 0.5 * speed).clamp(0, 1)
    assert torch.allclose(found, mask, atol=1e-4) and found.min() < 0.99 and found.max() == 1.0


def test_step_5_zeroes_scales_up_to_the_chosen_threshold(scaled, tiny, generator, monkeypatch):
    masks = {"1.weight": torch.tensor([0.05, 0.3, 0.5, 1.0])}
    monkeypatch.setattr(anp, "learn_masks", lambda *rest, **named: masks)
    monkeypatch.setattr(anp, "strictest", lambda model, values, build, held, drop: values[6])
    result = anp.run(scaled, tiny, AnpConfig(), generator=generator)
    assert result.threshold == pytest.approx(0.3)
    assert (result.model[1].weight == 0).tolist() == [True, True, False, False]
    assert torch.equal(result.model[1].bias, scaled[1].bias)
    monkeypatch.setattr(anp, "strictest", lambda *rest: None)
    result = anp.run(scaled, tiny, AnpConfig(), generator=generator)
    assert result.threshold is None and same(state(result.model), state(scaled))


def test_thresholds_are_tried_from_mild_to_strict_on_held_out_images(scaled, tiny, generator, monkeypatch):
    asked = {}
    monkeypatch.setattr(
        anp, "learn_masks", lambda m, fitted, *rest, **named: asked.update(fitted=fitted) or {"1.weight": torch.ones(4)}
    )
    monkeypatch.setattr(
        anp, "strictest", lambda m, values, build, held, drop: asked.update(values=values, held=held, drop=drop)
    )
    anp.run(scaled, tiny, AnpConfig(thresholds=(0.5, 0.1), max_drop=0.07), generator=generator)
    assert asked["values"] == [0.1, 0.5] and asked["drop"] == 0.07
    both = torch.cat([asked["fitted"].images, asked["held"].images])
    assert len(asked["held"]) == 6 and len(both.flatten(1).unique(dim=0)) == 36


def test_weight_masks_lie_on_convolutions_and_so_does_the_noise(scaled, tiny, batch, generator):
    config = AnpConfig(steps=3, batch_size=12, level="weight", mask_lr=5.0)
    masks = anp.learn_masks(scaled, tiny, config, generator=generator)
    assert {name: mask.shape for name, mask in masks.items()} == {
        "0.weight": scaled[0].weight.shape, "4.weight": scaled[4].weight.shape,
    }  # fmt: skip
    assert masks["0.weight"].min() < 1 and all(0 <= mask.min() and mask.max() <= 1 for mask in masks.values())
    noise = anp.worst_noise(scaled, masks, batch, config, generator=generator)
    assert noise.keys() == masks.keys()


def test_soft_masks_are_the_result(scaled, tiny, generator, monkeypatch):
    masks = {"1.weight": torch.tensor([0.05, 0.3, 0.5, 1.0])}
    monkeypatch.setattr(anp, "learn_masks", lambda *rest, **named: masks)
    result = anp.run(scaled, tiny, AnpConfig(soft=True), generator=generator)
    assert torch.equal(result.model[1].weight, scaled[1].weight * masks["1.weight"]) and result.threshold is None


def test_the_way_to_awm_changes_one_thing_at_a_time():
    ladder = anp.toward_awm(AnpConfig(steps=7))
    assert [(c.level, c.soft, c.steps) for c in ladder.values()] == [
        ("neuron", False, 7), ("weight", False, 7), ("weight", True, 7),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps must be above 0, got 0"),
        ({"epsilon": -0.1}, "epsilon must not be negative, got -0.1"),
        ({"alpha": 1.1}, r"alpha must be in \[0, 1\], got 1.1"),
        ({"held_out": 1.0}, r"held_out must be in \[0, 1\)"),
        ({"thresholds": ()}, "thresholds must be values"),
        ({"level": "layer"}, "level must be one of neuron, weight, got 'layer'"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        AnpConfig(**change)
