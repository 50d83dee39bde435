"""Fine-pruning (FP), Liu et al., RAID 2018, arXiv 1805.12185.

Channels that clean images leave at rest may serve the backdoor alone:
 1  the mean activation of each channel of the last feature map over the clean images
 2  silence channels from the least active on, while accuracy on held-out clean images falls by no more than `max_drop` of it
 3  fine-tune what is left on all clean images; silenced channels stay silent
BackdoorBench's version zeroes columns of the last linear layer instead, 1% at a time, chosen by accuracy on the test images.
"""

from dataclasses import dataclass

import torch
from torch import nn

from bdlib.data import Dataset, hold_out
from bdlib.defenses.fine_tuning import CONFIG, fine_tuning
from bdlib.defenses.ft_sam import FtSamConfig, ft_sam
from bdlib.defenses.linf_pruning import channel_scores, choose_count, silence
from bdlib.explain import last_feature_map
from bdlib.train import TrainConfig, Watch, accuracy


@dataclass(frozen=True, kw_only=True)
class FinePruningConfig:
    """Settings of fine-pruning; sources: [b] BackdoorBench, [o] ours.  Raises ValueError if one is out of range."""

    max_drop: float = 0.1  # share of its clean accuracy that the model may lose by step 2 [b]
    held_out: float = 0.2  # share of the clean images kept for measuring that [o]
    tuning: TrainConfig | FtSamConfig = (
        CONFIG  # of step 3; an FtSamConfig makes it FP + FT-SAM (arXiv:2304.11823, Table 4)
    )

    def __post_init__(self) -> None:
        for name in ("max_drop", "held_out"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")


def fine_pruning(
    model: nn.Module, clean: Dataset, config: FinePruningConfig, *, generator: torch.Generator, watch: Watch = iter
) -> nn.Module:
    """A copy of the model without its channels at rest, fine-tuned (arXiv:1805.12185), in eval().

    clean: the defender's images, uint8, with their labels.  The input model is not changed.
    Raises ValueError without clean images or convolutions, FloatingPointError when the loss is no longer a number.
    """
    pruned = prune_resting(model, clean, config, generator=generator)
    return tune(pruned, clean, config.tuning, generator=generator, watch=watch)


def prune_resting(
    model: nn.Module, clean: Dataset, config: FinePruningConfig, *, generator: torch.Generator
) -> nn.Module:
    """A copy of the model in which the least active channels of the last feature map are 0, in eval() (steps 1 and 2)."""
    if not len(clean):
        raise ValueError("fine-pruning needs at least one clean image, got none")
    measured, held = hold_out(clean, config.held_out, generator=generator)
    images = measured.floats().to(next(model.parameters()).device)
    name = last_feature_map(model, images)
    rest = channel_scores(model, images, lambda x: x, name, "activation", generator=generator)
    order = rest.argsort(descending=True, stable=True)
    return silence(model, name, order, choose_count(model, name, order, held, config.max_drop * accuracy(model, held)))


def tune(
    model: nn.Module,
    clean: Dataset,
    config: TrainConfig | FtSamConfig,
    *,
    generator: torch.Generator,
    watch: Watch = iter,
) -> nn.Module:
    """A copy of the model, fine-tuned as the kind of config says, in eval() (step 3)."""
    method = ft_sam if isinstance(config, FtSamConfig) else fine_tuning
    return method(model, clean, config, generator=generator, watch=watch)
