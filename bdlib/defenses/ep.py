"""Entropy-based pruning (EP), Zheng et al., NeurIPS 2022 (Pre-activation Distributions Expose Backdoor Neurons).

On a poisoned training set a backdoor channel's pre-activations are a mixture of two distributions, whose entropy is low:
 1  the input to every batch norm over a batch of the training set, each channel standardized
 2  the entropy of its histogram, in bins of a tenth of a standard deviation
 3  in each layer, remove the channels whose entropy is below mean - u std: scale and shift of the batch norm are 0
The defender holds the training set here, poison and all, and does not know which of its images are poisoned.
"""

from dataclasses import dataclass

import torch
from torch import nn

from bdlib.data import Dataset
from bdlib.explain import norm_inputs
from bdlib.masks import require_batch_norm
from bdlib.selection import OutlierConfig, Values, without_outliers

POOLS = ("pixels", "images")


@dataclass(frozen=True, kw_only=True)
class EpConfig(OutlierConfig):
    """Settings of EP; sources: [c] BackdoorBench, [o] ours.  Raises ValueError if one is out of range."""

    batch_size: int = 256  # images of the training set, in one batch [c]
    bin_width: float = 0.1  # standard deviations [c]
    # What one value of the histogram is: "pixels": every pixel of a feature map [c]; "images": the largest of each image's map [o]
    pool: str = "pixels"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("batch_size", "bin_width"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.pool not in POOLS:
            raise ValueError(f"pool must be one of {', '.join(POOLS)}, got {self.pool!r}")


def ep(
    model: nn.Module, train_set: Dataset, config: EpConfig, *, generator: torch.Generator, held: Dataset | None = None
) -> nn.Module:
    """A copy of the model without the channels of outlying low entropy, in eval().

    train_set: the split that the model was trained on, uint8; held: clean images, to choose u on where `config.u` is None.
    The input model is not changed.  Raises ValueError without images or batch norm.
    """
    require_batch_norm(model, "EP")
    if not len(train_set):
        raise ValueError("EP needs at least one training image, got none")
    picks = torch.randperm(len(train_set), generator=generator)[: config.batch_size]
    low = {name: -value for name, value in entropies(model, train_set.subset(picks).floats(), config).items()}
    return without_outliers(model, low, config, held)


def entropies(model: nn.Module, images: torch.Tensor, config: EpConfig) -> Values:
    """Entropy (K,), in nats, of each channel's standardized pre-activations, by the norm's name (steps 1 and 2)."""
    found = {}
    for name, maps in norm_inputs(model, images):
        values = maps.transpose(0, 1).flatten(1) if config.pool == "pixels" else maps.amax((2, 3)).T  # (K, values)
        standard = (values - values.mean(1, keepdim=True)) / values.std(1, keepdim=True).clamp(min=1e-12)
        found[name] = torch.stack([histogram_entropy(each, config.bin_width) for each in standard])
    return found


def histogram_entropy(values: torch.Tensor, width: float) -> torch.Tensor:
    """-sum p log p over the bins of this width that hold any of the values (N,), a scalar."""
    share = torch.unique((values / width).floor(), return_counts=True)[1] / len(values)
    return -(share * share.log()).sum()
