"""Input-aware dynamic attack (Nguyen & Tran, arXiv 2010.08138): every image gets a trigger of its own.

x -> x + (P(x) - x) M(x): a pattern network P and a mask network M, trained with the classifier.
 1  train M alone: small masks that differ between images; then freeze it
 2  train P and the classifier together: images with their own trigger get the wanted label, images with another image's trigger keep
    theirs, so that a trigger works on its own image only; patterns of different images are pushed apart
"""

import torch
import torch.nn.functional as F
from torch import nn

from bdlib import gpu
from bdlib.attacks.attacker import Attacker, Stamps
from bdlib.attacks.networks import PictureNet, require_size
from bdlib.randomness import seeded
from bdlib.train import Batches, lr_factor, require_finite

DENSITY = 0.032  # mean of a mask that costs nothing
NORM_WEIGHT, DIVERSITY_WEIGHT = 100.0, 1.0
# Of the classifier, at most.  DIFFERS: at the .2 of profile paper_fast the loss became NaN (PreAct-ResNet18 of width 64, seed 0).
PEAK_RATE = 0.1
COVERS = 1.0  # images with another image's trigger for each poisoned one (cross ratio .1 beside a poison rate of .1)


class InputAware(nn.Module):
    """Pattern network, mask network and the network that is trained with them."""

    def __init__(self, channels: int, width: int, classifier: nn.Module):
        super().__init__()
        self.pattern, self.mask, self.classifier = (
            PictureNet(channels, channels, width),
            PictureNet(channels, 1, width),
            classifier,
        )

    def patterns(self, images: torch.Tensor) -> torch.Tensor:
        """P(x) in [0, 1]."""
        return self.pattern(2 * images - 1) / 2 + 0.5

    def masks(self, images: torch.Tensor) -> torch.Tensor:
        """M(x) in [0, 1], nearly all 0 or 1: tanh(20 z - 10) / 2 + 1/2 of z in [0, 1]."""
        return torch.tanh(20 * (self.mask(2 * images - 1) / 2 + 0.5) - 10) / 2 + 0.5

    def put(self, images: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        """The images with the trigger that belongs to `source`."""
        return blend(images, self.patterns(source), self.masks(source))

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        placed = images.to(next(self.parameters()).device)
        return self.put(placed, placed).to(images.device)


def blend(images: torch.Tensor, patterns: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """x + (P - x) M."""
    return images + (patterns - images) * masks


def build(attacker: Attacker) -> InputAware:
    """Untrained networks: generators of 32 channels, 8 in the quick profile.

    Raises ValueError if the images' height or width is no multiple of 8.
    """
    require_size(attacker.train.images, "input_aware")
    channels = attacker.train.images.shape[1]
    classifier = attacker.fresh_model(attacker.generator("init"))
    with seeded(attacker.generator("networks")):
        return InputAware(channels, 8 if attacker.quick else 32, classifier).to(attacker.device)


def fit(trigger: InputAware, attacker: Attacker) -> None:
    """Train the mask network (25 epochs, 2 in the quick profile), then the pattern network with the classifier.

    DIFFERS: both networks have new gradients at each step and the attacker's schedule; in BackdoorBench's code the pattern network's
    gradients add up, and its rate has milestones of its own.
    """
    generator = attacker.generator("order")
    batch_size = attacker.training.batch_size
    batches = Batches(attacker.train, batch_size, attacker.device, generator=generator, drop_last=True)
    trigger.train()
    with seeded(generator, attacker.device):
        _fit_masks(trigger, batches, epochs=2 if attacker.quick else 25)
        trigger.mask.eval().requires_grad_(False)
        _fit_jointly(trigger, batches, attacker)
    trigger.eval()


def _fit_jointly(trigger: InputAware, batches: Batches, attacker: Attacker) -> None:
    config, device = attacker.training, attacker.device
    classifier = gpu.sgd(
        trigger.classifier.parameters(), device, lr=min(config.lr, PEAK_RATE), momentum=config.momentum,
        weight_decay=config.weight_decay,
    )  # fmt: skip
    pattern = gpu.adam(trigger.pattern.parameters(), device, lr=0.01, betas=(0.5, 0.9))
    factor = lr_factor(config.schedule, config.epochs * len(batches))
    schedulers = [torch.optim.lr_scheduler.LambdaLR(optimizer, factor) for optimizer in (classifier, pattern)]

    def descend(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        loss = _joint_loss(trigger, images, labels, attacker)
        classifier.zero_grad()
        pattern.zero_grad()
        loss.backward()
        classifier.step()
        pattern.step()
        return loss.detach()

    step = gpu.replayed(descend, device)
    for epoch in attacker.watch(range(config.epochs)):
        total = torch.zeros((), device=device)
        for images, labels, _ in batches:
            total += step(images, labels)
            for scheduler in schedulers:
                scheduler.step()
        require_finite(total, f"epoch {epoch + 1} of {config.epochs} of the input-aware attack")


def _fit_masks(trigger: InputAware, batches: Batches, epochs: int) -> None:
    device = batches.labels.device
    optimizer = gpu.adam(trigger.mask.parameters(), device, lr=0.01, betas=(0.5, 0.9))

    def descend(images: torch.Tensor) -> torch.Tensor:
        masks = trigger.masks(images)
        diversity = _closeness(images, images.roll(1, 0), masks, masks.roll(1, 0))
        loss = NORM_WEIGHT * F.relu(masks - DENSITY).mean() + DIVERSITY_WEIGHT * diversity
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    step = gpu.replayed(descend, device)
    for _ in range(epochs):
        for images, _, _ in batches:
            step(images)


def _joint_loss(trigger: InputAware, images: torch.Tensor, labels: torch.Tensor, attacker: Attacker) -> torch.Tensor:
    """CE of poisoned, cover and clean images, + how alike the patterns of different images are."""
    poisoned = max(round(attacker.poison_rate * len(images)), 2)
    covered = min(poisoned + round(COVERS * poisoned), len(images))
    others = images.roll(1, 0)
    patterns = trigger.patterns(images[:poisoned])
    own = blend(images[:poisoned], patterns, trigger.masks(images[:poisoned]))
    foreign = trigger.put(images[poisoned:covered], others[poisoned:covered])
    mixed = torch.cat([own, foreign, images[covered:]])
    wanted = torch.cat([attacker.wanted(labels[:poisoned]), labels[poisoned:]])
    diversity = _closeness(images[:poisoned], images[:poisoned].roll(1, 0), patterns, patterns.roll(1, 0))
    with gpu.half(attacker.device):
        loss = F.cross_entropy(trigger.classifier(mixed), wanted)
    return loss + DIVERSITY_WEIGHT * diversity


def _closeness(x1: torch.Tensor, x2: torch.Tensor, p1: torch.Tensor, p2: torch.Tensor) -> torch.Tensor:
    """Mean of |x1 - x2| / |p1 - p2|, root mean squares over an image: large where different images get alike patterns."""
    images = gpu.root((x1 - x2).square().mean((1, 2, 3)))
    patterns = gpu.root((p1 - p2).square().mean((1, 2, 3)).add(1e-8))
    return (images / patterns).mean()


def stamps(trigger: InputAware) -> Stamps:
    """Each image's own trigger; covers carry their neighbor's."""
    device = next(trigger.parameters()).device

    @torch.no_grad()
    def foreign(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        placed = images.to(device)
        return trigger.put(placed, placed.roll(1, 0)).to(images.device)

    return Stamps(test=trigger, cover=foreign)
