"""Neural Cleanse (NC), Wang et al., IEEE S&P 2019: find the backdoor's label by its small trigger, then unlearn that trigger.

 1  for every class, invert a trigger: mask and pattern that turn clean images into that class, with as small a mask as still works;
    the weight of the mask's size rises while the trigger works and falls while it does not
 2  anomaly index of a class: how far its mask's size lies below the median, in units of 1.4826 median absolute deviations
 3  classes with an index above 2 are flagged; without one the model is returned as it is
 4  fine-tune on the clean images, a fifth of them with a flagged class's trigger and their true label
Settings are BackdoorBench's, but for what `recipe` says.
"""

import copy
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from bdlib import gpu
from bdlib.data import Dataset
from bdlib.defenses.fine_tuning import CONFIG
from bdlib.explain import SyntheticTrigger, starting_logits
from bdlib.train import TrainConfig, Watch, fit, require_finite

CONSISTENCY = 1.4826  # makes the median absolute deviation of normal values their standard deviation


@dataclass(frozen=True, kw_only=True)
class NcConfig:
    """Settings of NC; sources: [b] BackdoorBench, [o] ours.  Raises ValueError if one is out of range."""

    rounds: int = 80  # of the inversion of one class [b]; the weight may change after each
    steps: int = 10  # of a round, a batch each [o]; an epoch in the code
    batch_size: int = 128  # images [o]; 256 in the code; never more than there are
    lr: float = 0.1  # Adam, on the values before the sigmoid [b]
    weight: float = 1e-3  # of the mask's L1 norm at the start [b]
    success: float = 0.98  # share of images turned into the class at which a trigger works [b]
    patience: int = 5  # rounds in a row before the weight changes [b]
    multiplier: float = 2.0  # the weight is multiplied by this, or divided by its 1.5th power [b]
    index: float = 2.0  # anomaly index above which a class is flagged [b]
    share: float = 0.2  # of the images of a batch that carry the trigger in step 4 [b]
    tuning: TrainConfig = field(default_factory=lambda: CONFIG)  # of step 4 [b]

    def __post_init__(self) -> None:
        for name in ("rounds", "steps", "batch_size", "lr", "weight", "patience", "index"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("success", "share"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in (0, 1], got {getattr(self, name)}")
        if not self.multiplier > 1:
            raise ValueError(f"multiplier must be above 1, got {self.multiplier}")


@dataclass(frozen=True)
class NcResult:
    """The model in eval(), the inverted trigger and the anomaly index of each class, and the classes flagged."""

    model: nn.Module
    triggers: tuple[SyntheticTrigger, ...]
    indices: torch.Tensor  # (C,), above 0 where the mask is smaller than the median
    flagged: tuple[int, ...]


def nc(
    model: nn.Module, clean: Dataset, config: NcConfig, *, generator: torch.Generator, watch: Watch = iter
) -> nn.Module:
    """A copy of the model with the flagged triggers unlearned (Neural Cleanse), in eval(); an equal copy where none is flagged.

    clean: the defender's images, uint8, with their labels.  The input model is not changed.
    Raises ValueError without clean images, FloatingPointError when a loss is no longer a number.
    """
    return run(model, clean, config, generator=generator, watch=watch).model


def run(
    model: nn.Module, clean: Dataset, config: NcConfig, *, generator: torch.Generator, watch: Watch = iter
) -> NcResult:
    """As `nc`, with the triggers, the anomaly indices and the flagged classes beside the model."""
    if not len(clean):
        raise ValueError("Neural Cleanse needs at least one clean image, got none")
    labels = range(len(clean.classes))
    triggers = tuple(invert(model, clean, label, config, generator=generator) for label in watch(labels))
    indices = anomaly_indices(torch.tensor([trigger.size for trigger in triggers]))
    flagged = tuple(torch.nonzero(indices > config.index).flatten().tolist())
    result = unlearn(model, clean, [triggers[label] for label in flagged], config, generator=generator, watch=watch)
    return NcResult(result, triggers, indices, flagged)


def recipe(count: int) -> NcConfig:
    """As many steps as BackdoorBench's; for fewer clean images than its 2,500 fewer rounds of smaller batches, whose weight changes
    sooner.

    DIFFERS: ours makes 800 steps on 128 images for every class, or 200 on 32; BackdoorBench's 80 passes over 2,500 images make up to
    800 on 256.  Below 2,500 images ours starts with .01, ten times its weight.  Ours has no early stop; theirs ends the passes once
    the weight has both risen and fallen and the smallest mask that works has shrunk by more than 1% in none of the last 25.
    """
    return NcConfig() if count >= 2500 else NcConfig(rounds=20, batch_size=32, weight=0.01, patience=2)


def invert(
    model: nn.Module, clean: Dataset, label: int, config: NcConfig, *, generator: torch.Generator
) -> SyntheticTrigger:
    """The smallest trigger seen that works for the class; where none works, the last one (step 1)."""
    frozen = copy.deepcopy(model).eval().requires_grad_(False)
    images = clean.floats().to(next(frozen.parameters()).device)
    logits = starting_logits(images, generator=generator)
    optimizer = gpu.adam(logits, images.device, lr=config.lr, betas=(0.5, 0.9))
    weight, streak, best = config.weight, 0, None
    for _ in range(config.rounds):
        picks = torch.randint(len(images), (config.steps, min(config.batch_size, len(images))), generator=generator)
        success = inversion_round(frozen, images[picks.to(images.device)], label, (logits, optimizer), weight)
        trigger = SyntheticTrigger(*(logit.detach().sigmoid() for logit in logits))
        works = success >= config.success
        if works and (best is None or trigger.size < best.size):
            best = trigger
        streak = (max(streak, 0) + 1) if works else (min(streak, 0) - 1)
        if abs(streak) >= config.patience:
            weight = weight * config.multiplier if works else weight / config.multiplier**1.5
            streak = 0
    return best or trigger


def inversion_round(
    model: nn.Module,
    batches: torch.Tensor,
    label: int,
    learned: tuple[list[torch.Tensor], torch.optim.Optimizer],
    weight: float,
) -> float:
    """The share of images (steps, B, C, H, W) called the class, after a step on each batch, in place, of CE + weight |mask|_1."""
    logits, optimizer = learned
    called, total = torch.zeros((), device=batches.device), torch.zeros((), device=batches.device)
    wanted = torch.full((batches.shape[1],), label, device=batches.device)
    for images in batches:
        trigger = SyntheticTrigger(*(logit.sigmoid() for logit in logits))
        answers = model(trigger(images))
        loss = F.cross_entropy(answers, wanted) + weight * trigger.mask.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        called += (answers.detach().argmax(1) == wanted).float().mean()
        total += loss.detach()
    require_finite(total, "Neural Cleanse's inversion")
    return (called / len(batches)).item()


def anomaly_indices(sizes: torch.Tensor) -> torch.Tensor:
    """Anomaly index (C,) of mask sizes (C,): above 0 for those smaller than the median (step 2)."""
    below = sizes.median() - sizes
    # index = (median - size) / (1.4826 median |size - median|)
    return below / (CONSISTENCY * below.abs().median()).clamp(min=1e-12)


def unlearn(
    model: nn.Module,
    clean: Dataset,
    triggers: list[SyntheticTrigger],
    config: NcConfig,
    *,
    generator: torch.Generator,
    watch: Watch = iter,
) -> nn.Module:
    """A copy of the model, tuned with a share of each batch triggered under its true label; untuned without triggers (step 4)."""
    tuned = copy.deepcopy(model)
    if not triggers:
        return tuned.eval()

    def with_triggers(images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        count = round(config.share * len(images))
        parts = images[:count].split(-(-count // len(triggers))) if count else ()
        stamped = [trigger(part) for trigger, part in zip(triggers, parts, strict=False)]
        return torch.cat([*stamped, images[count:]]), labels

    return fit(tuned.requires_grad_(True), clean, config.tuning, generator=generator, watch=watch, change=with_triggers)
