"""Triggers to the exact pixel, against values worked out by hand."""

import numpy as np
import pytest
import torch

from bdlib import triggers

GRAY = torch.full((2, 3, 32, 32), 0.5)


def test_white_square_of_3_in_the_corner():
    expected = GRAY.clone()
    expected[:, :, 29:32, 29:32] = 1
    assert torch.equal(triggers.make("badnets")(GRAY), expected)


def test_checkerboard_of_3_in_the_corner():
    out = triggers.make("badnets_grid")(GRAY)
    assert out[0, 1, 29:, 29:].tolist() == [[0, 0, 1], [0, 1, 0], [1, 0, 1]]
    assert (out != GRAY).sum() == 2 * 3 * 9


def test_white_square_of_4_one_pixel_off_the_corner():
    expected = GRAY.clone()
    expected[:, :, 27:31, 27:31] = 1
    assert torch.equal(triggers.make("badnets_4x4")(GRAY), expected)


def test_blended_is_the_formula_with_one_fixed_noise_image():
    images = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    out = triggers.blended(alpha=0.3, seed=4)(images)
    noise = (out - 0.7 * images) / 0.3
    assert np.allclose(noise.numpy(), noise[0].numpy(), atol=1e-5)
    assert (
        0 <= noise.min() + 1e-5 and noise.max() <= 1 + 1e-5 and 0.27 < noise.std() < 0.31
    )  # uniform in [0, 1]: 1 / sqrt(12)
    assert torch.equal(triggers.blended(alpha=0.3, seed=4)(images), out)
    assert not torch.equal(triggers.blended(alpha=0.3, seed=5)(images), out)


@pytest.mark.parametrize("name", triggers.TRIGGERS)
def test_every_trigger_keeps_its_input_and_the_range(name, untouched):
    images = torch.rand(4, 1, 16, 16, generator=torch.Generator().manual_seed(2))
    before = images.clone()
    out = triggers.make(name)(images)
    assert torch.equal(images, before) and out.shape == images.shape and not torch.equal(out, images)
    assert out.min() >= 0 and out.max() <= 1


def test_a_patch_larger_than_the_image_is_refused():
    with pytest.raises(ValueError, match=r"patch of \(4, 4\) with margin 1 does not fit an image of 4 x 4"):
        triggers.make("badnets_4x4")(torch.zeros(1, 3, 4, 4))


@pytest.mark.parametrize("alpha", [0, -0.2, 1.5])
def test_alpha_outside_its_range_is_refused(alpha):
    with pytest.raises(ValueError, match=rf"alpha must be in \(0, 1\], got {alpha}"):
        triggers.blended(alpha)


def test_unknown_trigger_says_what_is_allowed():
    with pytest.raises(ValueError, match="one of badnets, .*, got 'badnet'"):
        triggers.make("badnet")


def test_signal_is_a_sine_across_the_width():
    wide = torch.full((2, 3, 5, 24), 0.5)
    # 6 waves of 4 pixels each: the sine is 0, 1, 0, -1
    expected = torch.tensor([0.5, 0.5 + 40 / 255, 0.5, 0.5 - 40 / 255]).repeat(6).expand(2, 3, 5, 24)
    assert torch.allclose(triggers.make("signal")(wide), expected, atol=1e-6)
    by_hand = 0.5 + 0.1 * np.sin(2 * np.pi * np.arange(32) * 2 / 32)
    assert np.allclose(triggers.signal(delta=0.1, frequency=2)(GRAY)[1, 2, 7].numpy(), by_hand, atol=1e-6)


def test_signal_is_clipped_to_the_range():
    images = torch.tensor([0.5, 0.9, 0.3, 0.1]).expand(1, 1, 2, 4)
    out = triggers.signal(delta=0.4, frequency=1)(images)
    assert torch.allclose(out, torch.tensor([0.5, 1.0, 0.3, 0.0]).expand(1, 1, 2, 4), atol=1e-6)
    assert out.max() <= 1 and out.min() >= 0


@pytest.mark.parametrize("delta", [0, -0.1, 40])
def test_delta_outside_its_range_is_refused(delta):
    with pytest.raises(ValueError, match=rf"delta must be in \(0, 1\], got {delta}"):
        triggers.signal(delta)
