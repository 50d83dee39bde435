"""Neural Cleanse: the inversion's weight, the anomaly index by hand, who is flagged, what is unlearned."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bdlib.defenses import nc
from bdlib.defenses.nc import NcConfig
from bdlib.explain import SyntheticTrigger
from bdlib.train import TrainConfig
from tests.conftest import same, state

TUNING = TrainConfig(epochs=2, batch_size=12, lr=0.05)


def trigger(pixels: int, value: float = 1.0) -> SyntheticTrigger:
    mask = torch.zeros(1, 1, 8, 8)
    mask.flatten()[:pixels] = 1.0
    return SyntheticTrigger(mask, torch.full((1, 3, 8, 8), value))


def test_anomaly_index_by_numpy():
    sizes = torch.tensor([50.0, 60.0, 55.0, 4.0, 58.0, 52.0, 90.0])
    array = sizes.numpy()
    by_hand = (np.median(array) - array) / (1.4826 * np.median(np.abs(array - np.median(array))))
    found = nc.anomaly_indices(sizes)
    assert np.allclose(found.numpy(), by_hand, atol=1e-4)
    assert torch.nonzero(found > 2).flatten().tolist() == [3]  # the large one is as far off, on the other side


def test_equal_sizes_flag_nobody():
    assert not (nc.anomaly_indices(torch.full((5,), 7.0)) > 2).any()


class Answers(nn.Module):
    """Logit of class 1 grows with the first pixel's red; class 0 is constant."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(20.0))

    def forward(self, images):
        red = images[:, 0, 0, 0]
        return torch.stack([torch.full_like(red, 10.0), self.scale * red, torch.zeros_like(red)], 1)


def test_inversion_finds_the_pixel_and_shrinks_the_mask(tiny, generator):
    dark = replace(tiny, images=torch.zeros_like(tiny.images))
    config = NcConfig(rounds=40, steps=10, batch_size=12, weight=0.02, patience=2)
    found = nc.invert(Answers(), dark, 1, config, generator=generator)
    assert found.mask[0, 0, 0, 0] * found.pattern[0, 0, 0, 0] > 0.5
    assert found.mask.flatten()[1:].max() < 0.1 and found.size < 4


def recorded(monkeypatch, successes):
    """Weights with which the rounds of an inversion were run, each of which has the success given."""
    weights, left = [], list(successes)

    def spy(model, batches, label, learned, weight):
        weights.append(weight)
        with torch.no_grad():  # a mask that changes from round to round
            learned[0][0].fill_(-len(weights))
        return left.pop(0)

    monkeypatch.setattr(nc, "inversion_round", spy)
    return weights


def test_the_weight_rises_while_it_works_and_falls_while_it_does_not(monkeypatch, network, tiny, generator):
    weights = recorded(monkeypatch, [1.0] * 3 + [0.5] * 4)
    config = NcConfig(rounds=7, weight=1.0, patience=2, multiplier=4.0)
    nc.invert(network, tiny, 0, config, generator=generator)
    # Two successes: x 4.  The third starts a new count, which a failure ends; two failures: / 4^1.5.
    assert weights == pytest.approx([1, 1, 4, 4, 4, 0.5, 0.5])


def test_the_smallest_trigger_that_works_is_kept(monkeypatch, network, tiny, generator):
    recorded(monkeypatch, [1.0, 1.0, 0.9])
    found = nc.invert(network, tiny, 0, NcConfig(rounds=3), generator=generator)
    assert torch.allclose(found.mask, torch.tensor(-2.0).sigmoid().expand(1, 1, 8, 8))
    recorded(monkeypatch, [0.1, 0.1, 0.1])
    found = nc.invert(network, tiny, 0, NcConfig(rounds=3), generator=generator)
    assert torch.allclose(found.mask, torch.tensor(-3.0).sigmoid().expand(1, 1, 8, 8))


def test_a_round_by_hand(network, tiny):
    """One step of SGD on CE towards the class + weight |mask|_1; the success is of the answers before it."""
    network = network.eval().requires_grad_(False)
    images = tiny.floats()[:12]
    logits = [torch.full((1, 1, 8, 8), -1.0, requires_grad=True), torch.zeros(1, 3, 8, 8, requires_grad=True)]
    mask, pattern = (logit.detach().clone().requires_grad_(True) for logit in logits)
    stamped = (1 - mask.sigmoid()) * images + mask.sigmoid() * pattern.sigmoid()
    answers = network(stamped)
    loss = F.cross_entropy(answers, torch.full((12,), 2)) + 0.3 * mask.sigmoid().sum()
    gradients = torch.autograd.grad(loss, [mask, pattern])
    success = nc.inversion_round(network, images[None], 2, (logits, torch.optim.SGD(logits, lr=1.0)), 0.3)
    assert torch.allclose(logits[0], mask - gradients[0], atol=1e-5)
    assert torch.allclose(logits[1], pattern - gradients[1], atol=1e-5)
    assert success == pytest.approx((answers.argmax(1) == 2).float().mean().item())


def test_unlearning_stamps_a_share_and_keeps_the_labels(network, tiny, generator, monkeypatch):
    plain = replace(tiny, crop_padding=0, flip=False)
    seen = []
    monkeypatch.setattr(
        nc, "fit", lambda model, clean, config, *, generator, watch, change: seen.append(change) or model
    )
    config = NcConfig(share=0.5, tuning=TUNING)
    nc.unlearn(network, plain, [trigger(3), trigger(5, 0.5)], config, generator=generator)
    images, labels = plain.floats()[:12], plain.labels[:12]
    stamped, kept = seen[0](images, labels)
    assert torch.equal(kept, labels) and torch.equal(stamped[6:], images[6:])
    assert torch.allclose(stamped[:3], trigger(3)(images[:3])) and torch.allclose(
        stamped[3:6], trigger(5, 0.5)(images[3:6])
    )


def test_nobody_flagged_nothing_changed(network, tiny, generator, monkeypatch):
    monkeypatch.setattr(nc, "invert", lambda model, clean, label, config, *, generator: trigger(20 + label))
    result = nc.run(network, tiny, NcConfig(index=9.0), generator=generator)
    assert result.flagged == () and same(state(result.model), state(network)) and result.model is not network


def test_the_flagged_class_is_unlearned(network, tiny, generator, monkeypatch):
    monkeypatch.setattr(nc, "invert", lambda model, clean, label, config, *, generator: trigger([20, 2, 23][label]))
    asked = []
    monkeypatch.setattr(nc, "unlearn", lambda model, clean, found, *rest, **named: asked.extend(found) or model)
    result = nc.run(network, tiny, NcConfig(), generator=generator)
    assert result.flagged == (1,) and [found.size for found in asked] == [2.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rounds": 0}, "rounds must be above 0, got 0"),
        ({"success": 1.2}, r"success must be in \(0, 1\], got 1.2"),
        ({"share": 0.0}, r"share must be in \(0, 1\], got 0.0"),
        ({"multiplier": 1.0}, "multiplier must be above 1, got 1.0"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        NcConfig(**change)
