"""Adversarial neuron pruning (ANP), Wu & Wang, NeurIPS 2021, arXiv 2110.14430.

Channels of a backdoor are those that a small change of their batch norm turns against the clean task:
 1  m = 1, a mask in [0, 1] on every batch-norm scale
 2  for each batch:
 3    noise on scales and shifts, drawn in [-epsilon, epsilon], then stepped uphill on the loss by the sign of its gradient
 4    step m downhill on alpha L(m) + (1 - alpha) L(m, noise), clip m to [0, 1]
 5  scales with m <= threshold are 0
The rate of the mask is the official code's (csdongxian/ANP), .2; BackdoorBench has .01.  The official code takes a threshold from the
command line; BackdoorBench the one with the least attack success on the test images; ours is chosen by clean accuracy.
"""

import copy
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from bdlib import gpu
from bdlib.data import Dataset, hold_out
from bdlib.defenses.fine_pruning import tune
from bdlib.defenses.ft_sam import FtSamConfig
from bdlib.masks import Masks, convolutions, mask_step, masked, norms, prune, require_batch_norm, scales
from bdlib.randomness import seeded
from bdlib.selection import strictest
from bdlib.train import Batches, Watch, require_finite

LEVELS = ("neuron", "weight")


@dataclass(frozen=True, kw_only=True)
class AnpConfig:
    """Settings of ANP; sources: [c] official code, [o] ours.  Raises ValueError if one is out of range."""

    steps: int = 2000  # of the mask, a batch each [c]
    batch_size: int = 128  # images [c]; never more than there are
    mask_lr: float = 0.2  # [c]; .01 in BackdoorBench
    momentum: float = 0.9  # of the mask's steps [c]
    epsilon: float = 0.4  # largest noise, as a share of the scale or shift [c]; see `worst_noise`
    noise_steps: int = 1  # [c]
    alpha: float = 0.2  # weight of the loss without noise [c]
    held_out: float = 0.2  # share of the clean images kept for choosing the threshold [o]
    max_drop: float = 0.05  # clean accuracy that the chosen threshold may cost, as a fraction [o]
    thresholds: tuple[float, ...] = tuple(step / 20 for step in range(19))  # 0 to .9 in steps of .05 [c]
    # What is masked and made noisy: "neuron": batch-norm scales, noise on shifts too [c]; "weight": every convolution weight, as AWM
    level: str = "neuron"
    soft: bool = False  # the masks themselves are the result, as with AWM; no threshold
    tuning: FtSamConfig | None = None  # FT-SAM after pruning (arXiv:2304.11823, Table 4); None = none [c]

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "mask_lr", "noise_steps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if not self.epsilon >= 0:
            raise ValueError(f"epsilon must not be negative, got {self.epsilon}")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be in [0, 1], got {self.alpha}")
        for name in ("held_out", "max_drop"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if self.level not in LEVELS:
            raise ValueError(f"level must be one of {', '.join(LEVELS)}, got {self.level!r}")
        if not self.thresholds or not all(0 <= value <= 1 for value in self.thresholds):
            raise ValueError(f"thresholds must be values in [0, 1], at least one, got {self.thresholds}")


@dataclass(frozen=True)
class AnpResult:
    """The pruned model in eval(), the masks by parameter name, and the threshold.

    The threshold is None where even the smallest cost too much, and for soft masks.
    """

    model: nn.Module
    masks: Masks
    threshold: float | None


def anp(
    model: nn.Module, clean: Dataset, config: AnpConfig, *, generator: torch.Generator, watch: Watch = iter
) -> nn.Module:
    """A copy of the model without the channels most sensitive to noise (arXiv:2110.14430), in eval().

    clean: the defender's images, uint8, with their labels.  The input model is not changed.
    Raises ValueError without clean images or batch norm, FloatingPointError when the loss is no longer a number.
    """
    return run(model, clean, config, generator=generator, watch=watch).model


def run(
    model: nn.Module, clean: Dataset, config: AnpConfig, *, generator: torch.Generator, watch: Watch = iter
) -> AnpResult:
    """As `anp`, with the masks and the chosen threshold beside the model."""
    if config.level == "neuron":
        require_batch_norm(model, "ANP")
    fitted, held = hold_out(clean, config.held_out, generator=generator)
    masks = learn_masks(model, fitted, config, generator=generator, watch=watch)
    if config.soft:
        return AnpResult(masked(model, masks), masks, None)
    threshold = strictest(
        model, sorted(config.thresholds), lambda value: prune(model, masks, value), held, config.max_drop
    )
    pruned = prune(model, masks, -1.0 if threshold is None else threshold)
    if config.tuning:
        pruned = tune(pruned, clean, config.tuning, generator=generator, watch=watch)
    return AnpResult(pruned, masks, threshold)


def recipe(count: int) -> AnpConfig:
    """The official setting; for fewer than 500 clean images a smaller batch and fewer steps.

    DIFFERS: 2,000 steps on a batch of 128 pass 200 images 1,280 times.
    """
    return AnpConfig() if count >= 500 else AnpConfig(steps=400, batch_size=32)


def toward_awm(config: AnpConfig) -> dict[str, AnpConfig]:
    """The first steps of the way from ANP to AWM (arXiv:2207.04497, Table 4): weights instead of neurons, then soft masks.

    The next two, a recovered trigger instead of noise and the L1 norm, are settings of AWM: gamma = 0, and its default.
    """
    weights = replace(config, level="weight")
    return {"ANP": config, "weight masks": weights, "soft masks": replace(weights, soft=True)}


def learn_masks(
    model: nn.Module, clean: Dataset, config: AnpConfig, *, generator: torch.Generator, watch: Watch = iter
) -> Masks:
    """Masks in [0, 1] by the name of the batch-norm scale, detached (steps 1 to 4)."""
    frozen = copy.deepcopy(model).requires_grad_(False)
    device = next(frozen.parameters()).device
    batches = Batches(clean, config.batch_size, device, generator=generator)
    parts = scales(frozen) if config.level == "neuron" else convolutions(frozen)
    masks = {name: torch.ones_like(part).requires_grad_(True) for name, part in parts.items()}
    optimizer = gpu.sgd(masks.values(), device, lr=config.mask_lr, momentum=config.momentum)

    def game(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        noise = worst_noise(frozen, masks, (images, labels), config, generator=batches.generator)
        loss = mask_loss(frozen, masks, noise, (images, labels), config)
        mask_step(masks, optimizer, loss)
        return loss.detach()

    step = gpu.replayed(game, device, [batches.generator])
    frozen.train()  # batch statistics, as in the code; the copy's running ones move, and are thrown away with it
    total = torch.zeros((), device=device)
    with seeded(generator, device):
        for _, (images, labels, _) in zip(watch(range(config.steps)), batches.forever(), strict=False):
            total += step(images, labels)
    require_finite(total, "ANP")
    return {name: mask.detach() for name, mask in masks.items()}


def worst_noise(
    model: nn.Module,
    masks: Masks,
    batch: tuple[torch.Tensor, torch.Tensor],
    config: AnpConfig,
    *,
    generator: torch.Generator,
) -> Masks:
    """Noise in [-epsilon, epsilon] on every scale and shift, by parameter name, that makes the loss large (step 3).

    DIFFERS: the official code does not clip, so its noise can reach 2 epsilon; ours stays within the paper's bound.
    """
    images, labels = batch
    with torch.no_grad():
        noise = {
            name: drawn(weight, config.epsilon, generator) for name, weight in noisy_parts(model, config.level).items()
        }
    for _ in range(config.noise_steps):
        noise = {name: part.detach().requires_grad_(True) for name, part in noise.items()}
        loss = F.cross_entropy(functional_call(model, changed(model, masks, noise), (images,)), labels)
        gradients = torch.autograd.grad(loss, list(noise.values()))
        # noise <- clip(noise + epsilon / steps sign(grad L), -epsilon, epsilon)
        step = config.epsilon / config.noise_steps
        noise = {
            name: (part + step * gradient.sign()).clamp(-config.epsilon, config.epsilon)
            for (name, part), gradient in zip(noise.items(), gradients, strict=True)
        }
    return {name: part.detach() for name, part in noise.items()}


def mask_loss(
    model: nn.Module, masks: Masks, noise: Masks, batch: tuple[torch.Tensor, torch.Tensor], config: AnpConfig
) -> torch.Tensor:
    """alpha L(m) + (1 - alpha) L(m, noise), a scalar (step 4)."""
    images, labels = batch
    still = F.cross_entropy(functional_call(model, changed(model, masks), (images,)), labels)
    noisy = F.cross_entropy(functional_call(model, changed(model, masks, noise), (images,)), labels)
    return config.alpha * still + (1 - config.alpha) * noisy


def changed(model: nn.Module, masks: Masks, noise: Masks | None = None) -> Masks:
    """Scales (m + noise) gamma and shifts (1 + noise) beta by parameter name, for functional_call."""
    factors = dict(masks)
    for name, part in (noise or {}).items():
        factors[name] = factors.get(name, 1.0) + part
    return {name: factor * model.get_parameter(name) for name, factor in factors.items()}


def noisy_parts(model: nn.Module, level: str) -> Masks:
    """What noise is put on, by parameter name: every scale and shift of batch norm, or every convolution weight."""
    if level == "weight":
        return convolutions(model)
    return {f"{name}.{part}": getattr(norm, part) for name, norm in norms(model).items() for part in ("weight", "bias")}


def drawn(like: torch.Tensor, epsilon: float, generator: torch.Generator) -> torch.Tensor:
    """Values drawn evenly from [-epsilon, epsilon], of this shape and on its device."""
    return (torch.rand(like.shape, generator=generator, device=generator.device) * 2 * epsilon - epsilon).to(like)
