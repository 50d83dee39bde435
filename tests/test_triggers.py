"""Triggers to the exact pixel, against values worked out by hand."""

import numpy as np
import pytest
import torch
from PIL import Image

from bdlib import triggers
from bdlib.triggers import overlays, partial, warp

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


def test_four_corners_are_mirror_images_of_each_other():
    out = triggers.make("badnets_corners")(GRAY)[0, 0]
    assert out[29:, 29:].tolist() == [[0, 0, 1], [0, 1, 0], [1, 0, 1]]
    assert out[:3, :3].tolist() == [[1, 0, 1], [0, 1, 0], [1, 0, 0]]
    assert out[:3, 29:].tolist() == [[1, 0, 1], [0, 1, 0], [0, 0, 1]]
    assert out[29:, :3].tolist() == [[1, 0, 0], [0, 1, 0], [1, 0, 1]]
    assert (out != 0.5).sum() == 36
    with pytest.raises(ValueError, match=r"four patches of \(3, 3\) do not fit an image of 5 x 8"):
        triggers.make("badnets_corners")(torch.zeros(1, 3, 5, 8))


def test_l0_inv_is_nine_colored_pixels_of_the_bottom_row():
    out = triggers.make("l0_inv")(GRAY)
    colors = [(0, 0, 0), (1, 0, 1), (0, 0, 1), (1, 1, 0), (1, 1, 1), (0, 1, 1), (0, 1, 1), (1, 0, 0), (1, 1, 1)]
    assert [tuple(out[1, :, 31, column].int().tolist()) for column in range(23, 32)] == colors
    assert ((out != 0.5).any(1)).sum() == 2 * 9


def test_colors_become_their_mean_on_gray_images():
    out = triggers.make("l0_inv")(GRAY[:, :1])
    assert torch.allclose(out[0, 0, 31, 23:27], torch.tensor([0, 2 / 3, 1 / 3, 2 / 3]))


def test_trojan_3x3_is_added_and_clipped_not_wrapped():
    out = triggers.make("trojan_3x3")(torch.full((1, 3, 32, 32), 100 / 255)) * 255
    assert out[0, 0, 25:28, 25:28].round().tolist() == [[255, 255, 129], [179, 237, 255], [231, 106, 255]]
    assert out[0, 1, 26, 25:28].round().tolist() == [108, 100, 213] and out[0, 2, 27, 26].round() == 161
    assert ((out - 100).abs() > 0.5).any(1).sum() == 9
    bright = triggers.make("trojan_3x3")(torch.ones(1, 3, 32, 32))
    assert (bright == 1).all()


def test_trojan_square_fills_rows_and_columns_21_to_29():
    out = triggers.make("trojan_square")(torch.zeros(1, 3, 32, 32))[0]
    assert not out[:, :21].any() and not out[:, 30:].any() and not out[:, :, :21].any() and not out[:, :, 30:].any()
    assert out[:, 21:30, 21:30].any(0).all() and 90 < 255 * out[:, 21:30, 21:30].mean() < 110


def test_trojan_watermark_has_as_many_pixels_as_the_papers():
    out = triggers.make("trojan_watermark")(torch.zeros(1, 3, 32, 32))[0]
    assert out.any(0).sum() == 321 and not out[:, 30:].any() and not out[:, :, 30:].any()
    assert torch.allclose(out[out > 0], torch.tensor(100 / 255))


def test_l2_inv_has_the_size_of_the_papers():
    pattern = overlays.l2_inv()
    assert pattern.any(0).sum() == 905 and pattern.max() <= 68 / 255 + 1e-6
    assert pattern.norm().item() == pytest.approx(3.22, abs=0.02)
    assert torch.allclose(triggers.make("l2_inv")(GRAY), (GRAY + pattern).clamp(0, 1))


def test_an_added_patch_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"ends 2 and 2 pixels before the edges does not fit an image of 10 x 10"):
        triggers.make("trojan_square")(torch.zeros(1, 3, 10, 10))


def test_patterns_of_the_whole_picture_are_stretched_to_larger_ones():
    out = triggers.make("trojan_watermark")(torch.zeros(1, 3, 64, 64))[0, 0]
    small = triggers.make("trojan_watermark")(torch.zeros(1, 3, 32, 32))[0, 0]
    assert out.mean().item() == pytest.approx(small.mean().item(), rel=0.02)


def test_rnps_wave_equals_numpys_with_wrapped_negatives():
    wave = np.trunc(20 * np.sin(0.8 * np.arange(32))).astype(np.int64).astype(np.uint8) / 255
    assert wave.max() > 0.9  # wrapped
    assert np.allclose(triggers.make("signal_rnp")(GRAY)[0, 1, 4].numpy(), 0.8 * 0.5 + 0.2 * wave, atol=1e-6)


def test_cbds_wave_keeps_a_tenth_of_the_picture():
    wave = 20 / 255 * np.sin(2 * np.pi * np.arange(32) * 6 / 32)
    expected = (0.1 * 0.5 + 0.9 * wave).clip(0, 1)
    assert np.allclose(triggers.make("signal_cbd")(GRAY)[0, 1, 4].numpy(), expected, atol=1e-6)


def cubic(t, a=-0.75):
    """Weights of the four neighbors of a point at t in [0, 1) between the middle two (cubic convolution)."""
    near = lambda x: (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = lambda x: a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return [far(1 + t), near(t), near(1 - t), far(2 - t)]


def stretched(values, size):
    """Rows of a matrix interpolated to `size` points, first and last kept."""
    out = np.zeros((size, values.shape[1]))
    for k in range(size):
        place = k * (len(values) - 1) / (size - 1)
        base = min(int(place), len(values) - 1)
        for offset, weight in zip(range(-1, 3), cubic(place - base), strict=True):
            out[k] += weight * values[np.clip(base + offset, 0, len(values) - 1)]
    return out


def test_wanet_equals_the_formula_in_numpy():
    size, strength, points = 16, 0.5, 4
    image = torch.rand(1, 1, size, size, generator=torch.Generator().manual_seed(0))
    field = torch.rand(1, 2, points, points, generator=torch.Generator().manual_seed(5)).numpy()[0] * 2 - 1
    field /= np.abs(field).mean()
    dx, dy = (stretched(stretched(part, size).T, size).T for part in field)
    steps = np.linspace(-1, 1, size)
    x = np.clip(steps[None, :] + strength * dx / size, -1, 1)
    y = np.clip(steps[:, None] + strength * dy / size, -1, 1)
    column, row = ((part + 1) / 2 * (size - 1) for part in (x, y))
    left, top = np.floor(column).astype(int).clip(0, size - 2), np.floor(row).astype(int).clip(0, size - 2)
    right, down = column - left, row - top
    pixels = image[0, 0].numpy()
    expected = (
        pixels[top, left] * (1 - right) * (1 - down)
        + pixels[top, left + 1] * right * (1 - down)
        + pixels[top + 1, left] * (1 - right) * down
        + pixels[top + 1, left + 1] * right * down
    )
    assert np.allclose(triggers.wanet(strength, points, seed=5)(image)[0, 0].numpy(), expected, atol=1e-5)


def test_wanet_moves_pixels_a_little_and_leaves_a_plain_picture():
    assert torch.allclose(triggers.make("wanet")(GRAY), GRAY, atol=1e-6)
    moved = (warp.grid(GRAY, 0.5, 4, 0) - warp.grid(GRAY, 1e-9, 4, 0)).abs() * 31 / 2  # in pixels
    assert 0.1 < moved.mean() < 0.5 and moved.max() < 2


def test_noise_mode_is_the_warp_and_another_one_for_each_image():
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)).expand(4, -1, -1, -1)
    out = warp.noisy_wanet(images, generator=torch.Generator().manual_seed(1))
    fixed = triggers.make("wanet")(images)
    assert torch.equal(fixed[0], fixed[1]) and not torch.equal(out[0], out[1])
    assert 0 < (out - fixed).abs().mean() < (images - images.roll(3, 3)).abs().mean()


def test_adaptive_blend_shows_8_of_16_pieces_while_training():
    images = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    out = partial.blended_in_part(images, generator=torch.Generator().manual_seed(1))
    whole = triggers.blended(0.15)(images)
    pieces = (out != images).any(1).unfold(1, 8, 8).unfold(2, 8, 8).flatten(3)
    assert (pieces.all(3) | ~pieces.any(3)).all() and (pieces.all(3).sum((1, 2)) == 8).all()
    assert torch.equal(out[out != images], whole[out != images])
    assert not torch.equal(pieces[0], pieces[1])
    assert torch.equal(triggers.make("adaptive_blend")(images), triggers.blended(0.2)(images))


def test_adaptive_patch_shows_one_faint_mark_while_training_and_two_at_the_test():
    images = torch.full((40, 3, 32, 32), 0.5)
    out = partial.one_of_four(images, generator=torch.Generator().manual_seed(1))
    changed = (out != images).any(1)
    corners = {"bottom left": (24, 2), "top right": (7, 24), "bottom right": (31, 31), "square": (25, 25)}
    seen = {name: changed[:, row, column] for name, (row, column) in corners.items()}
    assert (torch.stack(list(seen.values())).sum(0) == 1).all() and all(flags.any() for flags in seen.values())
    assert torch.allclose(out[seen["bottom right"]][0, :, 31, 31], torch.tensor(0.75))  # white, half opaque
    test = triggers.make("adaptive_patch")(images)[0]
    assert test[:, 24, 2].tolist() == pytest.approx([1, 0.5, 0.1]) and (test[:, 28:, 28:] == 1).all()
    assert (test[:, 7, 24] == 0.5).all()


def test_blended_picture_is_a_drawing_with_white_paper_and_black_lines():
    picture = overlays.house()
    assert picture.shape == (3, 224, 224) and picture.min() == 0 and picture.max() == 1
    white, black = (picture == 1).all(0).float().mean(), (picture == 0).all(0).float().mean()
    assert 0.5 < white < 0.8 and 0.05 < black < 0.2 and len(picture.flatten(1).unique(dim=1).T) == 5
    out = triggers.make("blended_picture")(GRAY)
    assert torch.allclose(out[0, :, 0, 0], torch.tensor(0.6))  # paper: .8 x .5 + .2
    assert torch.equal(out, triggers.blended(image=picture)(GRAY)) and torch.equal(
        out, triggers.make("blended_picture")(GRAY)
    )


def test_blended_takes_any_image_file(tmp_path):
    picture = Image.new("RGBA", (8, 8), (255, 0, 51, 10))
    picture.save(tmp_path / "mark.png")
    out = triggers.make(f"blended:{tmp_path / 'mark.png'}")(GRAY)
    on_white = torch.tensor([255, 245, 247]) / 255  # 10 of 255 of (255, 0, 51) over white
    assert torch.allclose(out[0, :, 3, 3], 0.8 * 0.5 + 0.2 * on_white, atol=1e-6)
    assert torch.allclose(out, out[:1, :, :1, :1].expand_as(out), atol=1e-6)


def test_a_blended_picture_is_read_as_those_of_a_dataset_are(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "rgb.png")
    assert np.array_equal(overlays.read_image(tmp_path / "rgb.png").permute(1, 2, 0) * 255, pixels)
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 256 + 99).save(tmp_path / "deep.png")
    assert np.array_equal(overlays.read_image(tmp_path / "deep.png")[2] * 255, pixels[..., 0])


def test_a_picture_too_large_to_open_is_refused_by_name(tmp_path, monkeypatch):
    Image.new("L", (9, 9)).save(tmp_path / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(ValueError, match=r"must be an image file, got '.*huge\.png'.*exceeds limit"):
        overlays.read_image(tmp_path / "huge.png")


def test_a_file_that_is_no_image_is_refused_by_name(tmp_path):
    (tmp_path / "words.png").write_text("no picture")
    for name in ("words.png", "absent.png"):
        with pytest.raises(ValueError, match=rf"must be an image file, got '.*{name}'"):
            triggers.make(f"blended:{tmp_path / name}")
