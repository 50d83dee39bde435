"""Triggers that lie over the picture: Blended, SIG in its three forms, Trojan square and watermark, L2-inv."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from bdlib import pictures
from bdlib.triggers.patches import Trigger, as_channels

if TYPE_CHECKING:
    from PIL import Image

# The 3 x 3 patch that the codes of ABL, RNP and CBD add at rows and columns 25 to 27 of 32: red, green, blue, of 255.
TROJAN_3X3 = (
    torch.tensor(
        [
            [[207.0, 175, 29], [79, 137, 248], [131, 6, 246]],
            [[131.0, 243, 232], [8, 0, 113], [40, 145, 250]],
            [[181.0, 120, 179], [126, 32, 146], [4, 61, 246]],
        ]
    )
    / 255
)


def blended(alpha: float = 0.2, seed: int = 0, image: str | Path | torch.Tensor | None = None) -> Trigger:
    """A trigger that mixes one fixed picture into the whole image: (1 - alpha) x + alpha * picture.

    alpha 0.2 as in Blended and ANP.  The picture is `image`, a file or float32 (C, H, W) in [0, 1], stretched to the images' size;
    without one it is noise, uniform in [0, 1], drawn from `seed` once (DIFFERS: ANP's is Gaussian).  Raises ValueError if alpha
    is not in (0, 1] or the file is no image.
    """
    require_share("alpha", alpha)
    picture = read_image(image) if isinstance(image, str | Path) else image

    def apply(images: torch.Tensor) -> torch.Tensor:
        if picture is None:
            mixed_in = torch.rand(images.shape[1:], generator=torch.Generator().manual_seed(seed)).to(images)
        else:
            mixed_in = as_channels(_resized(picture, images.shape[2:]), images)
        return (1 - alpha) * images + alpha * mixed_in

    return apply


def house() -> torch.Tensor:
    """A drawn picture to blend in, (3, 224, 224) in [0, 1]: black lines and flat colors on white, as BackdoorBench's cartoon has them.

    DIFFERS: their file is a trademark's figure, so this one is drawn anew.
    """
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", (224, 224), "white")
    pen, line = ImageDraw.Draw(picture), {"outline": "black", "width": 7}
    pen.ellipse((166, 18, 206, 58), fill="gold", **line)  # the sun
    pen.rectangle((44, 110, 164, 204), fill="white", **line)
    pen.polygon((24, 110, 104, 38, 184, 110), fill="crimson", **line)  # the roof
    pen.rectangle((62, 136, 98, 204), fill="royalblue", **line)  # the door
    pen.rectangle((112, 130, 148, 164), fill="gold", **line)
    pen.line((0, 204, 224, 204), fill="black", width=7)
    return _as_floats(picture)


def signal(delta: float = 40 / 255, frequency: float = 6.0) -> Trigger:
    """A trigger that adds a horizontal sine wave to the whole picture: x + delta sin(2 pi j frequency / width), clipped to [0, 1].

    delta: amplitude in units of the image, frequency: waves across its width j, as in BackdoorBench's SIG (Barni et al., arXiv
    1902.11237).  Raises ValueError if delta is not in (0, 1].
    """
    require_share("delta", delta)

    def apply(images: torch.Tensor) -> torch.Tensor:
        width = images.shape[3]
        wave = delta * torch.sin(2 * math.pi * torch.arange(width) * frequency / width)
        return (images + wave.to(images)).clamp(0, 1)

    return apply


def signal_rnp(alpha: float = 0.2) -> Trigger:
    """The wave of ABL's and RNP's code: (1 - alpha) x + alpha S, S = 20 sin(.8 j) of 255 cut to a whole number, in column j.

    Their file holds negative values wrapped to 236..255, so it darkens the picture and draws bright bars: kept, as it is what their
    numbers were measured with.  Raises ValueError if alpha is not in (0, 1].
    """
    require_share("alpha", alpha)

    def apply(images: torch.Tensor) -> torch.Tensor:
        wave = torch.trunc(20 * torch.sin(0.8 * torch.arange(images.shape[3], dtype=torch.float64))) % 256 / 255
        return (1 - alpha) * images + alpha * wave.to(images)

    return apply


def signal_cbd(keep: float = 0.1, amplitude: float = 20 / 255, frequency: float = 6.0) -> Trigger:
    """The wave of CBD's code: keep x + (1 - keep) amplitude sin(2 pi j frequency / width): nine tenths of the picture are gone.

    DIFFERS: clipped to [0, 1], because the code's cast to 8 bits wraps negative values.  Raises ValueError if keep is not in (0, 1].
    """
    require_share("keep", keep)

    def apply(images: torch.Tensor) -> torch.Tensor:
        width = images.shape[3]
        wave = amplitude * torch.sin(2 * math.pi * torch.arange(width) * frequency / width)
        return (keep * images + (1 - keep) * wave.to(images)).clamp(0, 1)

    return apply


def added(pattern: torch.Tensor, bottom: int = 0, right: int = 0) -> Trigger:
    """A trigger that adds `pattern` (C, h, w), clipped to [0, 1], with this many pixels free below it and to its right.

    A pattern as large as 32 x 32 is stretched to the image; a smaller one keeps its size.  Raises ValueError, when applied, if it
    does not fit.  DIFFERS from BackdoorBench's, ABL's, RNP's and CBD's Trojan, which cast to 8 bits before they clip, so that bright
    pixels wrap around to dark ones.
    """

    def apply(images: torch.Tensor) -> torch.Tensor:
        height, width = images.shape[2:]
        whole = pattern.shape[-2:] == (32, 32)
        placed = _resized(pattern, (height, width)) if whole else pattern
        top, left = height - bottom - placed.shape[1], width - right - placed.shape[2]
        if top < 0 or left < 0:
            raise ValueError(
                f"a patch of {tuple(placed.shape[1:])} that ends {bottom} and {right} pixels before the edges does not fit "
                f"an image of {height} x {width}"
            )
        triggered = images.clone()
        triggered[:, :, top : height - bottom, left : width - right] += as_channels(placed, images)
        return triggered.clamp(0, 1)

    return apply


def trojan_square(seed: int = 0) -> torch.Tensor:
    """The additive square of AWM and I-BAU, (3, 9, 9): drawn anew, of the same mean, 100 of 255 (their file is an optimized one)."""
    return torch.randint(201, (3, 9, 9), generator=torch.Generator().manual_seed(seed)) / 255


def trojan_watermark() -> torch.Tensor:
    """An additive watermark (3, 32, 32) of 321 pixels in rows and columns 0 to 29, as many as AWM's and I-BAU's file has.

    Drawn anew, a ring with a cross in it, of the square's mean brightness, 100 of 255.
    """
    places = torch.arange(30, dtype=torch.float64) - 14.5  # double: its roots are the same on every CPU
    row, column = torch.meshgrid(places, places, indexing="ij")
    radius = (row.square() + column.square()).sqrt()
    bars = torch.minimum(row.abs(), column.abs()) + 10 * (radius > 12)  # no bar beyond the ring
    distance = torch.minimum((radius - 12).abs(), bars)
    mark = torch.zeros(32, 32)
    nearest = distance.flatten().argsort(stable=True)[:321]
    mark[nearest // 30, nearest % 30] = 100 / 255
    return mark.expand(3, 32, 32).clone()


def l2_inv(seed: int = 0) -> torch.Tensor:
    """The additive pattern (3, 32, 32) of L2-inv: 905 pixels, none above 68 of 255, of L2 norm 3.22 (I-BAU's l2_inv.png), redrawn."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.randperm(32 * 32, generator=generator)[:905]
    pattern = torch.zeros(3, 32 * 32)
    drawn = torch.randn(3, 905, generator=generator).abs()
    pattern[:, places] = drawn * 3.22 / drawn.norm()  # the largest of them is below 68 of 255 (tested)
    return pattern.reshape(3, 32, 32)


def read_image(path: str | Path) -> torch.Tensor:
    """An image file as float32 (3, H, W) in [0, 1].  Raises ValueError if it is not there or no image."""
    try:
        return _as_floats(pictures.read(Path(path).expanduser()))
    except ValueError as error:
        raise ValueError(f"the blended picture must be an image file, got {str(path)!r}: {error}") from error


def require_share(name: str, value: float) -> None:
    """Raises ValueError if the value is not in (0, 1]."""
    if not 0 < value <= 1:
        raise ValueError(f"{name} must be in (0, 1], got {value}")


def _as_floats(picture: Image.Image) -> torch.Tensor:
    """An RGB image as float32 (3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


def _resized(picture: torch.Tensor, size: tuple[int, int] | torch.Size) -> torch.Tensor:
    """The picture (C, h, w) at another size, bilinear; itself if it has that size."""
    if picture.shape[1:] == torch.Size(size):
        return picture
    return F.interpolate(picture[None], tuple(size), mode="bilinear", antialias=True)[0].clamp(0, 1)
