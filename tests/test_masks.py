"""Masks multiplied into a copy of a model."""

import torch

from bdlib.masks import masked


def test_masks_are_multiplied_into_a_copy(network):
    product = masked(network.train(), {"1.weight": torch.tensor([0.0, 0.5, 1.0, 1.0])})
    assert torch.equal(product[1].weight, network[1].weight * torch.tensor([0.0, 0.5, 1.0, 1.0]))
    assert not product.training and network.training and torch.equal(product[0].weight, network[0].weight)
