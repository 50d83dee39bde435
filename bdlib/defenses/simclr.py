"""SimCLR, Chen et al., ICML 2020, arXiv 2002.05709: features learned without labels, as DBD's first step.

Two changed views of each image shall lie near each other, and far from those of all other images of the batch.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from bdlib.augment import random_resized_crop
from bdlib.data import Dataset
from bdlib.explain import last_linear, with_embedding
from bdlib.randomness import seeded
from bdlib.train import Batches, Watch, lr_factor, require_finite


@dataclass(frozen=True, kw_only=True)
class SimclrConfig:
    """Settings of SimCLR; sources: [b] BackdoorBench's DBD, [p] the paper.  Raises ValueError if one is out of range."""

    epochs: int = 100  # [b]; 1,000 in the original DBD
    batch_size: int = 512  # images [b]; never more than there are
    lr: float = 0.4  # SGD with momentum .9, cosine to 0
    weight_decay: float = 1e-4
    temperature: float = 0.5  # [p]; BackdoorBench passes 1
    projection: int = 128  # length of what is compared [p]
    least_area: float = 0.2  # smallest share of an image's area that a view shows
    jitter: float = 0.4  # largest relative change of brightness and contrast; as much of every color channel's weight

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "lr", "temperature", "projection", "least_area"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if not 0 <= self.jitter < 1:
            raise ValueError(f"jitter must be in [0, 1), got {self.jitter}")


def simclr(
    model: nn.Module,
    dataset: Dataset,
    config: SimclrConfig,
    *,
    generator: torch.Generator,
    watch: Watch = iter,
) -> None:
    """Train the model's features, in place, on images without labels; its last linear layer is left as it was."""
    device = next(model.parameters()).device
    batches = Batches(dataset, config.batch_size, device, generator=generator, drop_last=True)
    with seeded(generator, device):
        width = last_linear(model).in_features
        head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, config.projection)).to(device)
        weights = [*model.parameters(), *head.parameters()]
        optimizer = torch.optim.SGD(weights, lr=config.lr, momentum=0.9, weight_decay=config.weight_decay)
        factor = lr_factor("cosine", config.epochs * len(batches))
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        for epoch in watch(range(config.epochs)):
            model.train()
            total = torch.zeros((), device=device)
            for images, _, _ in batches:
                both = torch.cat([view(images, dataset.flip, config, generator=generator) for _ in range(2)])
                loss = contrast(head(with_embedding(model, both)[1]), config.temperature)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                scheduler.step()
                total += loss.detach()
            require_finite(total, f"epoch {epoch + 1} of SimCLR")


def contrast(points: torch.Tensor, temperature: float) -> torch.Tensor:
    """The NT-Xent loss of points (2 B, D), a scalar: row i and row i + B are views of one image."""
    count = len(points) // 2
    unit = F.normalize(points, dim=1)
    similar = unit @ unit.T / temperature
    similar = similar.masked_fill(torch.eye(2 * count, dtype=torch.bool, device=points.device), float("-inf"))
    # -log exp(s(i, j) / t) / sum over k != i of exp(s(i, k) / t), j the other view of i
    return F.cross_entropy(similar, torch.arange(2 * count, device=points.device).roll(count))


def view(images: torch.Tensor, flip: bool, config: SimclrConfig, *, generator: torch.Generator) -> torch.Tensor:
    """Another look at each image (B, C, H, W): a box of it, other brightness, contrast and colors, in [0, 1]."""
    box = random_resized_crop(images, flip, generator=generator, scale=(config.least_area, 1.0))
    count, channels = box.shape[:2]
    drawn = 1 + config.jitter * (2 * torch.rand(count, channels + 1, generator=generator) - 1)
    contrast_by, color = drawn[:, :1, None, None].to(box), drawn[:, 1:, None, None].to(box)
    mean = box.mean((1, 2, 3), keepdim=True)
    return ((mean + (box - mean) * contrast_by) * color).clamp(0, 1)
