"""MCR: the curve by hand, its ends, the control point's training, the batch-norm statistics of the result."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

from bdlib.defenses import mcr
from bdlib.defenses.mcr import McrConfig
from bdlib.train import TrainConfig
from tests.conftest import same, state

TUNING = TrainConfig(epochs=2, batch_size=12, lr=0.05)


def test_the_curve_by_hand():
    ends = {"a": torch.tensor(1.0)}, {"a": torch.tensor(5.0)}
    middle = {"a": torch.tensor(10.0)}
    assert [mcr.on_path(ends, middle, t)["a"].item() for t in (0.0, 0.5, 1.0)] == [1.0, 6.5, 5.0]
    assert mcr.on_path(ends, middle, 0.25)["a"].item() == pytest.approx(0.5625 + 3.75 + 0.3125)


@pytest.mark.parametrize("t", [0.0, 1.0])
def test_the_ends_are_the_model_and_its_fine_tuned_copy(network, tiny, t):
    config = McrConfig(t=t, end=TUNING, path=TUNING)
    found = mcr.mcr(network, tiny, config, generator=torch.Generator().manual_seed(0))
    tuned = mcr.fine_tuning(network, tiny, TUNING, generator=torch.Generator().manual_seed(0))
    wanted = network if t == 0 else tuned
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found.parameters(), wanted.parameters(), strict=True))


def test_a_second_network_is_the_other_end(network, tiny, monkeypatch):
    """Given one, nothing is fine-tuned, and neither network is changed."""
    monkeypatch.delattr(mcr, "fine_tuning")
    other = copy.deepcopy(network)
    with torch.no_grad():
        other[0].weight += 1.0
    before = state(network), state(other)
    config = McrConfig(t=1.0, path=TUNING)
    found = mcr.mcr(network, tiny, config, generator=torch.Generator().manual_seed(0), other=other)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found.parameters(), other.parameters(), strict=True))
    assert same(before[0], state(network)) and same(before[1], state(other))


def test_statistics_are_those_of_the_clean_images(network, tiny, generator):
    network[1].running_mean += 50.0
    config = McrConfig(t=0.5, end=TUNING, path=replace(TUNING, batch_size=36))
    found = mcr.mcr(network, tiny, config, generator=generator)
    with torch.no_grad():
        seen = found[0](tiny.floats())
    assert torch.allclose(found[1].running_mean, seen.mean((0, 2, 3)), atol=1e-4)
    assert torch.allclose(found[1].running_var, seen.var((0, 2, 3)), atol=1e-4)


def test_the_control_point_by_hand(network, tiny):
    """One step of SGD, from halfway, on the loss of w(t) at a drawn t."""
    network[3].p = 0.0
    plain = replace(tiny, crop_padding=0, flip=False)
    other = mcr.fine_tuning(network, plain, TUNING, generator=torch.Generator().manual_seed(9))
    ends = mcr.weights_of(network), mcr.weights_of(other)
    step = TrainConfig(epochs=1, batch_size=36, lr=0.5, momentum=0.0, weight_decay=0.0, schedule="constant")
    found = mcr.train_middle(network, ends, plain, McrConfig(path=step), generator=torch.Generator().manual_seed(4))
    source = torch.Generator().manual_seed(4)
    order = torch.randperm(36, generator=source)
    t = torch.rand((), generator=source).item()
    leaf = {name: ((start + ends[1][name]) / 2).requires_grad_(True) for name, start in ends[0].items()}
    curve = {
        name: (1 - t) ** 2 * ends[0][name] + 2 * t * (1 - t) * middle + t * t * ends[1][name]
        for name, middle in leaf.items()
    }
    images, labels = plain.floats()[order], plain.labels[order]
    gradients = torch.autograd.grad(
        F.cross_entropy(functional_call(network.train(), curve, (images,)), labels), list(leaf.values())
    )
    for (name, start), gradient in zip(leaf.items(), gradients, strict=True):
        assert torch.allclose(found[name], start - 0.5 * gradient, atol=1e-4), name


def test_bad_settings():
    with pytest.raises(ValueError, match=r"t must be in \[0, 1\], got 1.5"):
        McrConfig(t=1.5)
