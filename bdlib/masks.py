"""Masks on a model's parameters, which AWM learns for single weights and RNP for channels."""

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
