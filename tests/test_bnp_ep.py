"""BNP and EP: the divergence and the entropy against other programs, the planted channel, the choice of images."""

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from bdlib.defenses import bnp, ep
from bdlib.defenses.ep import EpConfig
from bdlib.explain import norm_inputs
from bdlib.selection import OutlierConfig


@pytest.fixture
def seen(network, tiny):
    """What the batch norm reads, (4, values), by hand; running statistics that differ from it."""
    with torch.no_grad():
        maps = network[0](tiny.floats())
    network[1].running_mean = maps.mean((0, 2, 3)) + torch.tensor([0.0, 0.1, 0.2, 0.3])
    network[1].running_var = maps.var((0, 2, 3)) * torch.tensor([1.0, 2.0, 0.5, 1.0])
    return maps


def test_norm_inputs_are_what_the_norm_reads(network, tiny, seen):
    ((name, maps),) = norm_inputs(network, tiny.floats())
    assert name == "1" and torch.allclose(maps, seen, atol=1e-6)
    assert not network[1]._forward_hooks


def test_divergence_against_torch_distributions(network, tiny, seen):
    found = bnp.divergences(network, tiny.floats())["1"]
    norm = network[1]
    clean = Normal(seen.mean((0, 2, 3)), (seen.var((0, 2, 3)) + norm.eps).sqrt())
    running = Normal(norm.running_mean, (norm.running_var + norm.eps).sqrt())
    assert torch.allclose(found, kl_divergence(clean, running), atol=1e-5)
    assert not torch.allclose(found, kl_divergence(running, clean), atol=1e-3)
    assert found[0].abs() < 1e-5 and (found[1:] > 0.01).all()


def test_bnp_removes_the_channel_of_other_statistics(network, tiny, seen, generator):
    network[1].running_mean = seen.mean((0, 2, 3)) + torch.tensor([0.0, 0.0, 9.0, 0.0])
    network[1].running_var = seen.var((0, 2, 3))
    pruned = bnp.bnp(network, tiny, OutlierConfig(u=1.4), generator=generator)
    assert (pruned[1].weight == 0).tolist() == [False, False, True, False]


def test_bnp_measures_and_chooses_on_different_images(network, tiny, monkeypatch, generator):
    asked = {}
    monkeypatch.setattr(
        bnp, "divergences", lambda model, images: asked.update(measured=images) or {"1": torch.zeros(4)}
    )
    monkeypatch.setattr(bnp, "without_outliers", lambda model, values, config, held: asked.update(held=held))
    bnp.bnp(network, tiny, OutlierConfig(u=None), generator=generator)
    measured = {tuple(image.flatten().tolist()) for image in asked["measured"]}
    held = {tuple(image.flatten().tolist()) for image in asked["held"].floats()}
    assert len(measured) + len(held) == 36 and not measured & held and len(held) == 6
    bnp.bnp(network, tiny, OutlierConfig(u=3.0), generator=generator)
    assert len(asked["measured"]) == 36 and asked["held"] is None


@pytest.mark.parametrize("width", [0.1, 0.5])
def test_entropy_against_numpy(width):
    values = torch.randn(500, generator=torch.Generator().manual_seed(0))
    edges = np.arange(-10, 10 + width, width)
    share = np.histogram(values.numpy(), edges)[0] / 500
    by_hand = -sum(p * np.log(p) for p in share if p)
    assert ep.histogram_entropy(values, width).item() == pytest.approx(by_hand, abs=0.02)


def test_entropies_do_not_hang_on_scale_and_place(network, tiny, seen):
    config = EpConfig()
    before = ep.entropies(network, tiny.floats(), config)["1"]
    assert before.shape == (4,) and (before > 1).all()
    network[0].weight.data *= 8  # exact in binary
    network[0].bias.data *= 8
    assert torch.allclose(ep.entropies(network, tiny.floats(), config)["1"], before, atol=0.05)


def test_ep_removes_the_mixture(network, tiny, generator, monkeypatch):
    """A channel of two peaks has the lowest entropy, below mean - u std."""
    source = torch.Generator().manual_seed(0)
    maps = torch.randn(36, 4, 8, 8, generator=source)
    maps[:, 1] = 0.01 * maps[:, 1] + 5.0 * (torch.arange(36) < 18)[:, None, None]
    monkeypatch.setattr(ep, "norm_inputs", lambda model, images: [("1", maps)])
    low = ep.entropies(network, tiny.floats(), EpConfig())["1"]
    assert low.argmin() == 1
    pruned = ep.ep(network, tiny, EpConfig(u=1.4), generator=generator)
    assert (pruned[1].weight == 0).tolist() == [False, True, False, False]


def test_ep_reads_one_batch_of_the_training_set(network, tiny, generator, monkeypatch):
    sizes = []
    monkeypatch.setattr(
        ep, "entropies", lambda model, images, config: sizes.append(len(images)) or {"1": torch.ones(4)}
    )
    ep.ep(network, tiny, EpConfig(batch_size=10), generator=generator)
    ep.ep(network, tiny, EpConfig(), generator=generator)
    assert sizes == [10, 36]


def test_pooling_by_image_takes_the_largest_pixel(network, tiny, monkeypatch):
    maps = torch.zeros(36, 4, 8, 8)
    maps[:, :, 3, 3] = torch.arange(36.0)[:, None]
    monkeypatch.setattr(ep, "norm_inputs", lambda model, images: [("1", maps)])
    assert ep.entropies(network, tiny.floats(), EpConfig(pool="images"))["1"][0] > 3  # 36 values apart: at most log 36
    assert ep.entropies(network, tiny.floats(), EpConfig())["1"][0] < 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size must be above 0, got 0"),
        ({"bin_width": 0.0}, "bin_width must be above 0"),
        ({"pool": "rows"}, "pool must be one of pixels, images, got 'rows'"),
        ({"u": -2.0}, "u must not be negative"),
    ],
)
def test_bad_settings_of_ep(change, message):
    with pytest.raises(ValueError, match=message):
        EpConfig(**change)
