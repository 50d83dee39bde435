"""Triggers: functions that put the attacker's pattern on images, float32 (N, C, H, W) in [0, 1] in and out."""

import math
from collections.abc import Callable

import torch

Trigger = Callable[[torch.Tensor], torch.Tensor]

# Rows from top to bottom; 1 = white, 0 = black.
WHITE_3 = torch.ones(3, 3)
GRID_3 = torch.tensor([[0.0, 0, 1], [0, 1, 0], [1, 0, 1]])  # the checkerboard of ANP, ABL, RNP, CBD
WHITE_4 = torch.ones(4, 4)


def patch(pattern: torch.Tensor, margin: int = 0) -> Trigger:
    """A trigger that replaces the bottom right corner by `pattern` (h, w), `margin` pixels from both edges.

    Raises ValueError, when applied, if the patch is larger than the image.
    """

    def apply(images: torch.Tensor) -> torch.Tensor:
        height, width = images.shape[2:]
        bottom, right = height - margin, width - margin
        top, left = bottom - pattern.shape[0], right - pattern.shape[1]
        if top < 0 or left < 0:
            raise ValueError(
                f"a patch of {tuple(pattern.shape)} with margin {margin} does not fit an image of {height} x {width}"
            )
        triggered = images.clone()
        triggered[:, :, top:bottom, left:right] = pattern.to(images)
        return triggered

    return apply


def blended(alpha: float = 0.2, seed: int = 0) -> Trigger:
    """A trigger that mixes one fixed noise image into the whole picture: (1 - alpha) x + alpha * noise.

    alpha 0.2 as in Blended and ANP; the noise is uniform in [0, 1], the same for every image, drawn from `seed` once.
    Raises ValueError if alpha is not in (0, 1].
    """
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha must be in (0, 1], got {alpha}")

    def apply(images: torch.Tensor) -> torch.Tensor:
        noise = torch.rand(images.shape[1:], generator=torch.Generator().manual_seed(seed))
        return (1 - alpha) * images + alpha * noise.to(images)

    return apply


def signal(delta: float = 40 / 255, frequency: float = 6.0) -> Trigger:
    """A trigger that adds a horizontal sine wave to the whole picture: x + delta sin(2 pi j frequency / width), clipped to [0, 1].

    delta: amplitude in units of the image, frequency: waves across its width j, as in BackdoorBench's SIG.
    Raises ValueError if delta is not in (0, 1].
    """
    if not 0 < delta <= 1:
        raise ValueError(f"delta must be in (0, 1], got {delta}")

    def apply(images: torch.Tensor) -> torch.Tensor:
        width = images.shape[3]
        wave = delta * torch.sin(2 * math.pi * torch.arange(width) * frequency / width)
        return (images + wave.to(images)).clamp(0, 1)

    return apply


# Name -> how to make the trigger.  Sources: BackdoorBench (white 3 x 3), ANP, RNP, CBD (grid), AWM (white 4 x 4, one pixel off
# the corner), BackdoorBench and ANP (Blended, alpha .2; theirs blend an image file, ours fixed noise), BackdoorBench (the wave of SIG;
# here the labels of poisoned images are changed as in the other attacks, while SIG itself is a clean-label attack).
TRIGGERS: dict[str, Callable[[], Trigger]] = {
    "badnets": lambda: patch(WHITE_3),
    "badnets_grid": lambda: patch(GRID_3),
    "badnets_4x4": lambda: patch(WHITE_4, margin=1),
    "blended": blended,
    "signal": signal,
}


def make(name: str) -> Trigger:
    """The trigger of this name.  Raises ValueError if there is none."""
    if name not in TRIGGERS:
        raise ValueError(f"trigger must be one of {', '.join(TRIGGERS)}, got {name!r}")
    return TRIGGERS[name]()
