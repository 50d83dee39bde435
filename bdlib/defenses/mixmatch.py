"""MixMatch, Berthelot et al., NeurIPS 2019, arXiv 1905.02249: training on a labeled and an unlabeled part, DBD's last step.

For each batch of both:
 1  guess the label of each unlabeled image: the mean answer over its changed views, sharpened
 2  mix every image and its label with another's of both parts, by a share drawn from Beta(alpha, alpha), at least half its own
 3  step downhill on the cross-entropy of the mixed labeled part + weight |answers - guesses|^2 of the mixed unlabeled part
"""

from dataclasses import dataclass
from itertools import islice

import torch
import torch.nn.functional as F
from torch import nn

from bdlib import gpu
from bdlib.data import Dataset
from bdlib.randomness import seeded
from bdlib.train import Batches, Watch, require_finite

VIEWS = 2  # changed views of an unlabeled image


@dataclass(frozen=True, kw_only=True)
class MixmatchConfig:
    """Settings of MixMatch; sources: [p] its paper, [b] BackdoorBench's DBD.  Raises ValueError if one is out of range."""

    epochs: int = 100  # [b]
    steps: int = 1024  # of an epoch [p]
    batch_size: int = 64  # images of each part [p]; never more than there are
    lr: float = 0.002  # Adam [p, b]
    temperature: float = 0.5  # of sharpening [p]
    alpha: float = 0.75  # of Beta [p]
    weight: float = 15.0  # of the unlabeled part at the end; it rises evenly from 0 [b]

    def __post_init__(self) -> None:
        for name in ("epochs", "steps", "batch_size", "lr", "temperature", "alpha"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.weight < 0:
            raise ValueError(f"weight must not be negative, got {self.weight}")


def mixmatch(
    model: nn.Module,
    labeled: Dataset,
    unlabeled: Dataset,
    config: MixmatchConfig,
    *,
    generator: torch.Generator,
    watch: Watch = iter,
) -> None:
    """Train the model, in place, on a labeled and an unlabeled split; the labels of the second are not looked at.

    Raises ValueError for an empty split, FloatingPointError when the loss is no longer a number.
    """
    device = next(model.parameters()).device
    size = min(config.batch_size, len(labeled), len(unlabeled))
    known = Batches(labeled, size, device, generator=generator, drop_last=True)
    unknown = Batches(unlabeled, size, device, generator=generator, drop_last=True)
    # Each part starts anew at its own end.
    pairs = zip(known.forever(), unknown.forever(), strict=False)
    optimizer = gpu.adam(model.parameters(), device, lr=config.lr)
    with seeded(generator, device):
        for epoch in watch(range(config.epochs)):
            model.train()
            total = torch.zeros((), device=device)
            weight = config.weight * (epoch + 1) / config.epochs
            for (images, labels, _), (first, _, picks) in islice(pairs, config.steps):
                views = [first, *(unknown.view(picks) for _ in range(VIEWS - 1))]
                guess = guessed(model, views, config.temperature)
                wanted = torch.cat([F.one_hot(labels, guess.shape[1]).to(guess), *[guess] * VIEWS])
                mixed, wanted = mix(torch.cat([images, *views]), wanted, config.alpha, generator=generator)
                loss = mixed_loss(model(mixed), wanted, len(images), weight)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.detach()
            require_finite(total, f"epoch {epoch + 1} of MixMatch")


@torch.no_grad()
def guessed(model: nn.Module, views: list[torch.Tensor], temperature: float) -> torch.Tensor:
    """Probabilities (B, C): the mean answer to the views of each image, sharpened (step 1)."""
    mean = model(torch.cat(views)).softmax(1).view(len(views), len(views[0]), -1).mean(0)
    # p_i^(1/T) / sum of p_j^(1/T)
    return F.normalize(mean.pow(1 / temperature), p=1, dim=1)


def mix(
    images: torch.Tensor, wanted: torch.Tensor, alpha: float, *, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each image (N, C, H, W) and its probabilities (N, K) mixed with another's, by one share for all (step 2).

    The share is drawn from PyTorch's global random state: its Beta distribution takes no generator.
    """
    share = torch.distributions.Beta(alpha, alpha).sample().item()
    share = max(share, 1 - share)
    order = torch.randperm(len(images), generator=generator).to(images.device)
    return share * images + (1 - share) * images[order], share * wanted + (1 - share) * wanted[order]


def mixed_loss(logits: torch.Tensor, wanted: torch.Tensor, labeled: int, weight: float) -> torch.Tensor:
    """Cross-entropy on the first `labeled` rows + weight * mean squared distance of the probabilities on the others (step 3)."""
    supervised = F.cross_entropy(logits[:labeled], wanted[:labeled])
    return supervised + weight * F.mse_loss(logits[labeled:].softmax(1), wanted[labeled:])
