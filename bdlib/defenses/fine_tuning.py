"""Fine-tuning (FT): the baseline of every paper.  Train all weights on the clean images for a while.

Settings: BackdoorBench's, 100 epochs, batch 256, SGD lr .01, momentum .9, weight decay 5e-4, cosine to 0 over the epochs.
DIFFERS: the rate falls after every step, in BackdoorBench once an epoch.
"""

import copy

import torch
from torch import nn

from bdlib.data import Dataset
from bdlib.train import TrainConfig, Watch, fit

CONFIG = TrainConfig(
    epochs=100, batch_size=256, lr=0.01, momentum=0.9, weight_decay=5e-4, schedule="cosine", drop_last=False
)


def fine_tuning(
    model: nn.Module, clean: Dataset, config: TrainConfig = CONFIG, *, generator: torch.Generator, watch: Watch = iter
) -> nn.Module:
    """A copy of the model, fine-tuned on the clean images; batch norm trains too.  The batch is never above the budget.

    Raises ValueError if there are no clean images, FloatingPointError when the loss is no longer a number.
    """
    tuned = copy.deepcopy(model)
    for parameter in tuned.parameters():
        parameter.requires_grad_(True)
    return fit(tuned, clean, config, generator=generator, watch=watch)
