"""I-BAU: perturbation and hyper-gradient by hand; the hyper-gradient also against a game whose answer is known."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bdlib.defenses import i_bau
from bdlib.defenses.i_bau import IBauConfig
from bdlib.train import Batches


@pytest.fixture
def plain(tiny):
    return replace(tiny, crop_padding=0, flip=False)


def test_step_1_by_hand(network, plain):
    network.eval()
    config = IBauConfig(batch_size=36, delta_lr=3.0, decay=0.1)
    batches = Batches(plain, 36, torch.device("cpu"), generator=torch.Generator().manual_seed(0))
    found = i_bau.worst_perturbation(network, batches, config)
    delta = torch.zeros(1, 3, 8, 8, requires_grad=True)
    loss = F.cross_entropy(network(plain.floats() + delta), plain.labels) - 0.1 * delta.square().sum()
    (gradient,) = torch.autograd.grad(loss, delta)
    assert torch.allclose(found, 3.0 * gradient, atol=1e-5) and not found.requires_grad


def test_step_1_takes_every_batch_and_holds_back_by_the_decay(network, plain):
    network.eval()
    config = IBauConfig(delta_lr=1.0, decay=0.0)
    batches = Batches(plain, 12, torch.device("cpu"), generator=torch.Generator().manual_seed(0))
    free = i_bau.worst_perturbation(network, batches, config)
    images, labels = plain.floats(), plain.labels
    assert F.cross_entropy(network(images + free), labels) > F.cross_entropy(network(images), labels)
    batches = Batches(plain, 12, torch.device("cpu"), generator=torch.Generator().manual_seed(0))
    held = i_bau.worst_perturbation(network, batches, replace(config, decay=0.2))
    assert held.norm() < 0.9 * free.norm()


def test_step_1_shortens_delta_to_the_radius(network, plain):
    network.eval()
    config = IBauConfig(delta_lr=50.0, decay=0.0)
    found = [
        i_bau.worst_perturbation(
            network,
            Batches(plain, 36, torch.device("cpu"), generator=torch.Generator().manual_seed(0)),
            replace(config, radius=radius),
        )
        for radius in (None, 0.1, 1e6)
    ]
    assert found[0].norm() > 0.2 and torch.equal(found[0], found[2])
    assert torch.allclose(found[1], 0.1 * found[0] / found[0].norm(), atol=1e-5)


def test_only_a_share_of_the_batch_carries_delta(network, plain):
    network.eval()
    images, labels = plain.floats()[:10], plain.labels[:10]
    delta = torch.full((1, 3, 8, 8), 0.5)
    for share, count in ((0.01, 1), (0.3, 3), (1.0, 10)):
        loss = i_bau.outer_loss(network, {}, delta, (images, labels), IBauConfig(share=share))
        by_hand = F.cross_entropy(network(torch.cat([images[:count] + delta, images[count:]])), labels)
        assert loss.item() == pytest.approx(by_hand.item(), rel=1e-5)


class Quadratic(nn.Module):
    """One weight, whose inner objective is made quadratic below, so that the best delta is known: a theta."""

    def __init__(self):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(1.5))


@pytest.mark.parametrize(("steps", "reached"), [(0, 0.0), (1, 0.2), (200, 1.0)])
def test_hyper_gradient_of_a_game_with_a_known_answer(monkeypatch, steps, reached):
    """Inner: (delta - 3 theta)^2 / 2, best at 3 theta.  Outer: delta^2 + theta.  d/d theta = 1 + 2 delta 3 at the fixed point.

    With s = .2 each iteration is v <- .8 v + 2 delta, and theta moves Phi by .6: after n iterations 1 + .6 v_n.
    """
    model = Quadratic()
    weights = dict(model.named_parameters())
    monkeypatch.setattr(i_bau, "inner_loss", lambda m, w, delta, batch, config: (delta - 3 * w["theta"]).square() / 2)
    monkeypatch.setattr(i_bau, "outer_loss", lambda m, w, delta, batch, config: delta.square() + w["theta"])
    config = IBauConfig(fixed_points=steps, inner_step=0.2)
    found = i_bau.hyper_gradients(model, weights, torch.tensor(4.5), (None, None), config)["theta"]
    assert found.item() == pytest.approx(1 + reached * 2 * 4.5 * 3, rel=1e-4)


def test_each_round_steps_the_weights_by_adam_along_the_hyper_gradient(network, plain):
    network[3].p = 0.0
    config = IBauConfig(rounds=1, batch_size=36, lr=0.01, share=0.5, delta_lr=2.0)
    tuned = i_bau.i_bau(network, plain, config, generator=torch.Generator().manual_seed(0))
    model = copy.deepcopy(network).eval()
    weights = dict(model.named_parameters())
    order = torch.randperm(36, generator=torch.Generator().manual_seed(0))
    batches = Batches(plain, 36, torch.device("cpu"), generator=torch.Generator().manual_seed(3))
    delta = i_bau.worst_perturbation(model, batches, config)
    source = torch.Generator().manual_seed(0)
    torch.randperm(36, generator=source)
    order = torch.randperm(36, generator=source)
    gradients = i_bau.hyper_gradients(model, weights, delta, (plain.floats()[order], plain.labels[order]), config)
    large = 0
    for name, after in tuned.named_parameters():
        gradient = gradients[name]
        clear = gradient.abs() > 1e-4  # Adam's first step is lr * sign
        assert torch.allclose((after - weights[name])[clear], -0.01 * gradient.sign()[clear], atol=1e-4), name
        large += int(clear.sum())
    assert large > 50
    assert torch.equal(tuned[1].running_mean, network[1].running_mean)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rounds": 0}, "rounds must be above 0, got 0"),
        ({"decay": -1.0}, "decay must not be negative, got -1.0"),
        ({"radius": 0.0}, "radius must be above 0 or None, got 0.0"),
        ({"share": 0.0}, r"share must be in \(0, 1\], got 0.0"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        IBauConfig(**change)
