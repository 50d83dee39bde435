"""Attacks that craft or learn something: what they make, step by step, and that every one of them can be used by its name."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bdlib import data, experiment, gpu, models, poison, profiles, train
from bdlib.attacks import catalog, input_aware, label_consistent, lira, pattern, ssba, wanet
from bdlib.attacks.attacker import Attacker
from bdlib.poison import Attack
from bdlib.train import TrainConfig
from tests.conftest import same, state

CPU = torch.device("cpu")


def fresh_model(generator):
    """A network for images of 3 classes and any size."""
    return models.build("wrn_16_1:4", torch.zeros(2, 3, 16, 16, dtype=torch.uint8), 3, generator=generator)


@pytest.fixture
def split():
    """48 images of 3 classes, 16 x 16, told apart by their brightest channel: three batches an epoch."""
    source = torch.Generator().manual_seed(1)
    labels = torch.arange(48) % 3
    images = torch.randint(0, 120, (48, 3, 16, 16), generator=source)
    images[torch.arange(48), labels] += 120
    return data.Dataset("split", images.to(torch.uint8), labels, ("red", "green", "blue"))


@pytest.fixture
def clean_model(split):
    model = fresh_model(torch.Generator().manual_seed(2))
    config = TrainConfig(epochs=8, batch_size=16, lr=0.1)
    return train.fit(model, split, config, generator=torch.Generator().manual_seed(3)).requires_grad_(False)


@pytest.fixture
def attacker(split, clean_model):
    return Attacker(
        train=split,
        wanted=lambda labels: torch.full_like(labels, 2),
        target_label=2,
        poison_rate=0.25,
        fresh_model=fresh_model,
        clean_model=lambda: clean_model,
        training=TrainConfig(epochs=3, batch_size=16, lr=0.05),
        quick=True,
        device=CPU,
        generator=lambda use: torch.Generator().manual_seed(len(use)),
    )


# TrojanNN and LF


def test_trojannn_drives_the_two_most_connected_units(attacker, clean_model, split, monkeypatch):
    with torch.no_grad():  # connections of every size, the largest of units 3 and 5
        clean_model.linear.weight.copy_(torch.linspace(0.1, 1, clean_model.linear.in_features).expand(3, -1))
        clean_model.linear.weight[:, [3, 5]] = 9.0
    chosen = []
    topk = torch.Tensor.topk

    def spy(values, count, **named):
        found = topk(values, count, **named)
        chosen.append(sorted(found.indices.tolist()))
        return found

    monkeypatch.setattr(torch.Tensor, "topk", spy)
    made = pattern.build(attacker)
    pattern.fit_trojannn(made, attacker)
    assert chosen == [[3, 5]]
    ellipse = made.pattern != 0
    drawn = torch.rand(made.pattern.shape, generator=torch.Generator().manual_seed(0)) * ellipse
    reached, by_chance = (clean_model.embed(picture[None])[0, [3, 5]].mean() for picture in (made.pattern, drawn))
    assert reached > by_chance + 0.02
    rows, columns = ellipse.any(0).nonzero().T
    assert rows.min() >= 8 and rows.max() <= 14 and columns.min() >= 8 and columns.max() <= 14  # 17..29, 18..28 of 32
    assert 0 <= made.pattern.min() and made.pattern.max() <= 1


def test_lf_is_smooth_small_and_pushes_a_clean_network_to_the_target(attacker, clean_model, split, monkeypatch):
    monkeypatch.setattr(pattern, "STEPS", (40, 1000))
    made = pattern.build(attacker)
    pattern.fit_lf(made, attacker)
    assert 0 <= made.pattern.min() and made.pattern.max() <= 0.2
    steps = (made.pattern.diff(dim=2).abs().mean() / made.pattern.std()).item()
    noise = torch.rand(made.pattern.shape, generator=torch.Generator().manual_seed(0))
    assert steps < 0.7 * (noise.diff(dim=2).abs().mean() / noise.std()).item()
    target = torch.full((48,), 2)
    crafted, constant = (
        F.cross_entropy(clean_model(images), target)
        for images in (made(split.floats()), (split.floats() + 0.1).clamp(0, 1))
    )
    assert crafted < 0.9 * constant


def test_a_pattern_is_added_and_clipped():
    made = pattern.Pattern(torch.Size([3, 4, 4]))
    made.pattern += 0.3
    images = torch.tensor([0.1, 0.9]).reshape(2, 1, 1, 1).expand(2, 3, 4, 4)
    assert torch.allclose(made(images)[:, 0, 0, 0], torch.tensor([0.4, 1.0]))


@pytest.mark.parametrize("size", [8, 16, 32])
def test_lf_blurs_images_of_any_size(size):
    """By hand: a Gaussian of 1/16 of the width along both axes, cut after twice its rounded sigma, one pixel's at least."""
    logits = torch.randn(3, size, size, generator=torch.Generator().manual_seed(0))
    sigma, reach = size / 16, 2 * max(1, round(size / 16))
    weights = torch.exp(-(torch.arange(-reach, reach + 1.0).square()) / (2 * sigma**2))
    padded = F.pad(logits.sigmoid()[None], [reach] * 4, mode="reflect")
    kernel = torch.outer(weights, weights).div(weights.sum() ** 2).expand(3, 1, -1, -1)
    blurred = 0.2 * F.conv2d(padded, kernel, groups=3)[0]
    assert torch.allclose(pattern._smooth(logits, sigma), blurred, atol=1e-6)
    assert blurred.std() < 0.8 * (0.2 * logits.sigmoid()).std()


# Label-consistent


def test_label_consistent_perturbs_within_the_bound_and_is_hard_to_read(attacker, clean_model, split):
    repel = label_consistent.build(attacker)
    own = split.floats()[split.labels == 2]
    out = repel(own)
    assert (out - own).abs().max() <= 8 / 255 + 1e-6 and 0 <= out.min() and out.max() <= 1
    labels = torch.full((len(own),), 2)
    before, after = (F.cross_entropy(clean_model(images), labels) for images in (own, out))
    assert after > 1.03 * before
    opposite = repel.__class__(clean_model, 0, steps=20)(own)
    assert F.cross_entropy(clean_model(opposite), labels) < after, "away from its own class, not from another"


def test_label_consistent_shows_corners_alone_at_the_test(attacker, split):
    stamps = label_consistent.stamps(label_consistent.build(attacker))
    images = split.floats()[:4]
    corners = torch.zeros(16, 16, dtype=torch.bool)
    for rows in (slice(0, 3), slice(13, 16)):
        for columns in (slice(0, 3), slice(13, 16)):
            corners[rows, columns] = True
    tested, trained = stamps.test(images), stamps.on_poisoned(images, torch.Generator())
    assert torch.equal(tested[:, :, ~corners], images[:, :, ~corners])
    assert torch.equal(tested[:, :, corners], trained[:, :, corners]) and not torch.equal(tested, images)
    assert not torch.equal(trained[:, :, ~corners], images[:, :, ~corners])


# WaNet


def test_wanet_poisons_each_batch_anew(attacker, monkeypatch):
    seen = {}
    monkeypatch.setattr(wanet, "fit_classifier", lambda *args, **named: seen.update(named))
    warped = wanet.build(attacker)
    wanet.fit(warped, attacker)
    images = torch.rand(16, 3, 16, 16, generator=torch.Generator().manual_seed(4))
    labels = torch.arange(16) % 2
    out, wanted = seen["change"](images, labels)
    assert torch.equal(out[:4], warped(images[:4])) and (wanted[:4] == 2).all()
    noisy = out[4:12]
    assert not torch.equal(noisy, images[4:12]) and not torch.equal(noisy, warped(images[4:12]))
    assert torch.equal(out[12:], images[12:]) and torch.equal(wanted[4:], labels[4:])


def test_the_training_loop_lets_an_attacker_change_a_batch(split):
    counts = []

    def change(images, labels):
        counts.append(len(images))
        return images, torch.zeros_like(labels)

    model = train.fit(
        fresh_model(torch.Generator().manual_seed(0)),
        split,
        TrainConfig(epochs=6, batch_size=16, lr=0.1),
        generator=torch.Generator().manual_seed(0),
        change=change,
    )
    assert counts == [16] * 18 and (train.predict(model, split.images) == 0).float().mean() > 0.9


# Input-aware


@pytest.fixture
def dynamic(attacker):
    return input_aware.build(attacker).eval()


def test_input_aware_puts_a_pattern_through_a_mask(dynamic, split):
    images = split.floats()[:3]
    with torch.no_grad():
        patterns, masks = dynamic.patterns(images), dynamic.masks(images)
        expected = images * (1 - masks) + patterns * masks
    assert torch.allclose(dynamic(images), expected, atol=1e-6)
    assert masks.shape == (3, 1, 16, 16) and patterns.min() >= 0 and patterns.max() <= 1


def test_input_aware_covers_carry_a_neighbors_trigger(dynamic, split):
    images = split.floats()[:3]
    stamps = input_aware.stamps(dynamic)
    with torch.no_grad():
        expected = dynamic.put(images, images.roll(1, 0))
    assert torch.equal(stamps.on_covers(images, torch.Generator()), expected)
    assert torch.equal(stamps.on_poisoned(images, torch.Generator()), stamps.test(images))
    assert not torch.equal(expected, stamps.test(images))


def test_input_aware_masks_become_small_then_stay(attacker, monkeypatch, untouched):
    dynamic = input_aware.build(attacker)
    batches = train.Batches(attacker.train, 16, CPU, generator=torch.Generator().manual_seed(0))
    images = attacker.train.floats()
    with torch.no_grad():
        dynamic.mask.last.bias += 0.3
        wide = dynamic.masks(images).mean()
    input_aware._fit_masks(dynamic, batches, epochs=12)
    narrow = dynamic.masks(images).mean()
    assert wide > 0.5 > narrow
    monkeypatch.setattr(input_aware, "_fit_masks", lambda *args, **named: None)
    masks, patterns, classifier = (state(part) for part in (dynamic.mask, dynamic.pattern, dynamic.classifier))
    input_aware.fit(dynamic, attacker)
    assert same(masks, state(dynamic.mask)) and not same(patterns, state(dynamic.pattern))
    assert not same(classifier, state(dynamic.classifier)) and not dynamic.training


@pytest.mark.parametrize(("usual", "used"), [(0.05, 0.05), (0.2, 0.1)])
def test_input_aware_trains_its_classifier_at_the_usual_rate_up_to_a_limit(attacker, monkeypatch, usual, used):
    rates, sgd = [], gpu.sgd
    monkeypatch.setattr(gpu, "sgd", lambda *args, lr, **named: rates.append(lr) or sgd(*args, lr=lr, **named))
    attacker = dataclasses.replace(attacker, training=TrainConfig(epochs=1, batch_size=16, lr=usual))
    input_aware.fit(input_aware.build(attacker), attacker)
    assert rates == [used]


def test_input_aware_trains_on_own_foreign_and_clean_images(dynamic, attacker, monkeypatch):
    images, labels = attacker.train.floats()[:16], attacker.train.labels[:16]
    seen = []
    monkeypatch.setattr(dynamic, "classifier", nn.Module())
    monkeypatch.setattr(
        dynamic.classifier, "forward", lambda x: seen.append(x) or torch.zeros(len(x), 3), raising=False
    )
    monkeypatch.setattr(F, "cross_entropy", lambda logits, wanted: seen.append(wanted) or logits.sum())
    input_aware._joint_loss(dynamic, images, labels, attacker)
    mixed, wanted = seen
    assert torch.equal(mixed[:4], dynamic.put(images[:4], images[:4])) and (wanted[:4] == 2).all()
    assert torch.allclose(mixed[4:8], dynamic.put(images[4:8], images[3:7]), atol=1e-5)
    assert torch.equal(mixed[8:], images[8:]) and torch.equal(wanted[4:], labels[4:])


def test_input_aware_pushes_the_patterns_of_poisoned_images_apart(dynamic, attacker):
    images, labels = attacker.train.floats()[:16], attacker.train.labels[:16]
    loss = input_aware._joint_loss(dynamic, images, labels, attacker)
    with torch.no_grad():
        mixed = torch.cat([dynamic.put(images[:4], images[:4]), dynamic.put(images[4:8], images[3:7]), images[8:]])
        wanted = torch.cat([torch.full((4,), 2), labels[4:]])
        patterns = dynamic.patterns(images[:4])
        apart = input_aware._closeness(images[:4], images[:4].roll(1, 0), patterns, patterns.roll(1, 0))
        expected = F.cross_entropy(dynamic.classifier(mixed), wanted) + apart
    assert apart > 0.1 and loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_input_aware_punishes_alike_patterns_of_different_images():
    a, b = torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)
    near, far = a + 0.1, a + 0.5
    closeness = input_aware._closeness
    assert closeness(a, b, a, near).item() == pytest.approx(10, rel=1e-3)
    assert closeness(a, b, a, far) < closeness(a, b, a, near) and closeness(a, a, a, near) == 0


# LIRA


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_lira_adds_epsilon_times_what_the_network_says(attacker, split, sign):
    trigger = lira.build(attacker).eval()
    with torch.no_grad():
        trigger.noise.last.weight.zero_()
        trigger.noise.last.bias.fill_(9.0 * sign)  # tanh of it is 1: the largest change there is
    inner = split.floats() * 0.9 + 0.05  # no pixel is cut
    assert torch.allclose(trigger(inner) - inner, torch.full_like(inner, sign * 0.01), atol=1e-6)
    ends = torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1).expand(2, 3, 16, 16)
    assert trigger(ends).min() >= 0 and trigger(ends).max() <= 1


def test_lira_trains_half_of_each_batch_triggered(attacker, split, monkeypatch):
    trigger = lira.build(attacker).eval()
    images, labels = split.floats()[:8], split.labels[:8]
    seen = []
    monkeypatch.setattr(F, "cross_entropy", lambda logits, wanted: seen.append((logits, wanted)) or logits.sum())
    lira._half_and_half(trigger, images, labels, attacker)
    (logits, wanted) = seen[0]
    assert wanted.tolist() == [2] * 4 + labels[4:].tolist()
    assert torch.allclose(logits, trigger.classifier(torch.cat([trigger.put(images[:4]), images[4:]])))


def test_lira_freezes_the_perturbation_after_a_third_of_the_epochs(attacker, untouched):
    trigger = lira.build(attacker)
    seen = []

    def watch(epochs):
        for epoch in epochs:
            yield epoch
            seen.append((state(trigger.noise), state(trigger.classifier)))

    lira.fit(trigger, dataclasses.replace(attacker, watch=watch))
    noises, classifiers = zip(*seen, strict=True)
    assert not same(noises[0], state(lira.build(attacker).noise)), "learned in the first third"
    assert same(noises[0], noises[1]) and same(noises[1], noises[2]), "frozen after it"
    assert not same(classifiers[1], classifiers[2])


# SSBA


def test_ssba_hides_the_secret_and_the_decoder_reads_it(attacker, split, monkeypatch):
    monkeypatch.setattr(ssba, "EPOCHS", (40, 20))
    monkeypatch.setattr(ssba, "BITS", (4, 100))
    trigger = ssba.build(attacker)
    ssba.fit(trigger, attacker)
    secrets = torch.randint(2, (48, 4), generator=torch.Generator().manual_seed(9)).float()
    with torch.no_grad():
        read = trigger.decoder(trigger.put(split.floats(), secrets)) > 0
        unmarked = trigger.decoder(split.floats()) > 0
    assert (read == secrets.bool()).float().mean() > 0.8
    assert (unmarked == secrets.bool()).float().mean() < 0.7, "an image without a string gives none away"
    assert (trigger(split.floats()) - split.floats()).square().mean() < 0.02, (
        "the string is hidden: without that aim it is .08"
    )


def test_ssba_puts_its_one_secret_into_every_image(attacker, split):
    trigger = ssba.build(attacker).eval()
    images = split.floats()[:3]
    with torch.no_grad():
        expected = trigger.put(images, trigger.secret.repeat(3, 1))
        other = trigger.put(images, 1 - trigger.secret.repeat(3, 1))
    assert torch.equal(trigger(images), expected) and not torch.equal(other, expected)
    assert set(trigger.secret.tolist()) == {0.0, 1.0}


# Images that the picture-to-picture network cannot halve three times


@pytest.mark.parametrize(("module", "name"), [(input_aware, "input_aware"), (lira, "lira"), (ssba, "ssba")])
@pytest.mark.parametrize("shape", [(12, 16), (16, 20)])
def test_a_size_that_is_no_multiple_of_8_is_refused_before_anything_is_made(attacker, split, module, name, shape):
    cut = dataclasses.replace(split, images=torch.zeros(48, 3, *shape, dtype=torch.uint8))
    attacker = dataclasses.replace(attacker, train=cut, fresh_model=lambda generator: pytest.fail("a network was made"))
    sizes = f"height and width are multiples of 8 pixels, got {shape[0]} x {shape[1]}"
    with pytest.raises(ValueError, match=f"attack '{name}' needs images whose {sizes}"):
        module.build(attacker)


# Every attack by its name


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Drawn images of 3 of ten classes' size, one epoch of training, a store of the test's own."""
    train_split, test = data.load("signs")
    parts = data.fixed_part(train_split, 160), data.fixed_part(test, 40)
    monkeypatch.setattr(data, "load", lambda name, root: parts)
    monkeypatch.setattr(profiles, "training", lambda profile, dataset: TrainConfig(epochs=1, batch_size=40, lr=0.05))
    monkeypatch.setattr(ssba, "EPOCHS", (1, 20))
    monkeypatch.setattr(pattern, "STEPS", (3, 1000))
    monkeypatch.setattr(lira, "EPSILON", 0.1)  # hardly trained, a smaller one rounds to nothing
    monkeypatch.setenv("BDLIB_HOME", str(tmp_path))
    return lambda attack: experiment.Setting(
        notebook="02_awm", profile="quick", dataset="signs", attack=attack, arch="wrn_16_1:2", budget=20, poison_rate=0.05,
        target_label=1, seed=0,
    )  # fmt: skip


@pytest.mark.parametrize("name", [*catalog.KINDS, "badnets_corners"])
def test_every_attack_works_by_its_name(small, name, untouched, capsys):
    lab = experiment.prepare(small(name), "cpu")
    kind = lab.setting.threat.kind
    assert len(lab.poisoned.indices) == 8 and len(lab.poisoned.covers) == 8 * kind.covers
    changed = (lab.poisoned.train.images != lab.train.images).flatten(1).any(1)
    carriers = torch.zeros(160, dtype=torch.bool)
    carriers[torch.cat([lab.poisoned.indices, lab.poisoned.covers])] = True
    assert not changed[~carriers].any() and changed[lab.poisoned.indices].all()
    assert (lab.poisoned.train.labels[lab.poisoned.indices] == 1).all()
    images = lab.test.floats()
    once, again = lab.stamps.test(images), lab.stamps.test(images)
    assert torch.equal(once, again) and once.min() >= 0 and once.max() <= 1 and torch.equal(images, lab.test.floats())
    rounded = (once * 255).round().to(torch.uint8)
    assert torch.equal(rounded, lab.triggered.test.images), "no wrap-around, one rounding"
    capsys.readouterr()
    second = experiment.prepare(small(name), "cpu")
    assert "once" not in capsys.readouterr().out, "everything came from the store"
    assert same(state(lab.model), state(second.model)) and torch.equal(
        lab.poisoned.train.images, second.poisoned.train.images
    )


def test_the_attackers_own_network_is_the_backdoored_one(small, monkeypatch):
    made = []
    kind = dataclasses.replace(
        catalog.KINDS["lira"],
        fit=lambda module, attacker: made.append(module) or module.classifier.linear.bias.data.fill_(7),
    )
    monkeypatch.setitem(catalog.KINDS, "lira", kind)
    lab = experiment.prepare(small("lira"), "cpu")
    assert len(made) == 1 and (lab.model.linear.bias == 7).all() and not lab.model.training
    assert not any(weight.requires_grad for weight in lab.model.parameters())


def test_too_much_clean_label_poison_is_refused_before_anything_is_trained(small, capsys):
    setting = dataclasses.replace(small("label_consistent"), poison_rate=0.5)
    with pytest.raises(ValueError, match=r"means 80; the pool 'target' allows 1 to \d+ \(class"):
        experiment.prepare(setting, "cpu")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", catalog.NOT_BUILT)
def test_an_attack_that_is_not_built_says_why(name):
    with pytest.raises(ValueError, match=f"attack '{name}' is not built: .{{30}}"):
        Attack(name=name)


def test_all_to_all_goes_with_any_attack_that_changes_labels(small):
    lab = experiment.prepare(small("l0_inv_a2a"), "cpu")
    assert torch.equal(lab.triggered.wanted, (lab.test.labels + 1) % 10)
    assert poison.poison(lab.train, Attack(name="wanet_a2a"), lab.stamps, generator=torch.Generator()).train is not None
