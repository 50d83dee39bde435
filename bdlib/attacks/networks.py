"""The picture-to-picture network that learned triggers share."""

import torch
import torch.nn.functional as F
from torch import nn


class PictureNet(nn.Module):
    """Pictures (N, inputs, H, W) -> values in [-1, 1], (N, outputs, H, W): three halvings, three doublings, with skips (a U-Net).

    H and W are multiples of 8 (`require_size`).
    """

    def __init__(self, inputs: int, outputs: int, width: int):
        super().__init__()
        widths = [width, 2 * width, 4 * width]
        self.down = nn.ModuleList(_block(a, b) for a, b in zip([inputs, *widths[:2]], widths, strict=True))
        self.bottom = _block(widths[2], widths[2])
        ups = [(widths[2] * 2, widths[1]), (widths[1] * 2, widths[0]), (widths[0] * 2, widths[0])]
        self.up = nn.ModuleList(_block(a, b) for a, b in ups)
        self.last = nn.Conv2d(widths[0], outputs, 3, padding=1)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        seen, x = [], pictures
        for block in self.down:
            seen.append(block(x))
            x = F.max_pool2d(seen[-1], 2)
        x = self.bottom(x)
        for block, skip in zip(self.up, reversed(seen), strict=True):
            x = block(torch.cat([F.interpolate(x, scale_factor=2, mode="nearest"), skip], 1))
        return torch.tanh(self.last(x))


def require_size(images: torch.Tensor, attack: str) -> None:
    """Raises ValueError unless a `PictureNet` can read images (N, C, H, W) of this size."""
    height, width = images.shape[-2:]
    if height % 8 or width % 8:
        raise ValueError(
            f"attack {attack!r} needs images whose height and width are multiples of 8 pixels, got {height} x {width}"
        )


def _block(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())
