"""Label-consistent attack (Turner et al., arXiv 1912.02771): no label is changed, so a person sees nothing wrong.

Only images of the target class are poisoned.  Each is first pushed away from its class on a clean network, so that it is hard to
learn, then gets a checkerboard in its corners, which is the easy thing to learn.  At test time the corners alone are shown.
"""

import torch
import torch.nn.functional as F
from torch import nn

from bdlib.attacks.attacker import Attacker, Stamps
from bdlib.triggers import make

EPSILON = 8 / 255  # largest change of a pixel (BackdoorBench, BackdoorBox); 16 / 255 in ANP's recipe
STEP = 1.5 / 255
_BATCH = 250  # images perturbed at once: bounds the memory of a wide network


class Repel(nn.Module):
    """Images of the target class -> the same images, misread by the network (PGD, arXiv 1706.06083).

    DIFFERS: the network is one trained as usual; the attack's authors use an adversarially trained one too.
    """

    def __init__(self, model: nn.Module, target_label: int, steps: int):
        super().__init__()
        self.model, self.target_label, self.steps = model, target_label, steps

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.cat([self._repelled(batch) for batch in images.split(_BATCH)])

    def _repelled(self, images: torch.Tensor) -> torch.Tensor:
        device = next(self.model.parameters()).device
        labels = torch.full((len(images),), self.target_label, device=device)
        start = images.to(device)
        moved = start.clone()
        for _ in range(self.steps):
            moved.requires_grad_(True)
            # x <- clip(x + step * sign(gradient of CE(f(x), y)))
            (gradient,) = torch.autograd.grad(F.cross_entropy(self.model(moved), labels), moved)
            moved = moved.detach() + STEP * gradient.sign()
            moved = torch.minimum(torch.maximum(moved, start - EPSILON), start + EPSILON).clamp(0, 1)
        return moved.detach().to(images.device)


def build(attacker: Attacker) -> Repel:
    """The perturbation on the attacker's clean network: 100 steps, 20 in the quick profile (a step moves a pixel by 1.5 of 255)."""
    return Repel(attacker.clean_model(), attacker.target_label, steps=20 if attacker.quick else 100)


def stamps(repel: Repel) -> Stamps:
    """Perturbed images with checkerboards in their corners to train on, the corners alone at test time."""
    corners = make("badnets_corners")
    return Stamps(test=corners, poisoned=lambda images, generator: corners(repel(images)))
