"""Neural attention distillation (NAD), Li et al., ICLR 2021, arXiv 2101.05930.

A fine-tuned copy teaches the backdoored network where to look:
 1  teacher: a copy of the model, fine-tuned on the clean images for a few epochs; frozen
 2  attention map of a layer: sum over channels of |A_c|^p, as a vector of length 1
 3  student: another copy, trained on L + sum over layers of beta_l |map of the student - map of the teacher|^2
Settings are BackdoorBench's, whose student runs for as many epochs as the teacher.
"""

import copy
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import nn

from bdlib.data import Dataset
from bdlib.defenses.fine_tuning import CONFIG, fine_tuning
from bdlib.explain import layer, stages
from bdlib.train import TrainConfig, Watch, fit


@dataclass(frozen=True, kw_only=True)
class NadConfig:
    """Settings of NAD; sources: [b] BackdoorBench, [o] ours.  Raises ValueError if one is out of range."""

    # Of teacher and student alike.  DIFFERS: a cosine, where BackdoorBench has .01 for the first 20 epochs.
    training: TrainConfig = field(default_factory=lambda: replace(CONFIG, epochs=10))
    # Names of the layers, from first to last; None = the last feature map of each of the last three sizes [o]
    layers: tuple[str, ...] | None = None
    # Weight of each layer's distance, from first to last [b].  DIFFERS: on PreAct-ResNet18 BackdoorBench's third layer is the pooling,
    # whose maps of one pixel never differ, so its 500 and 1,000 weigh the last two sizes.
    betas: tuple[float, ...] = (500.0, 1000.0, 1000.0)
    power: float = 2.0  # p [b]

    def __post_init__(self) -> None:
        if not self.power > 0:
            raise ValueError(f"power must be above 0, got {self.power}")
        if not self.betas or min(self.betas) < 0:
            raise ValueError(f"betas must be numbers from 0 on, at least one, got {self.betas}")
        if self.layers is not None and len(self.layers) != len(self.betas):
            raise ValueError(f"layers must be as many as betas, {len(self.betas)}, got {len(self.layers)}")


def nad(
    model: nn.Module, clean: Dataset, config: NadConfig, *, generator: torch.Generator, watch: Watch = iter
) -> nn.Module:
    """A copy of the model whose attention was drawn to its fine-tuned copy's (arXiv:2101.05930), in eval().

    clean: the defender's images, uint8, with their labels.  The input model is not changed.
    Raises ValueError without clean images, or for a model with fewer sizes of feature maps than betas.
    """
    teacher = fine_tuning(model, clean, config.training, generator=generator, watch=watch).requires_grad_(False)
    student = copy.deepcopy(model).requires_grad_(True)
    names = config.layers or stages(model, clean.floats()[:1], len(config.betas))

    def distilled(student: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return distillation_loss(student, teacher, (images, labels), names, config)

    return fit(student, clean, config.training, generator=generator, watch=watch, objective=distilled)


def recipe(count: int) -> NadConfig:
    """BackdoorBench's setting with a batch that leaves enough steps for so many clean images.

    DIFFERS: below 2,560 images the batch is a tenth of them, at least 32, as with FT-SAM; below 500 images there are 20 epochs.
    """
    training = replace(CONFIG, epochs=10 if count >= 500 else 20, batch_size=min(256, max(32, -(-count // 10))))
    return NadConfig(training=training)


def distillation_loss(
    student: nn.Module,
    teacher: nn.Module,
    batch: tuple[torch.Tensor, torch.Tensor],
    names: tuple[str, ...],
    config: NadConfig,
) -> torch.Tensor:
    """L + sum of beta_l |map of the student - map of the teacher|^2 on a batch, a scalar (step 3)."""
    images, labels = batch
    logits, student_maps = with_maps(student, images, names)
    with torch.no_grad():
        _, teacher_maps = with_maps(teacher, images, names)
    loss = F.cross_entropy(logits, labels)
    for beta, ours, theirs in zip(config.betas, student_maps, teacher_maps, strict=True):
        # beta |F(A_s) - F(A_t)|^2, a mean over images and pixels as in the code
        loss = loss + beta * F.mse_loss(attention(ours, config.power), attention(theirs, config.power))
    return loss


def attention(maps: torch.Tensor, power: float) -> torch.Tensor:
    """Attention (N, h w) of feature maps (N, K, h, w): sum over channels of |A|^p, each image's of length 1 (step 2)."""
    return F.normalize(maps.abs().pow(power).sum(1).flatten(1), dim=1)


def with_maps(
    model: nn.Module, images: torch.Tensor, names: tuple[str, ...]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits (B, C) and the outputs of the named layers, from one pass in the model's own mode."""
    seen: dict[str, torch.Tensor] = {}
    handles = [
        layer(model, name).register_forward_hook(lambda module, inputs, output, name=name: seen.update({name: output}))
        for name in names
    ]
    try:
        logits = model(images)
    finally:
        for handle in handles:
            handle.remove()
    return logits, [seen[name] for name in names]
