"""How much to prune: the strictest setting that clean images allow, and the outlier rule."""

import math

import pytest
import torch
from torch import nn

from bdlib import models, selection
from bdlib.selection import OutlierConfig


class Said(nn.Module):
    """Calls every image its own class for the first `right` of 36 images, the next class for the others."""

    def __init__(self, right: int, labels: torch.Tensor):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.answers = torch.where(torch.arange(len(labels)) < right, labels, (labels + 1) % 3)

    def forward(self, images):
        return nn.functional.one_hot(self.answers[: len(images)], 3).float()


@pytest.mark.parametrize(
    ("rights", "max_drop", "chosen"),
    [
        ((36, 35, 34, 20), 0.06, 3.0),  # 34 of 36 is a drop of .056
        ((36, 35, 34, 20), 0.05, 2.0),
        ((36, 20, 36, 36), 0.05, 1.0),  # what comes after the first that costs too much is not looked at
        ((20, 36, 36, 36), 0.05, None),
        ((36, 36, 36, 36), 0.0, 4.0),
    ],
)
def test_strictest_is_the_last_before_accuracy_falls(tiny, rights, max_drop, chosen):
    settings = dict(zip((1.0, 2.0, 3.0, 4.0), rights, strict=True))
    found = selection.strictest(
        Said(36, tiny.labels), list(settings), lambda value: Said(settings[value], tiny.labels), tiny, max_drop
    )
    assert found == chosen


def test_a_drop_of_exactly_max_drop_is_allowed(tiny):
    found = selection.strictest(Said(36, tiny.labels), [1.0], lambda value: Said(27, tiny.labels), tiny, 0.25)
    assert found == 1.0


def test_outliers_lie_above_mean_plus_u_deviations():
    values = torch.tensor([0.0, 1.0, 2.0, 3.0, 10.0])
    mean, deviation = 3.2, math.sqrt(sum((x - 3.2) ** 2 for x in (0, 1, 2, 3, 10)) / 4)
    u = (10 - mean) / deviation
    assert selection.outliers({"a": values}, u - 1e-3)["a"].tolist() == [False] * 4 + [True]
    assert not selection.outliers({"a": values}, u + 1e-3)["a"].any()
    assert not selection.outliers({"a": values}, float("inf"))["a"].any()


def test_each_layer_has_its_own_mean():
    found = selection.outliers({"a": torch.tensor([1.0, 1.0, 2.0]), "b": torch.tensor([100.0, 100.0, 200.0])}, 1.0)
    assert found["a"].tolist() == found["b"].tolist() == [False, False, True]


def test_without_outliers_takes_scale_and_shift(network, tiny):
    network[1].bias.data = torch.tensor([1.0, 2.0, 3.0, 4.0])
    values = {"1": torch.tensor([0.0, 0.0, 0.0, 9.0])}
    pruned = selection.without_outliers(network, values, OutlierConfig(u=1.0), None)
    assert pruned[1].weight.tolist() == [1, 1, 1, 0] and pruned[1].bias.tolist() == [1, 2, 3, 0]
    assert network[1].weight.tolist() == [1, 1, 1, 1] and network.training and not pruned.training


def test_u_is_chosen_on_the_clean_images(network, tiny, monkeypatch):
    """Any loss is allowed: the smallest candidate is taken.  None is: the largest that changes no answer."""
    values = {"1": torch.tensor([0.0, 1.0, 2.0, 3.0])}  # z = -1.16, -.39, .39, 1.16
    free = OutlierConfig(u=None, candidates=(2.0, 0.0, 1.0), max_drop=0.999)
    assert (selection.without_outliers(network, values, free, tiny)[1].weight == 0).tolist() == [
        False,
        False,
        True,
        True,
    ]
    monkeypatch.setattr(selection, "accuracy", lambda model, held: float(bool((model[1].weight != 0).all())))
    strict = OutlierConfig(u=None, candidates=(1.0, 2.0), max_drop=0.5)
    assert (selection.without_outliers(network, values, strict, tiny)[1].weight != 0).all()
    hopeless = OutlierConfig(u=None, candidates=(1.0,), max_drop=0.5)
    assert (selection.without_outliers(network, values, hopeless, tiny)[1].weight != 0).all()


def test_choosing_u_needs_clean_images(network):
    with pytest.raises(ValueError, match="u must be a number where no clean images"):
        selection.without_outliers(network, {"1": torch.zeros(4)}, OutlierConfig(u=None), None)


def test_narrow_networks_have_u_chosen(tiny):
    generator = torch.Generator().manual_seed(0)
    narrow, wide = (
        models.build(arch, tiny.images, 3, generator=generator) for arch in ("preact_resnet18:8", "preact_resnet18:32")
    )
    assert selection.recipe(narrow).u is None and selection.recipe(wide).u == 3.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": -1.0}, "u must not be negative, or None, got -1.0"),
        ({"max_drop": 1.0}, r"max_drop must be in \[0, 1\), got 1.0"),
        ({"candidates": ()}, "candidates must hold at least one"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        OutlierConfig(**change)
