"""Fine-pruning: channels at rest go first, within the drop allowed, and stay silent while the rest is tuned."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from bdlib.defenses import fine_pruning, linf_pruning
from bdlib.defenses.fine_pruning import FinePruningConfig
from bdlib.defenses.ft_sam import FtSamConfig, ft_sam
from bdlib.train import TrainConfig, accuracy


@pytest.fixture
def colors() -> nn.Module:
    """Channels 0-2 of its feature map are the colors, three times as strong as needed; 3 to 5 are nearly at rest and not used."""
    model = nn.Sequential(
        nn.Conv2d(3, 6, 1, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)
    )
    model[0].weight.data = torch.cat([3 * torch.eye(3), 0.01 * torch.eye(3)]).view(6, 3, 1, 1)
    model[4].weight.data = torch.cat([torch.eye(3), torch.zeros(3, 3)], 1)
    model[4].bias.data.zero_()
    return model


def kept(model: nn.Module) -> list[float]:
    return next(part for part in model.modules() if isinstance(part, linf_pruning.Silenced)).kept.flatten().tolist()


def test_the_least_active_channels_go_and_no_others(colors, tiny, generator):
    assert accuracy(colors, tiny) == 1.0
    pruned = fine_pruning.prune_resting(colors, tiny, FinePruningConfig(), generator=generator)
    assert kept(pruned) == [1, 1, 1, 0, 0, 0]


def test_the_drop_allowed_is_a_share_of_the_accuracy(colors, tiny, generator, monkeypatch):
    asked = []
    monkeypatch.setattr(fine_pruning, "accuracy", lambda model, held: 0.5)
    monkeypatch.setattr(fine_pruning, "choose_count", lambda *rest: asked.append(rest[-1]) or 2)
    pruned = fine_pruning.prune_resting(colors, tiny, FinePruningConfig(max_drop=0.2), generator=generator)
    assert asked == [pytest.approx(0.1)] and sum(kept(pruned)) == 4


def test_measured_and_held_out_images_are_apart(colors, tiny, generator, monkeypatch):
    seen = {}
    score, choose = fine_pruning.channel_scores, fine_pruning.choose_count
    monkeypatch.setattr(
        fine_pruning, "channel_scores", lambda m, x, *rest, **named: seen.update(x=x) or score(m, x, *rest, **named)
    )
    monkeypatch.setattr(
        fine_pruning, "choose_count", lambda m, n, o, held, drop: seen.update(held=held) or choose(m, n, o, held, drop)
    )
    fine_pruning.prune_resting(colors, tiny, FinePruningConfig(held_out=0.25), generator=generator)
    both = torch.cat([seen["x"], seen["held"].floats()])
    assert len(seen["held"]) == 9 and len(both.flatten(1).unique(dim=0)) == 36


def test_silent_channels_stay_silent_in_tuning(colors, tiny, generator):
    config = FinePruningConfig(tuning=TrainConfig(epochs=2, batch_size=12, lr=0.1))
    tuned = fine_pruning.fine_pruning(colors, tiny, config, generator=generator)
    assert kept(tuned) == [1, 1, 1, 0, 0, 0]
    assert not torch.equal(tuned[4].weight, colors[4].weight)


def test_an_ft_sam_config_tunes_by_ft_sam(colors, tiny):
    config = FtSamConfig(epochs=2, batch_size=12)
    tuned = fine_pruning.tune(colors, tiny, config, generator=torch.Generator().manual_seed(1))
    by_hand = ft_sam(colors, tiny, config, generator=torch.Generator().manual_seed(1))
    plain = fine_pruning.tune(
        colors, tiny, TrainConfig(epochs=2, batch_size=12), generator=torch.Generator().manual_seed(1)
    )
    assert torch.equal(tuned[4].weight, by_hand[4].weight) and not torch.equal(plain[4].weight, by_hand[4].weight)


@pytest.mark.parametrize("name", ["max_drop", "held_out"])
def test_bad_settings(name):
    with pytest.raises(ValueError, match=rf"{name} must be in \[0, 1\), got 1.5"):
        replace(FinePruningConfig(), **{name: 1.5})
