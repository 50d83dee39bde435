"""Implicit backdoor adversarial unlearning (I-BAU), Zeng et al., ICLR 2022, arXiv 2110.03735.

A min-max game over one perturbation delta for all images: min over theta of max over delta of L(f(x + delta; theta), y).  Each round:
 1  delta: one pass over the clean images, gradient ascent on L - c |delta|^2 from a delta of 0
 2  for each batch, step theta downhill along the hyper-gradient: how the loss at the best delta changes with theta, directly and
    because the best delta itself moves; the second part by K fixed-point iterations of
      v <- (d Phi / d delta)^T v + grad_delta L,   Phi(delta, theta) = delta - s grad_delta (c |delta|^2 - L)
    then   grad = grad_theta L + (d Phi / d theta)^T v
The model stays in eval(): batch-norm statistics do not move.  Settings are BackdoorBench's.
DIFFERS: y is the true label in both steps, as above; the authors' code and BackdoorBench's climb in step 1 on what the network says.
In step 2 the inner loss is that of the batch at hand, where both take the first batch each time.
"""

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from bdlib import gpu
from bdlib.data import Dataset
from bdlib.train import Batches, Watch, require_finite

Weights = dict[str, torch.Tensor]  # parameter name -> value
Batch = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class IBauConfig:
    """Settings of I-BAU; sources: [b] BackdoorBench.  Raises ValueError if one is out of range."""

    rounds: int = 5  # [b]; 3 in the authors' notebooks
    batch_size: int = 256  # images; never more than there are [b]
    lr: float = 1e-4  # Adam, of the weights [b]; 1e-3 in the authors' notebooks
    delta_lr: float = 10.0  # SGD, of the perturbation in step 1 [b]
    # Largest L2 norm of delta, for images in [0, 1]; None = free [b].  A 4 x 4 patch is at most 7 long, Blended's noise about 4.
    radius: float | None = None
    decay: float = 1e-3  # c, weight of |delta|^2 [b]
    fixed_points: int = 5  # K [b]
    inner_step: float = 0.1  # s [b]
    # Share of a batch that carries delta in the outer loss; the rest is clean [b].  In the inner loss all do.
    share: float = 0.01

    def __post_init__(self) -> None:
        for name in ("rounds", "batch_size", "lr", "delta_lr", "inner_step"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.radius is not None and not self.radius > 0:
            raise ValueError(f"radius must be above 0 or None, got {self.radius}")
        for name in ("decay", "fixed_points"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be in (0, 1], got {self.share}")


def i_bau(
    model: nn.Module, clean: Dataset, config: IBauConfig, *, generator: torch.Generator, watch: Watch = iter
) -> nn.Module:
    """A copy of the model that no universal perturbation turns (arXiv:2110.03735), in eval().

    clean: the defender's images, uint8, with their labels.  The input model is not changed.
    Raises ValueError without clean images, FloatingPointError when the loss is no longer a number.
    """
    tuned = copy.deepcopy(model).eval().requires_grad_(True)
    weights = dict(tuned.named_parameters())
    device = next(tuned.parameters()).device
    batches = Batches(clean, config.batch_size, device, generator=generator)
    optimizer = gpu.adam(weights.values(), device, lr=config.lr)
    for number in watch(range(config.rounds)):
        delta = worst_perturbation(tuned, batches, config)
        for images, labels, _ in batches:
            gradients = hyper_gradients(tuned, weights, delta, (images, labels), config)
            gpu.set_gradients(weights, gradients)
            optimizer.step()
        require_finite(sum(gradient.sum() for gradient in gradients.values()), f"round {number + 1} of I-BAU")
    return tuned.eval()


def recipe(count: int) -> IBauConfig:
    """BackdoorBench's setting; for fewer than 2,500 clean images the authors' rate, smaller batches, and delta as long as a trigger.

    DIFFERS: its 2,500 images make 50 steps of the weights; a tenth of the images a batch, at least 16, and ten rounds make up to 100.
    On a narrow network's large gradients a free delta grows to several times the length of an image, and no weights withstand that.
    """
    if count >= 2500:
        return IBauConfig()
    return IBauConfig(rounds=10, batch_size=min(128, max(16, -(-count // 10))), lr=1e-3, radius=10.0)


def worst_perturbation(model: nn.Module, batches: Batches, config: IBauConfig) -> torch.Tensor:
    """delta (1, C, H, W) after one pass uphill on the inner objective (step 1)."""
    delta = None
    for images, labels, _ in batches:
        if delta is None:
            delta = torch.zeros_like(images[:1])
        delta = delta.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(inner_loss(model, {}, delta, (images, labels), config), delta)
        delta = delta - config.delta_lr * gradient
        if config.radius is not None:
            delta = delta * (config.radius / delta.norm().clamp(min=1e-12)).clamp(max=1)
    return delta.detach()


def inner_loss(
    model: nn.Module, weights: Weights, delta: torch.Tensor, batch: Batch, config: IBauConfig
) -> torch.Tensor:
    """c |delta|^2 - L(f(x + delta), y), which delta makes small: a scalar."""
    images, labels = batch
    loss = F.cross_entropy(functional_call(model, weights, (images + delta,)), labels)
    return config.decay * delta.square().sum() - loss


def outer_loss(
    model: nn.Module, weights: Weights, delta: torch.Tensor, batch: Batch, config: IBauConfig
) -> torch.Tensor:
    """L on a batch of which a share, one image at least, carries delta: a scalar."""
    images, labels = batch
    count = max(1, round(config.share * len(images)))
    perturbed = torch.cat([images[:count] + delta, images[count:]])
    return F.cross_entropy(functional_call(model, weights, (perturbed,)), labels)


def hyper_gradients(
    model: nn.Module, weights: Weights, delta: torch.Tensor, batch: Batch, config: IBauConfig
) -> Weights:
    """The gradient of the outer loss at the best delta, by parameter name (step 2)."""
    delta = delta.detach().requires_grad_(True)
    parameters = list(weights.values())
    of_delta, *direct = torch.autograd.grad(outer_loss(model, weights, delta, batch, config), [delta, *parameters])
    (slope,) = torch.autograd.grad(inner_loss(model, weights, delta, batch, config), delta, create_graph=True)
    moved = delta - config.inner_step * slope  # Phi(delta, theta)
    v = torch.zeros_like(delta)
    for _ in range(config.fixed_points):
        # v <- (d Phi / d delta)^T v + grad_delta L
        v = torch.autograd.grad(moved, delta, grad_outputs=v, retain_graph=True)[0] + of_delta
    # grad = grad_theta L + (d Phi / d theta)^T v
    through = torch.autograd.grad(moved, parameters, grad_outputs=v, allow_unused=True)
    return {
        name: first if second is None else first + second
        for name, first, second in zip(weights, direct, through, strict=True)
    }
