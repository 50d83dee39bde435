"""Random augmentation of a whole batch at once, drawn from a generator, on its device, and moved to that of the images."""

import math

import torch
import torch.nn.functional as F

from bdlib import gpu


def pad_for_crops(images: torch.Tensor, padding: int) -> torch.Tensor:
    """The images with a black border of `padding` pixels, ready for `crop_flip`."""
    return F.pad(images, (padding,) * 4)


def crop_flip(
    padded: torch.Tensor, picks: torch.Tensor, padding: int, flip: bool, *, generator: torch.Generator
) -> torch.Tensor:
    """Random crops (B, C, H, W) of the images `padded[picks]`, each moved by up to `padding` pixels and flipped with chance 1/2.

    padded: (N, C, H + 2 padding, W + 2 padding), any dtype; picks: indices (B,) on its device.
    """
    count, device = len(picks), padded.device
    height, width = (side - 2 * padding for side in padded.shape[2:])
    if padding:
        dy, dx = torch.randint(2 * padding + 1, (2, count), generator=generator, device=generator.device).to(device)
        # Every possible crop as a view, so that one indexing copies just the pixels wanted.
        crops = padded.unfold(2, height, 1).unfold(3, width, 1)
        batch = crops[picks, :, dy, dx]
    else:
        batch = padded[picks]
    if flip:
        mirrored = torch.rand(count, generator=generator, device=generator.device).to(device) < 0.5
        batch = torch.where(mirrored[:, None, None, None], batch.flip(3), batch)
    return batch


def random_resized_crop(
    images: torch.Tensor, flip: bool, *, generator: torch.Generator, scale: tuple[float, float] = (0.08, 1.0)
) -> torch.Tensor:
    """Each image (B, C, H, W, float) replaced by a random box of it, stretched to the full size.

    The box covers a share of the area drawn from `scale` at an aspect ratio of 3/4 to 4/3 (torchvision's RandomResizedCrop).
    """
    count = len(images)
    area = torch.empty(count).uniform_(*scale, generator=generator)
    ratio = torch.empty(count).uniform_(math.log(3 / 4), math.log(4 / 3), generator=generator).exp()
    half = gpu.root(torch.stack([area * ratio, area / ratio])).clamp(max=1)
    center = (torch.rand(2, count, generator=generator) * 2 - 1) * (1 - half)
    sign = torch.where(torch.rand(count, generator=generator) < 0.5, -1.0, 1.0) if flip else torch.ones(count)
    zero = torch.zeros(count)
    theta = torch.stack(
        [torch.stack([half[0] * sign, zero, center[0]], 1), torch.stack([zero, half[1], center[1]], 1)], 1
    )
    grid = F.affine_grid(theta.to(images), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def cutout(images: torch.Tensor, size: int, *, generator: torch.Generator) -> torch.Tensor:
    """Copies of the images (B, C, H, W) with a black square of `size` pixels, cut at the edges, at a random center each."""
    count, (height, width), source = len(images), images.shape[2:], generator.device
    top = torch.randint(height, (count, 1), generator=generator, device=source).to(images.device) - size // 2
    left = torch.randint(width, (count, 1), generator=generator, device=source).to(images.device) - size // 2
    rows, columns = torch.arange(height, device=images.device), torch.arange(width, device=images.device)
    hole = ((rows >= top) & (rows < top + size))[:, :, None] & ((columns >= left) & (columns < left + size))[:, None, :]
    return images.masked_fill(hole[:, None], 0.0)
