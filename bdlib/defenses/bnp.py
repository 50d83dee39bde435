"""Batch-norm statistics-based pruning (BNP), Zheng et al., NeurIPS 2022 (Pre-activation Distributions Expose Backdoor Neurons).

Batch norm's running statistics were collected on the poisoned training set; clean images alone have others in backdoor channels:
 1  mean and variance of every channel's input to batch norm over the clean images
 2  the Kullback-Leibler divergence of that normal distribution from the one of the running statistics, channel by channel
 3  in each layer, remove the channels whose divergence is above mean + u std: scale and shift of the batch norm are 0
"""

import torch
from torch import nn

from bdlib.data import Dataset, hold_out
from bdlib.explain import norm_inputs
from bdlib.masks import norms, require_batch_norm
from bdlib.selection import OutlierConfig, Values, without_outliers

HELD_OUT = 0.2  # share of the clean images kept for choosing u, where it is chosen


def bnp(model: nn.Module, clean: Dataset, config: OutlierConfig, *, generator: torch.Generator) -> nn.Module:
    """A copy of the model without the channels whose statistics on clean images are outlying, in eval().

    clean: the defender's images, uint8; their labels serve to choose u alone.  The input model is not changed.
    Raises ValueError without clean images or batch norm.
    """
    require_batch_norm(model, "BNP")
    if not len(clean):
        raise ValueError("BNP needs at least one clean image, got none")
    measured, held = split(clean, config, generator=generator)
    return without_outliers(model, divergences(model, measured.floats()), config, held)


def split(clean: Dataset, config: OutlierConfig, *, generator: torch.Generator) -> tuple[Dataset, Dataset | None]:
    """The images to measure, and those kept for choosing u: none where it is given."""
    return (clean, None) if config.u is not None else hold_out(clean, HELD_OUT, generator=generator)


def divergences(model: nn.Module, images: torch.Tensor) -> Values:
    """KL divergence (K,) of each channel's statistics on the images from its running ones, by the norm's name (steps 1 and 2).

    DIFFERS: BackdoorBench's version overwrites the clean images' statistics by those of a poisoned batch before it compares, and its
    log(v_r / v) lacks the half, which the authors' code has.
    """
    found = {}
    for name, maps in norm_inputs(model, images):
        norm = norms(model)[name]
        variance, mean = torch.var_mean(maps, (0, 2, 3))
        variance, running = variance + norm.eps, norm.running_var + norm.eps
        # KL(N(m, v) | N(m_r, v_r)) = (log(v_r / v) + (v + (m - m_r)^2) / v_r - 1) / 2
        found[name] = ((running / variance).log() + (variance + (mean - norm.running_mean) ** 2) / running - 1) / 2
    return found
