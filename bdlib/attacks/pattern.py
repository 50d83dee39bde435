"""Patterns crafted on a clean network and then added to images: TrojanNN and LF."""

import torch
import torch.nn.functional as F
from torch import nn

from bdlib import gpu
from bdlib.attacks.attacker import Attacker
from bdlib.data import to_float
from bdlib.explain import last_linear, with_embedding
from bdlib.train import require_finite

LF_CAP = 0.2  # largest value of LF's pattern: 51 of 255 in BackdoorBench's file
STEPS = (200, 1000)  # of the optimization: in the quick profile, otherwise (TrojanZoo)
TROJAN_TARGET = 100.0  # activation that TrojanNN's two units shall reach (TrojanZoo, BackdoorBench)


class Pattern(nn.Module):
    """x -> x + pattern, clipped to [0, 1]; pattern (C, H, W)."""

    def __init__(self, shape: torch.Size):
        super().__init__()
        self.register_buffer("pattern", torch.zeros(shape))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return (images + self.pattern.to(images)).clamp(0, 1)


def build(attacker: Attacker) -> Pattern:
    """An empty pattern for images like the attacker's."""
    return Pattern(attacker.train.images.shape[1:]).to(attacker.device)


def fit_trojannn(pattern: Pattern, attacker: Attacker) -> None:
    """TrojanNN (Liu et al., NDSS 2018): a patch that drives the two most connected inputs of the last layer as high as it can.

    Minimizes the mean of (activation - 100)^2 on the patch alone, on black, by Adam (TrojanZoo: 1,000 steps at rate .1).
    The patch is an ellipse near the bottom right, as wide as BackdoorBench's apple: rows 17 to 29, columns 18 to 28 of 32.
    """
    model = attacker.clean_model()
    units = last_linear(model).weight.abs().sum(0).topk(2).indices
    mask = _ellipse(pattern.pattern.shape).to(attacker.device)
    logits = torch.randn(mask.shape, generator=attacker.generator("pattern")).to(mask).requires_grad_(True)
    optimizer = gpu.adam([logits], attacker.device, lr=0.1)
    for _ in attacker.watch(range(STEPS[0 if attacker.quick else 1])):
        _, embedding = with_embedding(model, (mask * logits.sigmoid())[None])
        loss = (embedding[:, units] - TROJAN_TARGET).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    require_finite(loss.detach(), "the optimization of TrojanNN's patch")
    pattern.pattern.copy_((mask * logits.sigmoid()).detach())


def fit_lf(pattern: Pattern, attacker: Attacker) -> None:
    """LF (Zeng et al., ICCV 2021): one smooth pattern, 0 to .2, that pushes a clean network's images toward the target.

    Minimizes CE(f(x + pattern), target) where pattern = .2 * blur(sigmoid(free values)), so that it stays low in frequency.
    DIFFERS: a Gaussian blur of 1/16 of the width keeps it smooth; BackdoorBench ships its pattern as a file.
    """
    model = attacker.clean_model()
    images, labels = attacker.train.images, attacker.train.labels
    generator = attacker.generator("pattern")
    sigma = images.shape[-1] / 16
    logits = torch.randn(images.shape[1:], generator=generator).to(attacker.device).requires_grad_(True)
    optimizer = gpu.adam([logits], attacker.device, lr=0.1)
    steps = STEPS[0 if attacker.quick else 1]
    picks = torch.randint(len(labels), (steps, min(128, len(labels))), generator=generator)
    for batch in attacker.watch(picks):
        clean = to_float(images[batch.to(images.device)]).to(attacker.device)
        wanted = attacker.wanted(labels[batch.to(labels.device)]).to(attacker.device)
        loss = F.cross_entropy(model((clean + _smooth(logits, sigma)).clamp(0, 1)), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    require_finite(loss.detach(), "the optimization of LF's pattern")
    pattern.pattern.copy_(_smooth(logits, sigma).detach())


def _smooth(logits: torch.Tensor, sigma: float) -> torch.Tensor:
    from torchvision.transforms.functional import gaussian_blur  # takes seconds to import: not for every start

    # Below 9 pixels sigma rounds to 0, and a kernel of 1 would not blur.
    return LF_CAP * gaussian_blur(logits.sigmoid(), kernel_size=4 * max(1, round(sigma)) + 1, sigma=sigma)


def _ellipse(shape: torch.Size) -> torch.Tensor:
    """1 inside an ellipse in the bottom right of an image (C, H, W), 0 elsewhere."""
    channels, height, width = shape
    row = (torch.arange(height)[:, None] + 0.5) * 32 / height
    column = (torch.arange(width) + 0.5) * 32 / width
    inside = ((row - 23.5) / 6.5).square() + ((column - 23.5) / 5.5).square() <= 1
    return inside.float().expand(channels, -1, -1).clone()
