"""DBD with SimCLR and MixMatch: each loss by hand, what is frozen, who is credible, whose labels are looked at."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from bdlib.defenses import dbd, mixmatch, simclr
from bdlib.defenses.dbd import DbdConfig
from bdlib.defenses.mixmatch import MixmatchConfig
from bdlib.defenses.simclr import SimclrConfig
from tests.conftest import same, state
from tests.test_methods import small_network


def test_contrast_by_hand():
    points = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    unit = points / points.norm(dim=1, keepdim=True)
    total = 0.0
    for i in range(6):
        j = (i + 3) % 6
        scores = torch.tensor([(unit[i] @ unit[k] / 0.3).item() for k in range(6) if k != i])
        total += torch.logsumexp(scores, 0).item() - (unit[i] @ unit[j] / 0.3).item()
    assert simclr.contrast(points, 0.3).item() == pytest.approx(total / 6, rel=1e-5)


def test_views_differ_stay_in_range_and_keep_the_size(tiny, generator):
    images = tiny.floats()
    one, two = (simclr.view(images, True, SimclrConfig(), generator=generator) for _ in range(2))
    assert one.shape == images.shape and one.min() >= 0 and one.max() <= 1 and (one - two).abs().mean() > 0.01
    still = SimclrConfig(jitter=0.0, least_area=1.0)
    flat = torch.full((2, 3, 8, 8), 0.25)
    assert torch.allclose(simclr.view(flat, False, still, generator=generator), flat, atol=1e-6)
    colored = simclr.view(flat, False, replace(still, jitter=0.5), generator=generator)
    assert torch.allclose(colored, colored[:, :, :1, :1].expand_as(colored)) and colored.flatten(1).std(1).min() > 0


def test_simclr_leaves_the_last_layer_and_looks_at_no_label(tiny):
    def learned(split):
        model = small_network()
        config = SimclrConfig(epochs=2, batch_size=12, lr=0.1)
        simclr.simclr(model, split, config, generator=torch.Generator().manual_seed(0))
        return model

    model, start = learned(tiny), small_network()
    assert torch.equal(model[9].weight, start[9].weight) and not torch.equal(model[0].weight, start[0].weight)
    assert same(state(model), state(learned(replace(tiny, labels=tiny.labels.flip(0)))))


def test_simclr_draws_views_of_one_image_together(tiny):
    model, split = small_network(), replace(tiny, crop_padding=0)
    config = SimclrConfig(epochs=15, batch_size=36, lr=0.2)

    def apart(network):
        points = [
            dbd.embeddings(
                network, simclr.view(split.floats(), False, config, generator=torch.Generator().manual_seed(s))
            )
            for s in (1, 2)
        ]
        unit = [F.normalize(p - p.mean(0), dim=1) for p in points]
        return (unit[0] * unit[1]).sum(1).mean().item()

    before = apart(model)
    simclr.simclr(model, split, config, generator=torch.Generator().manual_seed(0))
    assert apart(model) > before + 0.05


def test_symmetric_loss_by_hand():
    logits, labels = torch.tensor([[1.0, 2.0, 0.5]]), torch.tensor([0])
    p = logits.softmax(1)[0]
    by_hand = 0.1 * -p[0].log() + 2.0 * -(p[1] + p[2]) * torch.log(torch.tensor(1e-4))
    found = dbd.symmetric_loss(logits, labels, DbdConfig(alpha=0.1, beta=2.0))
    assert found.shape == (1,) and found.item() == pytest.approx(by_hand.item(), rel=1e-4)


def test_warm_up_trains_the_linear_layer_alone(tiny, generator):
    model = small_network()
    before = state(model)
    losses = dbd.warm_up(model, tiny, DbdConfig(warmup_epochs=4, warmup_lr=0.05, batch_size=12), generator=generator)
    changed = {name for name, value in state(model).items() if not torch.equal(value, before[name])}
    assert changed == {"9.weight", "9.bias"} and losses.shape == (36,)
    with torch.no_grad():
        by_hand = dbd.symmetric_loss(model.eval()(tiny.floats()), tiny.labels, DbdConfig())
    assert torch.allclose(losses, by_hand, atol=1e-4)


def test_the_lowest_losses_are_credible(tiny, generator, monkeypatch):
    seen = {}
    monkeypatch.setattr(dbd, "simclr", lambda *rest, **named: None)
    monkeypatch.setattr(dbd, "warm_up", lambda *rest, **named: torch.arange(36.0).flip(0))
    monkeypatch.setattr(
        dbd, "mixmatch", lambda m, labeled, unlabeled, *rest, **named: seen.update(a=labeled, b=unlabeled)
    )
    result = dbd.run(lambda g: small_network(), tiny, DbdConfig(credible=0.25), generator=generator)
    assert sorted(result.credible.tolist()) == list(range(27, 36))
    assert torch.equal(seen["a"].images, tiny.images[result.credible]) and len(seen["b"]) == 27


def test_guess_is_the_sharpened_mean_over_views(tiny):
    model = small_network().eval()
    views = [tiny.floats()[:4], tiny.floats()[4:8]]
    with torch.no_grad():
        mean = (model(views[0]).softmax(1) + model(views[1]).softmax(1)) / 2
    sharp = mean**2 / (mean**2).sum(1, keepdim=True)
    found = mixmatch.guessed(model, views, 0.5)
    assert torch.allclose(found, sharp, atol=1e-5) and not found.requires_grad


def test_mix_keeps_at_least_half_and_mixes_labels_alike():
    images = torch.eye(6).view(6, 1, 1, 6)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        mixed, wanted = mixmatch.mix(images, torch.eye(6), 0.75, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(mixed.view(6, 6), wanted)  # the same share, the same partner
    assert (wanted.diagonal() >= 0.5).all() and torch.allclose(wanted.sum(1), torch.ones(6)) and (wanted < 1).any()


def test_mixed_loss_by_hand():
    logits = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.5, 0.5]])
    wanted = torch.tensor([[0.7, 0.3], [0.1, 0.9], [0.2, 0.8]])
    supervised = -(wanted[0] * logits[0].log_softmax(0)).sum()
    squared = (logits[1:].softmax(1) - wanted[1:]).square().mean()
    assert mixmatch.mixed_loss(logits, wanted, 1, 3.0).item() == pytest.approx(
        (supervised + 3 * squared).item(), rel=1e-5
    )


def test_mixmatch_looks_at_no_label_of_the_unlabeled(tiny):
    labeled, unlabeled = tiny.subset(torch.arange(12)), tiny.subset(torch.arange(12, 36))
    config = MixmatchConfig(epochs=2, steps=4, batch_size=6)

    def trained(split):
        model = small_network()
        mixmatch.mixmatch(model, labeled, split, config, generator=torch.Generator().manual_seed(0))
        return state(model)

    wrong = replace(unlabeled, labels=unlabeled.labels.flip(0))
    assert same(trained(unlabeled), trained(wrong))
    other = replace(unlabeled, images=unlabeled.images.flip(0))
    assert not same(trained(unlabeled), trained(other))


def test_the_weight_of_the_unlabeled_part_rises(tiny, monkeypatch):
    weights = []
    loss = mixmatch.mixed_loss
    monkeypatch.setattr(mixmatch, "mixed_loss", lambda *rest: weights.append(rest[3]) or loss(*rest))
    config = MixmatchConfig(epochs=3, steps=2, batch_size=6, weight=9.0)
    half = tiny.subset(torch.arange(18))
    mixmatch.mixmatch(copy.deepcopy(small_network()), half, half, config, generator=torch.Generator().manual_seed(0))
    assert weights == pytest.approx([3, 3, 6, 6, 9, 9])


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (DbdConfig, {"credible": 1.0}, r"credible must be in \(0, 1\), got 1.0"),
        (DbdConfig, {"warmup_lr": 0.0}, "warmup_lr must be above 0"),
        (SimclrConfig, {"temperature": 0.0}, "temperature must be above 0"),
        (SimclrConfig, {"jitter": 1.0}, r"jitter must be in \[0, 1\), got 1.0"),
        (MixmatchConfig, {"steps": 0}, "steps must be above 0, got 0"),
        (MixmatchConfig, {"weight": -1.0}, "weight must not be negative, got -1.0"),
    ],
)
def test_bad_settings(kind, change, message):
    with pytest.raises(ValueError, match=message):
        kind(**change)
