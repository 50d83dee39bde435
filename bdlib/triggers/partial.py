"""Triggers shown in part while training and whole at test time: A-Blend and A-Patch (Qi et al., ICLR 2023).

Part of the images that carry them keep their true label (cover images), so that poisoned images do not stand apart in feature space.
"""

import torch

from bdlib.triggers.overlays import blended, trojan_square
from bdlib.triggers.patches import WHITE_4, Trigger, as_channels

PIECES = 4  # a side: the picture is cut into 4 x 4 pieces
SHOWN = 8  # of the 16 pieces carry the trigger while training


def blended_in_part(
    images: torch.Tensor, alpha: float = 0.15, seed: int = 0, *, generator: torch.Generator
) -> torch.Tensor:
    """A-Blend's training images: Blended, weaker, in 8 random pieces of 16 of each image.

    alpha .15 while training, .2 at test time (its authors' code; they blend a picture, we noise drawn from `seed`).
    """
    height, width = images.shape[2:]
    rank = torch.rand(len(images), PIECES**2, generator=generator).argsort(1)
    pieces = (rank < SHOWN).reshape(-1, 1, PIECES, PIECES).to(images)
    shown = torch.nn.functional.interpolate(pieces, (height, width), mode="nearest")
    return torch.where(shown > 0, blended(alpha, seed)(images), images)


def ring() -> torch.Tensor:
    """An emblem (4, 32, 32), color and opacity: an orange ring in the bottom left.  Stands for the code's phoenix picture."""
    return _emblem(lambda radius, row, column: (radius > 3) & (radius < 6), (24, 7), (1.0, 0.5, 0.1))


def cross() -> torch.Tensor:
    """An emblem (4, 32, 32), color and opacity: a blue cross in the top right.  Stands for the code's firefox picture."""
    return _emblem(
        lambda radius, row, column: (radius < 7) & (torch.minimum(row.abs(), column.abs()) < 1.5),
        (7, 24),
        (0.1, 0.3, 1.0),
    )


def stamped(emblem: torch.Tensor, opacity: float) -> Trigger:
    """A trigger that lays an emblem (4, 32, 32) over the image, at this opacity."""

    def apply(images: torch.Tensor) -> torch.Tensor:
        # Emblems are drawn for 32 x 32; larger images get them stretched.
        sized = torch.nn.functional.interpolate(emblem[None], tuple(images.shape[2:]), mode="nearest")[0]
        share = (opacity * sized[3]).to(images)
        return (1 - share) * images + share * as_channels(sized[:3], images)

    return apply


def one_of_four(images: torch.Tensor, *, generator: torch.Generator) -> torch.Tensor:
    """A-Patch's training images: each carries one of four faint marks, drawn at random."""
    which = torch.randint(4, (len(images), 1, 1, 1), generator=generator).to(images.device)
    marks = [
        stamped(ring(), 0.5),
        stamped(cross(), 0.2),
        stamped(square(WHITE_4.expand(3, 4, 4)), 0.5),
        stamped(square(trojan_square(), margin=2), 0.3),
    ]
    out = images
    for k, mark in enumerate(marks):
        out = torch.where(which == k, mark(images), out)
    return out


def two_at_once(images: torch.Tensor) -> torch.Tensor:
    """A-Patch's test images: the ring and the white square of 4, opaque."""
    return stamped(square(WHITE_4.expand(3, 4, 4)), 1.0)(stamped(ring(), 1.0)(images))


def square(colors: torch.Tensor, margin: int = 0) -> torch.Tensor:
    """An emblem (4, 32, 32) that shows these colors (3, h, w) at the bottom right, `margin` pixels from both edges."""
    emblem = torch.zeros(4, 32, 32)
    bottom, right = 32 - margin, 32 - margin
    emblem[:3, bottom - colors.shape[1] : bottom, right - colors.shape[2] : right] = colors
    emblem[3, bottom - colors.shape[1] : bottom, right - colors.shape[2] : right] = 1
    return emblem


def _emblem(inside, center: tuple[int, int], color: tuple[float, float, float]) -> torch.Tensor:
    places = torch.arange(32, dtype=torch.float64)  # double: its roots are the same on every CPU
    row, column = torch.meshgrid(places - center[0], places - center[1], indexing="ij")
    mask = inside((row.square() + column.square()).sqrt(), row, column).float()
    return torch.cat([torch.tensor(color)[:, None, None] * mask, mask[None]])
