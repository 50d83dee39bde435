"""Masks multiplied into a copy of a model."""

import pytest
import torch
from torch import nn

from bdlib import masks
from bdlib.masks import masked


def test_masks_are_multiplied_into_a_copy(network):
    product = masked(network.train(), {"1.weight": torch.tensor([0.0, 0.5, 1.0, 1.0])})
    assert torch.equal(product[1].weight, network[1].weight * torch.tensor([0.0, 0.5, 1.0, 1.0]))
    assert not product.training and network.training and torch.equal(product[0].weight, network[0].weight)


def test_pruned_scales_are_0_up_to_the_threshold(network):
    pruned = masks.prune(network, {"1.weight": torch.tensor([0.0, 0.3, 0.31, 1.0])}, 0.3)
    assert pruned[1].weight.tolist() == [0, 0, 1, 1] and torch.equal(pruned[1].bias, network[1].bias)


def test_channels_taken_out_answer_0(network, tiny):
    network[1].bias.data = torch.tensor([1.0, 2.0, 3.0, 4.0])
    gone = masks.without_channels(network, {"1": torch.tensor([True, False, False, True])})
    maps = gone[1](gone[0](tiny.floats()))
    assert (maps[:, [0, 3]] == 0).all() and (maps[:, [1, 2]] != 0).any() and not gone.training


def test_norms_without_scales_do_not_count(network):
    assert list(masks.norms(network)) == ["1"] and list(masks.scales(network)) == ["1.weight"]
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False))
    assert not masks.norms(plain)
    with pytest.raises(ValueError, match="RNP works on the scales of batch norm"):
        masks.require_batch_norm(plain, "RNP")
