"""LIRA (Doan et al., ICCV 2021): an invisible learned perturbation x + epsilon T(x), trained with the classifier.

1  T and the classifier together, on half of each batch clean and half triggered (the code's alpha = 1/2)
2  T frozen, the classifier goes on alone, on the same mix
"""

import torch
import torch.nn.functional as F
from torch import nn

from bdlib import gpu
from bdlib.attacks.attacker import Attacker, Stamps
from bdlib.attacks.networks import PictureNet, require_size
from bdlib.randomness import seeded
from bdlib.train import Batches, lr_factor, require_finite

# Largest change of a pixel (BackdoorBench).  DIFFERS: there it is added to normalized images, on CIFAR-10 a quarter of it in [0, 1].
EPSILON = 0.01
# Adam's rate for T: in the quick profile, which takes few steps (ours), otherwise (BackdoorBench).
NOISE_LR = (1e-3, 1e-4)


class Lira(nn.Module):
    """The perturbation network and the network that is trained with it."""

    def __init__(self, channels: int, width: int, classifier: nn.Module):
        super().__init__()
        self.noise, self.classifier = PictureNet(channels, channels, width), classifier

    def put(self, images: torch.Tensor) -> torch.Tensor:
        """clip(x + epsilon T(x))."""
        return (images + EPSILON * self.noise(2 * images - 1)).clamp(0, 1)

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.put(images.to(next(self.parameters()).device)).to(images.device)


def build(attacker: Attacker) -> Lira:
    """Untrained networks: a perturbation network of 32 channels, 8 in the quick profile.

    Raises ValueError if the images' height or width is no multiple of 8.
    """
    require_size(attacker.train.images, "lira")
    channels = attacker.train.images.shape[1]
    classifier = attacker.fresh_model(attacker.generator("init"))
    with seeded(attacker.generator("networks")):
        return Lira(channels, 8 if attacker.quick else 32, classifier).to(attacker.device)


def fit(trigger: Lira, attacker: Attacker) -> None:
    """Train both for a third of the epochs, then the classifier alone (BackdoorBench: 50 and 100).  The poison rate plays no part.

    DIFFERS: one step for both networks, as both minimize the same loss, on halves of a batch; BackdoorBench's code alternates, on
    whole batches, clean and triggered, and its classifier sees the perturbation of the epoch before.
    """
    generator = attacker.generator("order")
    batch_size = attacker.training.batch_size
    batches = Batches(attacker.train, batch_size, attacker.device, generator=generator, drop_last=True)
    trigger.train()
    with seeded(generator, attacker.device):
        _fit_in_turn(trigger, batches, attacker)
    trigger.eval()


def _fit_in_turn(trigger: Lira, batches: Batches, attacker: Attacker) -> None:
    config = attacker.training
    classifier = torch.optim.SGD(
        trigger.classifier.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
    )
    noise = gpu.adam(trigger.noise.parameters(), attacker.device, lr=NOISE_LR[0 if attacker.quick else 1])
    steps = lr_factor(config.schedule, config.epochs * len(batches))
    scheduler = torch.optim.lr_scheduler.LambdaLR(classifier, steps)
    together = max(config.epochs // 3, 1)
    for epoch in attacker.watch(range(config.epochs)):
        if epoch == together:
            trigger.noise.eval().requires_grad_(False)
        total = torch.zeros((), device=attacker.device)
        for images, labels, _ in batches:
            loss = _half_and_half(trigger, images, labels, attacker)
            classifier.zero_grad()
            noise.zero_grad()
            loss.backward()
            for part in (classifier, scheduler, noise) if epoch < together else (classifier, scheduler):
                part.step()
            total += loss.detach()
        require_finite(total, f"epoch {epoch + 1} of {config.epochs} of LIRA")


def _half_and_half(trigger: Lira, images: torch.Tensor, labels: torch.Tensor, attacker: Attacker) -> torch.Tensor:
    """CE of a batch whose first half is triggered and called what the attacker wants."""
    half = len(images) // 2
    mixed = torch.cat([trigger.put(images[:half]), images[half:]])
    wanted = torch.cat([attacker.wanted(labels[:half]), labels[half:]])
    return F.cross_entropy(trigger.classifier(mixed), wanted)


def stamps(trigger: Lira) -> Stamps:
    """The learned perturbation."""
    return Stamps(test=trigger)
