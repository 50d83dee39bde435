"""WaNet's trigger: the picture is warped a little, by one fixed smooth field (Nguyen & Tran, arXiv 2102.10369)."""

import torch
import torch.nn.functional as F

from bdlib.triggers.overlays import require_share
from bdlib.triggers.patches import Trigger


def wanet(strength: float = 0.5, points: int = 4, seed: int = 0) -> Trigger:
    """A trigger that moves every pixel along a smooth field: grid_sample(x, clamp(identity + strength * field / height)).

    strength s and points k, the control points a side, as in BackdoorBench: .5 and 4.  The field is drawn from `seed` once.
    (The warp of RNP's code has k = 32 and a new field for every image, so no fixed trigger; it is not built.)
    Raises ValueError if strength is not in (0, 1].
    """
    require_share("strength", strength)

    def apply(images: torch.Tensor) -> torch.Tensor:
        return sample(images, grid(images, strength, points, seed).expand(len(images), -1, -1, -1))

    return apply


def noisy_wanet(images: torch.Tensor, trigger_seed: int = 0, *, generator: torch.Generator) -> torch.Tensor:
    """The images under the trigger's field plus a random one each, U(-1, 1) / height: WaNet's noise mode, for its cover images.

    The label stays true there, so that the network learns this very field and not warps as such.
    """
    height, width = images.shape[2:]
    noise = (torch.rand(len(images), height, width, 2, generator=generator) * 2 - 1).to(images)
    return sample(images, (grid(images, 0.5, 4, trigger_seed) + noise / height).clamp(-1, 1))


def grid(images: torch.Tensor, strength: float, points: int, seed: int) -> torch.Tensor:
    """Where each pixel of images of this size is read from, (1, H, W, 2) in [-1, 1], x before y."""
    height, width = images.shape[2:]
    field = torch.rand(1, 2, points, points, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    field = field / field.abs().mean()
    smooth = F.interpolate(field, (height, width), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    rows, columns = torch.linspace(-1, 1, height), torch.linspace(-1, 1, width)
    identity = torch.stack(torch.meshgrid(rows, columns, indexing="ij")[::-1], dim=2)[None]
    return (identity + strength * smooth / height).clamp(-1, 1).to(images)


def sample(images: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """The images read at these places, bilinear between pixels."""
    return F.grid_sample(images, places, mode="bilinear", align_corners=True).clamp(0, 1)
