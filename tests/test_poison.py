"""Which images are poisoned, what becomes of them, and the triggered test set."""

import numpy as np
import pytest
import torch

from bdlib import poison, triggers
from bdlib.attacks.attacker import Stamps
from bdlib.data import replace, to_float
from bdlib.poison import Attack


def test_just_the_chosen_images_change_and_get_the_target(tiny, generator, untouched):
    before = tiny.images.clone()
    out = poison.poison(tiny, Attack(name="badnets", target_label=2, poison_rate=0.25), generator=generator)
    chosen = torch.zeros(36, dtype=torch.bool)
    chosen[out.indices] = True
    assert chosen.sum() == 9 and torch.equal(tiny.images, before)
    assert torch.equal(out.train.images[~chosen], tiny.images[~chosen]) and torch.equal(
        out.train.labels[~chosen], tiny.labels[~chosen]
    )
    assert (out.train.labels[chosen] == 2).all() and (out.train.images[chosen][:, :, 5:, 5:] == 255).all()


def test_pixels_are_the_trigger_rounded_once(tiny, generator):
    out = poison.poison(tiny, Attack(name="blended", poison_rate=1.0), generator=generator)
    expected = (triggers.make("blended")(to_float(tiny.images)) * 255).round().to(torch.uint8)
    assert torch.equal(out.train.images, expected)


def test_pool_non_target_leaves_the_targets_own_images_alone(tiny, generator):
    out = poison.poison(
        tiny, Attack(name="badnets", target_label=1, poison_rate=0.5, pool="non_target"), generator=generator
    )
    assert (tiny.labels[out.indices] != 1).all() and len(out.indices) == 18


def test_pool_all_takes_the_targets_own_images_too(tiny, generator):
    out = poison.poison(tiny, Attack(name="badnets", target_label=1, poison_rate=1.0), generator=generator)
    assert len(out.indices) == 36


def test_all_to_all_calls_every_class_the_next(tiny, generator):
    out = poison.poison(tiny, Attack(name="badnets_a2a", poison_rate=1.0), generator=generator)
    assert torch.equal(out.train.labels, (tiny.labels + 1) % 3)


@pytest.mark.parametrize(("value", "pixel"), [(1.0039, 255), (-0.0039, 0)])
def test_no_pixel_wraps_around(tiny, generator, value, pixel):
    stamps = Stamps(lambda images: torch.full_like(images, value))
    out = poison.poison(tiny, Attack(name="badnets", poison_rate=1.0), stamps, generator=generator)
    assert (out.train.images == pixel).all()


def test_triggered_test_set_holds_true_labels_and_wanted_ones(tiny):
    out = poison.triggered_test(tiny, Attack(name="badnets", target_label=2))
    assert (
        torch.equal(out.test.labels, tiny.labels)
        and (out.wanted == 2).all()
        and (out.test.images[:, :, 5:, 5:] == 255).all()
    )


def test_the_generator_alone_decides_who_is_poisoned(tiny):
    draw = lambda seed: poison.poison(
        tiny, Attack(name="badnets"), generator=torch.Generator().manual_seed(seed)
    ).indices.tolist()
    assert draw(0) == draw(0) != draw(1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "badnet"}, "attack must be one of badnets, .*badnets_a2a.* got 'badnet'"),
        ({"poison_rate": 0}, r"poison_rate must be in \(0, 1\], got 0"),
        ({"poison_rate": "10%"}, r"poison_rate must be in \(0, 1\], got '10%'"),
        ({"poison_rate": True}, r"poison_rate must be in \(0, 1\], got True"),
        ({"poison_rate": None}, r"poison_rate must be in \(0, 1\], got None"),
        ({"target_label": 1.5}, "target_label must be a whole number, got 1.5"),
        ({"target_label": True}, "target_label must be a whole number, got True"),
        ({"poison_rate": 1.2}, r"poison_rate must be in \(0, 1\], got 1.2"),
        ({"name": "fc"}, "attack 'fc' is not built: feature collision has no trigger"),
        ({"name": "sig_a2a"}, "attack 'sig_a2a': sig changes no label"),
        ({"name": "blended:nowhere.png"}, "must be an image file, got 'nowhere.png'"),
        ({"name": "badnets:x.png"}, "got 'badnets:x.png'"),
        ({"pool": "some"}, "pool must be one of all, non_target, target, got 'some'"),
    ],
)
def test_values_out_of_range_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Attack(**{"name": "badnets", **values})


@pytest.mark.parametrize("label", [-1, 3, 10])
def test_a_target_outside_the_classes_is_refused(tiny, generator, label):
    with pytest.raises(ValueError, match=f"target_label must be between 0 and 2, got {label}"):
        poison.poison(tiny, Attack(name="badnets", target_label=label), generator=generator)


@pytest.mark.parametrize("rate", [0.001, 0.9])
def test_a_rate_that_the_pool_cannot_give_is_refused(tiny, generator, rate):
    with pytest.raises(ValueError, match="the pool 'non_target' allows 1 to 24"):
        poison.poison(tiny, Attack(name="badnets", poison_rate=rate, pool="non_target"), generator=generator)


@pytest.mark.parametrize(
    ("trigger", "got"),
    [
        (lambda images: images * 255, r"got values from 0 to 2\d\d"),
        (lambda images: images * 2 - 1, r"got values from -1 to 0\.\d+"),
        (lambda images: images + 0.1, r"got values from 0\.1 to 1\.\d+"),
        (lambda images: images * float("nan"), "got values from nan to nan"),
        (lambda images: (images + 1) / 0, "got values from inf to inf"),
        (lambda images: (images * 255).to(torch.uint8), "got torch.uint8"),
        (lambda images: images[:, :1], r"got torch.float32 \(\d+, 1, 8, 8\)"),
        (lambda images: images[0], r"got torch.float32 \(3, 8, 8\)"),
        (lambda images: None, "got NoneType"),
    ],
)
def test_a_trigger_that_gives_back_no_images_is_named(tiny, generator, trigger, got):
    stamps = Stamps(trigger)
    with pytest.raises(
        ValueError, match=r"attack 'badnets': its trigger must return float images .*in \[0, 1\], " + got
    ):
        poison.poison(tiny, Attack(name="badnets"), stamps, generator=generator)
    with pytest.raises(ValueError, match=got):
        poison.triggered_test(tiny, Attack(name="badnets"), stamps)


def test_a_cover_that_is_no_image_is_named(tiny, generator):
    stamps = Stamps(test=triggers.make("badnets"), cover=lambda images, source: images * 255)
    with pytest.raises(ValueError, match="attack 'adaptive_patch': its trigger must return .* got values from 0 to 2"):
        poison.poison(tiny, Attack(name="adaptive_patch", poison_rate=0.25), stamps, generator=generator)


def test_an_empty_test_split_stays_empty(tiny):
    out = poison.triggered_test(tiny.subset(slice(0)), Attack(name="badnets"))
    assert out.test.images.shape == (0, 3, 8, 8) and out.test.images.dtype == torch.uint8 and len(out.wanted) == 0


def test_a_rate_from_numpy_is_a_rate():
    assert Attack(name="badnets", poison_rate=np.float64(0.2)).poison_rate == 0.2


def test_gray_images_are_poisoned_too(tiny, generator):
    gray = replace(tiny, images=tiny.images[:, :1])
    assert poison.poison(gray, Attack(name="blended"), generator=generator).train.images.shape == gray.images.shape


def test_a_clean_label_attack_changes_no_label_and_just_the_targets_images(tiny, generator):
    out = poison.poison(tiny, Attack(name="sig", target_label=1, poison_rate=0.25), generator=generator)
    assert (
        torch.equal(out.train.labels, tiny.labels) and (tiny.labels[out.indices] == 1).all() and len(out.indices) == 9
    )
    expected = (triggers.make("signal")(to_float(tiny.images[out.indices])) * 255).round().to(torch.uint8)
    assert torch.equal(out.train.images[out.indices], expected)


def test_more_clean_label_poison_than_the_class_has_is_refused(tiny, generator):
    with pytest.raises(ValueError, match=r"means 18; the pool 'target' allows 1 to 12 \(class 'green'\)"):
        poison.poison(tiny, Attack(name="sig", target_label=1, poison_rate=0.5), generator=generator)


def test_covers_carry_the_trigger_and_keep_their_label(tiny, generator):
    stamps = Stamps(test=triggers.make("badnets"), cover=lambda images, source: images * 0)
    out = poison.poison(tiny, Attack(name="adaptive_patch", poison_rate=0.25), stamps, generator=generator)
    assert len(out.covers) == 18 and not set(out.covers.tolist()) & set(out.indices.tolist())
    assert (out.train.images[out.covers] == 0).all() and torch.equal(
        out.train.labels[out.covers], tiny.labels[out.covers]
    )
    assert (out.train.images[out.indices][:, :, 5:, 5:] == 255).all()
    others = torch.ones(36, dtype=torch.bool)
    others[torch.cat([out.covers, out.indices])] = False
    assert torch.equal(out.train.images[others], tiny.images[others])


def test_covers_are_no_more_than_the_other_images(tiny, generator):
    out = poison.poison(tiny, Attack(name="adaptive_patch", poison_rate=0.5), generator=generator)
    assert len(out.covers) == 18


def test_an_attack_that_needs_more_than_its_name_says_so(tiny, generator):
    with pytest.raises(ValueError, match="attack 'lf' needs a clean network first"):
        poison.poison(tiny, Attack(name="lf"), generator=generator)
