"""ABL: the held loss by hand, who is isolated, what is trained on and what is unlearned."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from bdlib import train
from bdlib.defenses import abl
from bdlib.defenses.abl import AblConfig

LOGITS = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
LABELS = torch.tensor([0, 1])


@pytest.mark.parametrize(("gamma", "sign"), [(0.1, 1), (0.9, -1)])
def test_step_1_turns_round_below_gamma(gamma, sign):
    plain = F.cross_entropy(LOGITS, LABELS).item()
    assert 0.1 < plain < 0.9
    for kind, value in (("flooding", abs(plain - gamma) + gamma), ("ascent", sign * plain)):
        leaf = LOGITS.clone().requires_grad_(True)
        loss = abl.held_loss(leaf, LABELS, AblConfig(gamma=gamma, isolation_loss=kind))
        loss.backward()
        assert loss.item() == pytest.approx(value, rel=1e-5)
        again = LOGITS.clone().requires_grad_(True)
        F.cross_entropy(again, LABELS).backward()
        assert torch.allclose(leaf.grad, sign * again.grad)


def test_step_2_takes_the_lowest_losses(network, tiny, monkeypatch):
    monkeypatch.setattr(abl, "sample_losses", lambda model, split: torch.tensor([3.0, 1.0, 2.0, 0.5] * 9))
    assert sorted(abl.isolate(network, tiny, 0.25).tolist()) == list(range(3, 36, 4))
    assert len(abl.isolate(network, tiny, 0.001)) == 1


def test_sample_losses_by_hand(network, tiny):
    found = train.sample_losses(network.train(), tiny)
    with torch.no_grad():
        by_hand = F.cross_entropy(network.eval()(tiny.floats()), tiny.labels, reduction="none")
    assert torch.allclose(found, by_hand, atol=1e-6)


def test_steps_3_and_4_part_the_images(network, tiny, generator, monkeypatch):
    """What is isolated is not trained on, and is what the ascent sees; both go on from the network of step 1."""
    seen = {}
    monkeypatch.setattr(abl, "isolate", lambda model, split, share: torch.tensor([4, 7]))
    monkeypatch.setattr(abl, "fit", lambda model, split, config, **named: seen.update(fit=(model, split, config)))
    monkeypatch.setattr(abl, "unlearn", lambda model, split, config, **named: seen.update(unlearn=(model, split)))
    config = AblConfig(epochs=3, batch_size=12, lr=0.07, isolation_epochs=1)
    result = abl.run(lambda g: network, tiny, config, generator=generator)
    model, split, training = seen["fit"]
    assert model is network and seen["unlearn"][0] is network and result.model is network
    assert len(split) == 34 and (training.epochs, training.lr, training.batch_size) == (3, 0.07, 12)
    assert torch.equal(seen["unlearn"][1].images, tiny.images[[4, 7]]) and result.isolated.tolist() == [4, 7]
    both = torch.cat([split.images, seen["unlearn"][1].images]).flatten(1)
    assert len(both.unique(dim=0)) == 36


def test_step_4_goes_uphill(network, tiny, generator):
    network[3].p = 0.0
    plain = replace(tiny, crop_padding=0, flip=False)
    before = F.cross_entropy(network.train()(plain.floats()), plain.labels).item()
    weights = [weight.detach().clone() for weight in network.parameters()]
    gradients = torch.autograd.grad(F.cross_entropy(network(plain.floats()), plain.labels), list(network.parameters()))
    config = AblConfig(batch_size=36, unlearning_epochs=1, unlearning_lr=0.1, momentum=0.0, weight_decay=0.0)
    abl.unlearn(network, plain, config, generator=generator)
    for after, start, gradient in zip(network.parameters(), weights, gradients, strict=True):
        assert torch.allclose(after, start + 0.1 * gradient, atol=1e-5)
    assert F.cross_entropy(network.train()(plain.floats()), plain.labels).item() > before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs must be above 0, got 0"),
        ({"gamma": -1.0}, "gamma must not be negative, got -1.0"),
        ({"share": 1.0}, r"share must be in \(0, 1\), got 1.0"),
        ({"isolation_loss": "none"}, "isolation_loss must be one of flooding, ascent, got 'none'"),
        ({"schedule": "linear"}, "schedule must be one of"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        AblConfig(**change)
