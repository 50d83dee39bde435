"""Masks on a model's parameters, learned for single weights (AWM) or channels (RNP, ANP), and channels taken out at batch norm."""

import copy

import torch
from torch import nn

Masks = dict[str, torch.Tensor]  # parameter name -> mask of the parameter's shape


def masked(model: nn.Module, masks: Masks) -> nn.Module:
    """A copy of the model with the masks multiplied into its parameters, in eval()."""
    product = copy.deepcopy(model).eval()
    with torch.no_grad():
        for name, mask in masks.items():
            product.get_parameter(name).mul_(mask)
    return product


def mask_step(masks: Masks, optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    """Step the masks downhill, in place, and clip them to [0, 1]."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        for mask in masks.values():
            mask.clamp_(0, 1)


def prune(model: nn.Module, masks: Masks, threshold: float) -> nn.Module:
    """A copy of the model in which every masked weight with m <= threshold is 0, in eval().

    A channel whose batch-norm scale is masked keeps its shift: it answers with a constant.
    """
    return masked(model, {name: mask > threshold for name, mask in masks.items()})


def norms(model: nn.Module) -> dict[str, nn.BatchNorm2d]:
    """Every nn.BatchNorm2d that has a scale and a shift, by name."""
    return {
        name: part
        for name, part in model.named_modules()
        if isinstance(part, nn.BatchNorm2d) and part.weight is not None
    }


def scales(model: nn.Module) -> Masks:
    """The scale of every batch norm that has one, by parameter name."""
    return {f"{name}.weight": layer.weight for name, layer in norms(model).items()}


def convolutions(model: nn.Module) -> Masks:
    """The weight of every convolution by parameter name."""
    return {f"{name}.weight": layer.weight for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)}


def require_batch_norm(model: nn.Module, method: str) -> None:
    """Raises ValueError, with the method's name, if the model has no batch norm with scales."""
    if not norms(model):
        raise ValueError(
            f"{method} works on the scales of batch norm, but the model has no nn.BatchNorm2d layer with affine=True: "
            "use a network with batch norm, such as preact_resnet18, resnet18 or wrn_16_1"
        )


def without_channels(model: nn.Module, channels: dict[str, torch.Tensor]) -> nn.Module:
    """A copy of the model, in eval(), in which channels of batch norms answer 0: scale and shift are 0.

    channels: name of an nn.BatchNorm2d -> bool (K,), true where the channel goes.
    """
    return masked(model, {f"{name}.{part}": ~gone for name, gone in channels.items() for part in ("weight", "bias")})
