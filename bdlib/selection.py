"""How much to prune: chosen by accuracy on held-out clean images, never by attack success, which a defender cannot measure.

Holds also the rule that CLP, BNP and EP share: a channel goes if its value is an outlier among those of its layer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from bdlib.data import Dataset
from bdlib.masks import norms, without_channels
from bdlib.train import accuracy

Values = dict[str, torch.Tensor]  # name of an nn.BatchNorm2d -> a value (K,) for each of its channels


class NoResult(RuntimeError):
    """A method cannot reach its aim on this network with these images; the message says what to change."""


def strictest(
    model: nn.Module,
    settings: Sequence[float],
    build: Callable[[float], nn.Module],
    held: Dataset,
    max_drop: float,
) -> float | None:
    """The last of the settings, from mild to strict, up to which every built model loses at most `max_drop` of the model's accuracy.

    held: clean images that nothing was fitted on; max_drop: a fraction.  None if the first one already costs more.
    """
    least = accuracy(model, held) - max_drop
    chosen = None
    for setting in settings:
        if accuracy(build(setting), held) < least - 1e-9:
            break
        chosen = setting
    return chosen


@dataclass(frozen=True, kw_only=True)
class OutlierConfig:
    """Settings of the outlier rule; sources: [p] the papers of CLP, BNP, EP; [o] ours.  Raises ValueError if one is out of range."""

    # A channel goes above mean + u standard deviations [p]; None = u is chosen by clean accuracy [o].
    u: float | None = 3.0
    candidates: tuple[float, ...] = tuple(step / 4 for step in range(16, -1, -1))  # for u = None: 4 down to 0 [o]
    max_drop: float = 0.05  # for u = None: clean accuracy that pruning may cost, as a fraction [o]

    def __post_init__(self) -> None:
        if self.u is not None and not self.u >= 0:
            raise ValueError(f"u must not be negative, or None, got {self.u}")
        if not 0 <= self.max_drop < 1:
            raise ValueError(f"max_drop must be in [0, 1), got {self.max_drop}")
        if not self.candidates:
            raise ValueError("candidates must hold at least one value of u, got none")


def recipe(model: nn.Module) -> OutlierConfig:
    """u = 3, as the papers have it; for a network with narrow layers u is chosen by accuracy on clean images.

    DIFFERS: among n values none lies more than (n - 1) / sqrt(n) standard deviations above their mean: 2.5 for n = 8.  In layers of
    fewer than 32 channels u = 3 takes a channel only if nearly all others are alike.
    """
    narrow = any(layer.num_features < 32 for layer in norms(model).values())
    return OutlierConfig(u=None if narrow else 3.0)


def without_outliers(model: nn.Module, values: Values, config: OutlierConfig, held: Dataset | None) -> nn.Module:
    """A copy of the model, in eval(), without the channels whose value is an outlier in its layer.

    held: clean images to choose u on, needed for `config.u` None alone.  Where even the mildest candidate costs too much, nothing
    goes.
    """
    if config.u is not None:
        return without_channels(model, outliers(values, config.u))
    if held is None or not len(held):
        raise ValueError("u must be a number where no clean images are at hand to choose it on, got None")
    mild_to_strict = sorted(config.candidates, reverse=True)
    u = strictest(model, mild_to_strict, lambda u: without_channels(model, outliers(values, u)), held, config.max_drop)
    return without_channels(model, outliers(values, float("inf") if u is None else u))


def outliers(values: Values, u: float) -> dict[str, torch.Tensor]:
    """For each layer bool (K,): value > mean + u std, over the layer's channels."""
    return {name: value > value.mean() + u * value.std() for name, value in values.items()}
