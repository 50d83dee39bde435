"""SSBA / ISSBA (Li et al., ICCV 2021): a steganography network hides one fixed string in each image; the traces are the trigger.

An encoder changes an image so that a decoder can read a string from it (StegaStamp, arXiv 1904.05343).  Both are trained on clean
images with random strings, the string first, then also the likeness to the image; then the encoder hides the attacker's one string.
"""

import torch
import torch.nn.functional as F
from torch import nn

from bdlib import gpu
from bdlib.attacks.attacker import Attacker, Stamps
from bdlib.attacks.networks import PictureNet, require_size
from bdlib.randomness import seeded
from bdlib.train import Batches, require_finite

# In the quick profile, otherwise as BackdoorBench; 20 bits are BackdoorBox's.
EPOCHS = (6, 20)
BITS = (20, 100)
WIDTH = (8, 32)  # channels of the first layer


class Ssba(nn.Module):
    """Encoder and decoder of strings of `bits` bits in pictures, and the attacker's string."""

    def __init__(self, channels: int, width: int, secret: torch.Tensor):
        super().__init__()
        bits = len(secret)
        self.register_buffer("secret", secret)
        self.spread = nn.Linear(bits, channels * 64)
        self.encoder = PictureNet(2 * channels, channels, width)
        layers, inputs = [], channels
        for outputs in (2 * width, 4 * width, 4 * width):
            layers += [nn.Conv2d(inputs, outputs, 3, 2, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
            inputs = outputs
        self.decoder = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * inputs, bits))

    def put(self, images: torch.Tensor, secrets: torch.Tensor) -> torch.Tensor:
        """The images with these strings (N, bits) of 0 and 1 hidden in them."""
        # StegaStamp: the string becomes a small picture that is stretched and laid beside the image's channels.
        small = self.spread(2 * secrets - 1).reshape(len(images), images.shape[1], 8, 8)
        beside = F.interpolate(small, images.shape[2:], mode="nearest")
        return (images + self.encoder(torch.cat([2 * images - 1, beside], 1))).clamp(0, 1)

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        placed = images.to(self.secret.device)
        return self.put(placed, self.secret.expand(len(images), -1)).to(images.device)


def build(attacker: Attacker) -> Ssba:
    """Untrained networks and the attacker's string.

    DIFFERS: works at the images' own size; BackdoorBench's encoder is trained at 128 x 128, and has a perceptual loss from a
    pretrained network beside the squared error.
    Raises ValueError if the images' height or width is no multiple of 8.
    """
    require_size(attacker.train.images, "ssba")
    size = 0 if attacker.quick else 1
    secret = torch.randint(2, (BITS[size],), generator=attacker.generator("secret")).float()
    with seeded(attacker.generator("networks")):
        return Ssba(attacker.train.images.shape[1], WIDTH[size], secret).to(attacker.device)


def fit(trigger: Ssba, attacker: Attacker) -> None:
    """Train encoder and decoder on the clean images, the first tenth of the steps for the string alone."""
    generator = attacker.generator("order")
    batches = Batches(attacker.train, 128, attacker.device, generator=generator, drop_last=True)
    optimizer = gpu.adam(trigger.parameters(), attacker.device, lr=1e-3)
    epochs, step = EPOCHS[0 if attacker.quick else 1], 0
    trigger.train()
    for epoch in attacker.watch(range(epochs)):
        total = torch.zeros((), device=attacker.device)
        for images, _, _ in batches:
            secrets = torch.randint(2, (len(images), len(trigger.secret)), generator=generator).to(images)
            hidden = trigger.put(images, secrets)
            reading = F.binary_cross_entropy_with_logits(trigger.decoder(hidden), secrets)
            # The likeness counts more and more: from 0 after a tenth of the steps to 50 at the end.  The weights are ours.
            progress = step / (epochs * len(batches))
            likeness = 50 * max(progress - 0.1, 0) / 0.9
            loss = reading + likeness * (hidden - images).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach()
            step += 1
        require_finite(total, f"epoch {epoch + 1} of {epochs} of SSBA's encoder")
    trigger.eval()


def stamps(trigger: Ssba) -> Stamps:
    """The attacker's string in every image."""
    return Stamps(test=trigger)
