"""Adversarial Weight Masking (AWM), Chai & Chen, NeurIPS 2022, arXiv 2207.04497.

A soft mask m in [0, 1] on every weight of every convolution, found by a min-max game on the clean images (Alg. 1):
 1  m = 1
 2  for each outer epoch:
 3    start the universal perturbation at 0
 4    for T batches: step it uphill on the loss of the masked model          (recover the trigger)
 5    shrink it once to an L1 norm of at most tau
 6    for T batches: step m downhill on alpha L(x) + beta L(x + perturbation) + gamma |m|_1, clip m to [0, 1]
The result is the model with weights m * w: no threshold, no fine-tuning, batch norm untouched.

Paper and official code (jinghuichen/AWM, a4a5f16) differ; the defaults here are the code's, `paper_variant` gives the paper's.
"""

import copy
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from bdlib import gpu
from bdlib.augment import random_resized_crop
from bdlib.data import Dataset
from bdlib.masks import Masks, mask_step, masked
from bdlib.train import Watch, require_finite

Batch = tuple[torch.Tensor, torch.Tensor]  # images, float32 (B, C, H, W) in [0, 1], and labels (B,)
# Share of the weights that convolutions must hold at least: AlexNet with its three large linear layers has 4%, ViT-B/16 0.04%.
LEAST_SHARE = 0.01


@dataclass(frozen=True, kw_only=True)
class AwmConfig:
    """Settings of AWM; sources: [c] official code's default, [r] its README.  Raises ValueError if one is out of range."""

    outer_epochs: int = 20  # [c]
    inner_epochs: int = 5  # passes over the images in each of the two phases of an outer epoch [c]
    batch_size: int = 128  # images [c]; 32 in the small-budget recipes [r]; never more than there are
    perturbation_lr: float = 10.0  # SGD without momentum [c]
    mask_lr: float = 0.01  # [c]
    mask_optimizer: str = "adam"  # "adam" [c]; "sgd" = the plain gradient step of Alg. 1
    adam_epsilon: float = 1e-8  # [c]; see `gamma`
    alpha: float = 0.9  # weight of the clean loss [c]; .99 in CIFAR-10's one-shot recipe [r]
    beta: float | None = None  # weight of the perturbed loss; None = 1 - alpha [c]; the paper keeps it free
    # Weight of the L1 norm of the masks [c].  Adam divides by |gradient| + adam_epsilon: where the data's gradient is exactly
    # 0, a gamma as small as adam_epsilon still moves a mask by half a step.
    gamma: float = 1e-8
    # Bound on the perturbation's L1 norm, a sum over pixel values in [0, 1] [c]; 100 for few images [r]
    tau: float = 1000.0
    lr_decay: float = 1.0  # factor on mask_lr after every outer epoch; 1 = off [c]; .9 in the code's first release
    inner_label: str = "model"  # labels of the inner loss: "model" = its own argmax on x [c]; "true" = y (Alg. 1)
    clamp: bool = True  # clip x + perturbation to [0, 1] in the outer loss [c]; Alg. 1 does not
    copies: int = 0  # augmented copies of each image added once at the start; 9 in CIFAR-10's one-shot recipe [c]
    # Smallest share of an image's area that such a copy shows; .08 on CIFAR-10 [c]; None = as the dataset says.
    # DIFFERS: signs and digits show at least half, because 8% of a sign do not show its class.
    least_area: float | None = None

    def __post_init__(self) -> None:
        sizes = ("outer_epochs", "inner_epochs", "batch_size", "perturbation_lr", "mask_lr", "tau", "lr_decay")
        for name in (*sizes, "adam_epsilon"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be in [0, 1], got {self.alpha}")
        for name in ("beta", "gamma", "copies"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.least_area is not None and not 0 < self.least_area <= 1:
            raise ValueError(f"least_area must be in (0, 1], got {self.least_area}")
        for name, allowed in (("mask_optimizer", ("adam", "sgd")), ("inner_label", ("model", "true"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class AwmResult:
    """What AWM found: the masked model in eval(), the masks by parameter name, the last perturbation (1, C, H, W)."""

    model: nn.Module
    masks: Masks
    perturbation: torch.Tensor


def awm(
    model: nn.Module, clean: Dataset, config: AwmConfig, *, generator: torch.Generator, watch: Watch = iter
) -> nn.Module:
    """A copy of the model whose convolution weights are masked (Alg. 1, arXiv:2207.04497), in eval().

    clean: the defender's images, uint8, with their labels.  The input model is not changed.
    Raises ValueError without clean images or convolutions, FloatingPointError when the loss is no longer a number.
    """
    return run(model, clean, config, generator=generator, watch=watch).model


def run(
    model: nn.Module, clean: Dataset, config: AwmConfig, *, generator: torch.Generator, watch: Watch = iter
) -> AwmResult:
    """As `awm`, with the masks and the last perturbation beside the model."""
    frozen = copy.deepcopy(model).eval().requires_grad_(False)  # eval(): batch-norm statistics stay as they are
    images, labels = defense_images(clean, config, next(frozen.parameters()).device, generator=generator)
    batch_size = min(config.batch_size, len(labels))
    steps = len(labels) // batch_size * config.inner_epochs
    masks = initial_masks(frozen)
    optimizer = mask_optimizer(masks, config)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, config.lr_decay)

    def uphill(perturbation: torch.Tensor, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return perturbation_step(frozen, masks, perturbation, (images, labels), config)

    def downhill(perturbation: torch.Tensor, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        loss = mask_loss(frozen, masks, perturbation, (images, labels), config)
        mask_step(masks, optimizer, loss)
        return loss.detach()

    uphill, downhill = (gpu.replayed(step, images.device) for step in (uphill, downhill))
    for epoch in watch(range(config.outer_epochs)):
        batches = torch.randint(len(labels), (2, steps, batch_size), generator=generator).to(images.device)
        perturbation = torch.zeros_like(images[:1])
        for picks in batches[0]:
            perturbation = uphill(perturbation, images[picks], labels[picks])
        perturbation = project_l1(perturbation, config.tau)
        total = torch.zeros((), device=images.device)
        for picks in batches[1]:
            total += downhill(perturbation, images[picks], labels[picks])
        scheduler.step()
        require_finite(total, f"outer epoch {epoch + 1} of AWM")
    masks = {name: mask.detach() for name, mask in masks.items()}
    return AwmResult(masked(model, masks), masks, perturbation)


def recipe(count: int, classes: int) -> AwmConfig:
    """The setting for so many clean images: one-shot (no more images than classes), few, or many.

    DIFFERS: the README has recipes for 500 images, for 43 on GTSRB and for one-shot on CIFAR-10 only, and its default batch of
    128 leaves 0 steps below 128 images.  One-shot is CIFAR-10's here whatever the data; GTSRB's own, for its 43 images, has the
    default alpha of .9 and no copies.  Other budgets below 128 have a batch of 32 and copies up to about 100 images.
    From 128 to 499 images the rate decays as in the code's first release: there are fewer steps, 5 an outer epoch with 200 images
    instead of 15, and at a constant rate the masks have not settled at the end (ACC on the clean images themselves fell to .875).
    """
    if count <= classes:
        return AwmConfig(batch_size=32, tau=100.0, alpha=0.99, copies=9)
    if count < 128:
        return AwmConfig(batch_size=32, tau=100.0, copies=max(0, round(100 / count) - 1))
    return AwmConfig() if count >= 500 else AwmConfig(lr_decay=0.9)


def paper_variant(config: AwmConfig) -> AwmConfig:
    """The setting with the paper's Alg. 1 wherever the code differs: true labels, no clamp, plain gradient step.

    mask_lr is ours: the paper's step size was not retrieved.
    """
    return replace(config, inner_label="true", clamp=False, mask_optimizer="sgd", mask_lr=1.0)


def sensitivity(config: AwmConfig) -> dict[str, AwmConfig]:
    """One setting changed at a time, by the name of the change: how much the result hangs on it."""
    changes: dict[str, dict[str, float]] = {
        **{f"alpha={value}": {"alpha": value} for value in (0.5, 0.7, 0.99)},
        **{f"gamma={value:g}": {"gamma": value} for value in (0.0, 1e-7, 1e-6, 1e-5)},
        **{f"tau={value:g}": {"tau": value} for value in (10.0, 100.0, 300.0)},
        "adam_epsilon=1e-06": {"adam_epsilon": 1e-6},
        **{f"lr_decay={value:g}": {"lr_decay": value} for value in (0.9, 1.0)},
    }
    changed = {name: replace(config, **change) for name, change in changes.items()}
    return {name: other for name, other in changed.items() if other != config} | {
        "paper's Alg. 1": paper_variant(config)
    }


def defense_images(
    clean: Dataset, config: AwmConfig, device: torch.device, *, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """The clean images, float32 in [0, 1], with `copies` augmented copies of each behind them, and all labels."""
    if not len(clean):
        raise ValueError("AWM needs at least one clean image, got none")
    images, labels = clean.floats().to(device), clean.labels.to(device)
    if config.copies:
        least_area = clean.least_area if config.least_area is None else config.least_area
        copies = images.repeat(config.copies, 1, 1, 1)
        augmented = random_resized_crop(copies, clean.flip, generator=generator, scale=(least_area, 1.0))
        images, labels = torch.cat([images, augmented]), labels.repeat(config.copies + 1)
    return images, labels


def initial_masks(model: nn.Module) -> Masks:
    """A mask of ones for the weight of every convolution: not for biases, batch norm or linear layers.

    Raises ValueError where there are none, or too few to carry a backdoor.
    """
    convolutions = {f"{name}.weight": layer for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)}
    if not convolutions:
        raise ValueError("AWM masks convolution weights, but the model has no nn.Conv2d layer")
    share = sum(part.weight.numel() for part in convolutions.values()) / sum(p.numel() for p in model.parameters())
    if share < LEAST_SHARE:
        raise ValueError(
            f"AWM masks convolution weights, but only {share:.2%} of the model's weights are such (a Vision Transformer "
            f"embeds its patches by one convolution): it needs at least {LEAST_SHARE:.0%}"
        )
    return {name: torch.ones_like(layer.weight).requires_grad_(True) for name, layer in convolutions.items()}


def mask_optimizer(masks: Masks, config: AwmConfig) -> torch.optim.Optimizer:
    """One optimizer for the whole run: its moments outlast the outer epochs, as in the official code."""
    device = next(iter(masks.values())).device
    if config.mask_optimizer == "adam":
        return gpu.adam(masks.values(), device, lr=config.mask_lr, eps=config.adam_epsilon)
    return gpu.sgd(masks.values(), device, lr=config.mask_lr)


def masked_weights(model: nn.Module, masks: Masks) -> Masks:
    """The weights m * w by parameter name, for functional_call."""
    return {name: model.get_parameter(name) * mask for name, mask in masks.items()}


def perturbation_step(
    model: nn.Module, masks: Masks, perturbation: torch.Tensor, batch: Batch, config: AwmConfig
) -> torch.Tensor:
    """The perturbation (1, C, H, W) after one step uphill on the masked model's loss (Alg. 1 lines 5-7)."""
    images, labels = batch
    with torch.no_grad():
        weights = masked_weights(model, masks)
        if config.inner_label == "model":
            labels = functional_call(model, weights, (images,)).argmax(1)
    perturbation = perturbation.detach().requires_grad_(True)
    loss = F.cross_entropy(functional_call(model, weights, (images + perturbation,)), labels)
    (gradient,) = torch.autograd.grad(loss, perturbation)
    # Delta <- Delta + eta_1 grad L(f(x + Delta; m * w), y)
    return (perturbation + config.perturbation_lr * gradient).detach()


def project_l1(perturbation: torch.Tensor, tau: float) -> torch.Tensor:
    """The perturbation shrunk to an L1 norm of at most tau (Alg. 1 line 9)."""
    # Delta <- Delta * min(1, tau / |Delta|_1)
    return perturbation * (tau / perturbation.abs().sum().clamp(min=1e-12)).clamp(max=1)


def mask_loss(
    model: nn.Module, masks: Masks, perturbation: torch.Tensor, batch: Batch, config: AwmConfig
) -> torch.Tensor:
    """The objective of the masks, a scalar (Alg. 1 line 11)."""
    images, labels = batch
    perturbed = images + perturbation
    if config.clamp:
        perturbed = perturbed.clamp(0, 1)
    beta = 1 - config.alpha if config.beta is None else config.beta
    both = functional_call(model, masked_weights(model, masks), (torch.cat([images, perturbed]),))
    clean_logits, perturbed_logits = both.chunk(2)
    # L = alpha L(f(x; m * w), y) + beta L(f(x + Delta; m * w), y) + gamma |m|_1
    loss = config.alpha * F.cross_entropy(clean_logits, labels) + beta * F.cross_entropy(perturbed_logits, labels)
    return loss + config.gamma * sum(mask.abs().sum() for mask in masks.values())


def binarize(masks: Masks, threshold: float = 0.5) -> Masks:
    """The masks with 0 up to the threshold and 1 above: the hard mask that the paper argues against."""
    return {name: (mask > threshold).to(mask) for name, mask in masks.items()}
