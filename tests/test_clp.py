"""CLP: the bound by hand, which convolution belongs to which batch norm, what is removed."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from bdlib import models
from bdlib.defenses import clp
from bdlib.selection import OutlierConfig


@pytest.fixture
def scaled(network):
    network[1].weight.data = torch.tensor([0.5, -1.0, 1.5, 2.0])
    network[1].running_var = torch.tensor([0.25, 1.0, 4.0, 9.0])
    return network


def test_bound_by_numpy(scaled, tiny):
    bounds = clp.channel_bounds(scaled, tiny.floats()[:1])
    assert list(bounds) == ["1"]
    weight = scaled[0].weight.detach().numpy()
    for k, (gamma, deviation) in enumerate(((0.5, 0.5), (1.0, 1.0), (1.5, 2.0), (2.0, 3.0))):
        largest = np.linalg.svd(weight[k].reshape(3, 9), compute_uv=False)[0]
        assert bounds["1"][k].item() == pytest.approx(largest * gamma / deviation, rel=1e-4)


def test_flow_and_order_differ_in_a_preactivation_block(tiny):
    model = models.build("preact_resnet18:4", tiny.images, 3, generator=torch.Generator().manual_seed(0))
    names = {part: name for name, part in model.named_modules()}
    flow, order = (
        {norm: names[convolution] for norm, (convolution, _) in clp.pairs(model, tiny.floats()[:1], kind).items()}
        for kind in clp.PAIRINGS
    )
    second = [name for name in flow if name.endswith("bn2")]
    assert len(second) == 8 and all(flow[name] == name.replace("bn2", "conv1") for name in second)
    # Of the first norms, that of the first block alone reads a convolution, the stem; the others read a sum of two branches.
    assert len([name for name in flow if name.endswith("bn1")]) == 1 and set(flow.values()).isdisjoint(
        name for name in names.values() if name.endswith("conv2")
    )
    assert len([name for name in order if name.endswith("bn1")]) > 1


def test_flow_pairs_are_all_norms_of_a_resnet(tiny):
    model = models.build("resnet18:4", tiny.images, 3, generator=torch.Generator().manual_seed(0))
    norms = [name for name, part in model.named_modules() if isinstance(part, nn.BatchNorm2d)]
    assert sorted(clp.pairs(model, tiny.floats()[:1])) == sorted(norms)


def test_the_planted_channel_goes(scaled, tiny):
    model = copy.deepcopy(scaled)
    model[1].weight.data = torch.tensor([0.5, -1.0, 2.0, 100.0])
    pruned = clp.clp(model, tiny, OutlierConfig(u=1.4))
    assert (pruned[1].weight == 0).tolist() == [False, False, False, True] and pruned[1].bias[3] == 0
    assert torch.equal(pruned[0].weight, model[0].weight)


def test_u_3_needs_no_labels(scaled, tiny):
    """Data-free: the images do not matter where u is a number."""
    other = tiny.subset(torch.tensor([5]))
    one, two = (clp.clp(scaled, images, OutlierConfig(u=1.0)) for images in (tiny, other))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_an_unknown_pairing_and_a_network_without_pairs(network, tiny):
    with pytest.raises(ValueError, match="pairing must be one of flow, order, got 'near'"):
        clp.pairs(network, tiny.floats()[:1], "near")
    apart = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4))
    with pytest.raises(ValueError, match="CLP needs a convolution with a batch norm behind it"):
        clp.pairs(apart, tiny.floats()[:1])
    assert "2" in clp.pairs(apart, tiny.floats()[:1], "order")
