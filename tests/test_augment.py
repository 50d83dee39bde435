"""Crops and flips, pixel by pixel."""

import torch

from bdlib.augment import crop_flip, cutout, pad_for_crops, random_resized_crop


def test_every_crop_is_a_window_of_its_own_image(generator):
    images = torch.randint(0, 256, (50, 3, 8, 8), generator=generator, dtype=torch.uint8)
    padded = pad_for_crops(images, 2)
    picks = torch.randperm(50, generator=generator)
    batch = crop_flip(padded, picks, 2, flip=True, generator=generator)
    seen = set()
    for k, pick in enumerate(picks):
        windows = {
            (dy, dx, f): padded[pick, :, dy : dy + 8, dx : dx + 8].flip(2)
            if f
            else padded[pick, :, dy : dy + 8, dx : dx + 8]
            for dy in range(5)
            for dx in range(5)
            for f in (0, 1)
        }
        matches = [where for where, window in windows.items() if torch.equal(window, batch[k])]
        assert matches
        seen.add(matches[0])
    assert len({where[:2] for where in seen}) > 10 and {where[2] for where in seen} == {0, 1}


def test_no_padding_and_no_flip_changes_nothing(tiny, generator):
    picks = torch.tensor([5, 0, 7])
    assert torch.equal(crop_flip(tiny.images, picks, 0, flip=False, generator=generator), tiny.images[picks])


def test_zoomed_copies_show_a_box_of_the_right_area(generator):
    ramp = torch.stack([torch.linspace(0, 1, 64).repeat(64, 1), torch.linspace(0, 1, 64).repeat(64, 1).T]).repeat(
        200, 1, 1, 1
    )
    zoomed = random_resized_crop(ramp, flip=False, generator=generator, scale=(0.25, 0.25))
    width = (zoomed[:, 0, 32, -1] - zoomed[:, 0, 32, 0]) * 64 / 63
    height = (zoomed[:, 1, -1, 32] - zoomed[:, 1, 0, 32]) * 64 / 63
    assert torch.allclose(width * height, torch.tensor(0.25), atol=0.02)
    assert (width / height).min() > 0.74 and (width / height).max() < 1.35
    assert zoomed[:, 0].mean((1, 2)).std() > 0.05  # not always the same place


def test_zoomed_copies_flip_half_of_the_images(generator):
    ramp = torch.linspace(0, 1, 32).repeat(400, 1, 32, 1)
    zoomed = random_resized_crop(ramp, flip=True, generator=generator)
    mirrored = (zoomed[:, 0, 16, 0] > zoomed[:, 0, 16, -1]).float().mean()
    assert 0.4 < mirrored < 0.6


def test_same_generator_same_batch(tiny, untouched):
    draw = lambda: random_resized_crop(tiny.floats(), True, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draw(), draw())


def test_cutout_is_one_black_square_cut_at_the_edges_with_every_center(generator):
    for size in (2, 3):
        images = torch.rand(600, 2, 5, 6, generator=generator) / 2 + 0.25
        before = images.clone()
        out = cutout(images, size, generator=generator)
        expected = {}
        for y in range(5):
            for x in range(6):
                hole = torch.zeros(5, 6, dtype=torch.bool)
                hole[max(y - size // 2, 0) : y - size // 2 + size, max(x - size // 2, 0) : x - size // 2 + size] = True
                expected[tuple(hole.flatten().tolist())] = (y, x)
        seen = {expected[tuple((image[0] == 0).flatten().tolist())] for image in out}
        assert len(seen) == 30 and torch.equal(images, before)
        black = (out == 0).all(1, keepdim=True)
        assert torch.equal(out, torch.where(black, 0.0, images))


def test_cutout_depends_on_the_generator_alone(tiny, untouched):
    draw = lambda seed: cutout(tiny.floats(), 3, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))
