"""NAD: attention maps and loss by hand, who teaches whom, which layers."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from bdlib import models
from bdlib.defenses import nad
from bdlib.defenses.nad import NadConfig
from bdlib.explain import feature_maps, stages
from bdlib.train import TrainConfig

TRAINING = TrainConfig(epochs=2, batch_size=12, lr=0.05)


def test_attention_by_hand():
    maps = torch.tensor([[[[1.0, -2.0], [0.0, 3.0]], [[2.0, 0.0], [1.0, 1.0]]]])  # two channels of 2 x 2
    raw = torch.tensor([5.0, 4.0, 1.0, 10.0])
    assert torch.allclose(nad.attention(maps, 2.0), (raw / raw.norm())[None])
    cubed = torch.tensor([9.0, 8.0, 1.0, 28.0])
    assert torch.allclose(nad.attention(maps, 3.0), (cubed / cubed.norm())[None])


@pytest.fixture
def pair(network):
    """Student and teacher without dropout; the teacher's convolution is another."""
    network[3].p = 0.0
    teacher = copy.deepcopy(network).requires_grad_(False)
    teacher[0].weight += 0.3 * torch.randn(teacher[0].weight.shape, generator=torch.Generator().manual_seed(0))
    return network.eval(), teacher.eval()


def test_loss_by_hand(pair, tiny):
    student, teacher = pair
    images, labels = tiny.floats()[:12], tiny.labels[:12]
    config = NadConfig(layers=("1", "4"), betas=(3.0, 7.0))
    loss = nad.distillation_loss(student, teacher, (images, labels), ("1", "4"), config)
    expected = F.cross_entropy(student(images), labels)
    for beta, end in ((3.0, 2), (7.0, 5)):
        mine, theirs = (F.normalize(m[:end](images).square().sum(1).flatten(1), dim=1) for m in (student, teacher))
        expected = expected + beta * (mine - theirs).square().mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4) and loss.requires_grad
    alike = nad.distillation_loss(student, student, (images, labels), ("1", "4"), config)
    assert alike.item() == pytest.approx(F.cross_entropy(student(images), labels).item(), rel=1e-5) and alike < loss


def test_the_teacher_is_the_fine_tuned_copy_and_does_not_move(network, tiny, generator, monkeypatch):
    taught = []
    tuned = nad.fine_tuning(network, tiny, TRAINING, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(nad, "fine_tuning", lambda *rest, **named: tuned)
    before = tuned[0].weight.clone()
    loss = nad.distillation_loss
    monkeypatch.setattr(nad, "distillation_loss", lambda s, t, *rest: taught.append((s, t)) or loss(s, t, *rest))
    result = nad.nad(network, tiny, NadConfig(training=TRAINING, betas=(1.0,)), generator=generator)
    assert len(taught) == 6 and all(t is tuned and s is result for s, t in taught)
    assert torch.equal(tuned[0].weight, before) and not tuned.training


def test_beta_0_is_fine_tuning(network, tiny):
    """With weights of 0 the student takes the very steps of fine-tuning, from the model and not from the teacher."""
    network[3].p = 0.0
    plain = replace(tiny, crop_padding=0, flip=False)
    training = replace(TRAINING, batch_size=36, drop_last=False)
    config = NadConfig(training=training, betas=(0.0,))
    student = nad.nad(network, plain, config, generator=torch.Generator().manual_seed(1))
    tuned = nad.fine_tuning(network, plain, training, generator=torch.Generator().manual_seed(2))
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(student.parameters(), tuned.parameters(), strict=True))


def test_a_large_beta_draws_the_attention_to_the_teacher(network, tiny, monkeypatch):
    network[3].p = 0.0
    teacher = copy.deepcopy(network).eval().requires_grad_(False)
    teacher[0].weight += 0.3 * torch.randn(teacher[0].weight.shape, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(nad, "fine_tuning", lambda *rest, **named: teacher)

    def distance(beta: float) -> float:
        config = NadConfig(training=replace(TRAINING, epochs=8), betas=(beta,), layers=("4",))
        student = nad.nad(network, tiny, config, generator=torch.Generator().manual_seed(1))
        maps = [F.normalize(m[:5](tiny.floats()).square().sum(1).flatten(1), dim=1) for m in (student, teacher)]
        return (maps[0] - maps[1]).square().mean().item()

    assert distance(100.0) < 0.7 * distance(0.0)


def test_stages_are_the_last_maps_of_each_size(tiny):
    model = models.build("preact_resnet18:4", tiny.images, 3, generator=torch.Generator().manual_seed(0))
    first, second = stages(model, tiny.floats()[:1], 2)
    sizes = [tuple(feature_maps(model, tiny.floats()[:1], name).shape[2:]) for name in (first, second)]
    assert sizes == [(4, 4), (2, 2)]
    with pytest.raises(ValueError, match="feature maps of at least 9 sizes, it has 8 x 8, 4 x 4, 2 x 2"):
        stages(model, tiny.floats()[:1], 9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"power": 0.0}, "power must be above 0, got 0.0"),
        ({"betas": ()}, "betas must be numbers from 0 on"),
        ({"layers": ("1",)}, "layers must be as many as betas, 3, got 1"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        NadConfig(**change)
