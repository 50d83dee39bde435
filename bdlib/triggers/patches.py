"""Triggers that replace a few pixels: squares, four corners, L0-inv."""

from collections.abc import Callable

import torch

Trigger = Callable[[torch.Tensor], torch.Tensor]

# Rows from top to bottom; 1 = white, 0 = black.
WHITE_3 = torch.ones(3, 3)
GRID_3 = torch.tensor([[0.0, 0, 1], [0, 1, 0], [1, 0, 1]])  # the checkerboard of ANP, ABL, RNP, CBD
WHITE_4 = torch.ones(4, 4)
# Nine pixels of the bottom row, columns 23 to 31 of 32, left to right: red, green, blue (l0_inv.png and mask.npy of I-BAU's code).
L0_INV = torch.tensor(
    [[0, 0, 0], [1, 0, 1], [0, 0, 1], [1, 1, 0], [1, 1, 1], [0, 1, 1], [0, 1, 1], [1, 0, 0], [1, 1, 1]],
    dtype=torch.float32,
).T.unsqueeze(1)


def patch(pattern: torch.Tensor, margin: int = 0) -> Trigger:
    """A trigger that replaces the bottom right corner by `pattern`, (h, w) or (3, h, w), `margin` pixels from both edges.

    Raises ValueError, when applied, if the patch is larger than the image.
    """

    def apply(images: torch.Tensor) -> torch.Tensor:
        height, width = images.shape[2:]
        bottom, right = height - margin, width - margin
        top, left = bottom - pattern.shape[-2], right - pattern.shape[-1]
        if top < 0 or left < 0:
            raise ValueError(
                f"a patch of {tuple(pattern.shape[-2:])} with margin {margin} does not fit an image of {height} x {width}"
            )
        triggered = images.clone()
        triggered[:, :, top:bottom, left:right] = as_channels(pattern, images)
        return triggered

    return apply


def corners(pattern: torch.Tensor) -> Trigger:
    """A trigger that replaces all four corners by `pattern` (h, w), mirrored so that each corner is like the bottom right one.

    The test-time trigger of label-consistent attacks.  Raises ValueError, when applied, if two corners would overlap.
    """

    def apply(images: torch.Tensor) -> torch.Tensor:
        height, width = images.shape[2:]
        if 2 * pattern.shape[0] > height or 2 * pattern.shape[1] > width:
            raise ValueError(f"four patches of {tuple(pattern.shape)} do not fit an image of {height} x {width}")
        place = patch(pattern)
        triggered = images
        for sides in ((), (2,), (3,), (2, 3)):
            triggered = place(triggered.flip(sides)).flip(sides)
        return triggered

    return apply


def as_channels(pattern: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """A pattern (h, w) or (3, h, w) on the images' device; the mean of its colors where images have another number of channels."""
    if pattern.ndim == 3 and len(pattern) != images.shape[1]:
        pattern = pattern.mean(0)
    return pattern.to(images)
