"""WaNet trained as its authors do (Nguyen & Tran, arXiv 2102.10369): the attacker controls training and poisons each batch anew.

In each batch a share of the images is warped and gets the wanted label, twice as many are warped with noise and keep theirs.
"""

import torch
from torch import nn

from bdlib.attacks.attacker import Attacker, Stamps
from bdlib.train import fit as fit_classifier
from bdlib.triggers import wanet
from bdlib.triggers.warp import noisy_wanet

COVERS = 2.0  # noise-mode images for each poisoned one (BackdoorBench: cross_ratio)


class Warped(nn.Module):
    """The warp, and the network that is trained with it."""

    def __init__(self, classifier: nn.Module):
        super().__init__()
        self.classifier = classifier

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return wanet()(images)


def build(attacker: Attacker) -> Warped:
    """The warp with an untrained network."""
    return Warped(attacker.fresh_model(attacker.generator("init")))


def fit(warped: Warped, attacker: Attacker) -> None:
    """Train the network on batches poisoned anew.

    DIFFERS: images are warped after their random crop and flip, not before, and there are no random rotations.
    """
    generator = attacker.generator("order")

    def poison_batch(images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        poisoned = round(attacker.poison_rate * len(images))
        covered = min(poisoned + round(COVERS * poisoned), len(images))
        parts = [
            warped(images[:poisoned]),
            noisy_wanet(images[poisoned:covered], generator=generator),
            images[covered:],
        ]
        return torch.cat(parts), torch.cat([attacker.wanted(labels[:poisoned]), labels[poisoned:]])

    split = attacker.train.to(attacker.device)
    fit_classifier(
        warped.classifier, split, attacker.training, generator=generator, watch=attacker.watch, change=poison_batch
    )


def stamps(warped: Warped) -> Stamps:
    """The warp; covers are warped with noise."""
    return Stamps(test=warped, cover=lambda images, generator: noisy_wanet(images, generator=generator))
