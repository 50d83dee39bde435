"""The training loop: the whole split on the device, a batch is an index, augmentation is a function on a batch."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from bdlib.augment import crop_flip, pad_for_crops
from bdlib.data import Dataset, to_float
from bdlib.randomness import seeded

VERSION = 1  # part of every stored model's key: raise it when a change here or in models.py alters trained weights
SCHEDULES = ("cosine", "one_cycle", "constant")
Watch = Callable[[Iterable], Iterable]  # wraps the epochs, e.g. with a progress bar


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train.  Defaults are BackdoorBench's for CIFAR-10.  Raises ValueError if a value is out of range."""

    epochs: int = 100
    batch_size: int = 128  # images; never more than the split has
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    # "cosine": to 0; "one_cycle": up for a fifth of the steps, then down to 0, in straight lines; "constant"
    schedule: str = "cosine"
    drop_last: bool = True  # leave out the last batch of an epoch if it is not full

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}")


def fit(
    model: nn.Module, dataset: Dataset, config: TrainConfig, *, generator: torch.Generator, watch: Watch = iter
) -> nn.Module:
    """The model itself, trained on the split with cross-entropy and SGD, in eval().

    Crops and flips are those that the dataset allows.
    Raises ValueError for an empty split, FloatingPointError when the loss is no longer a number.
    """
    if not len(dataset):
        raise ValueError("training needs at least one image, got an empty split")
    device = next(model.parameters()).device
    padded = pad_for_crops(dataset.images.to(device), dataset.crop_padding)
    labels = dataset.labels.to(device)
    batch_size = min(config.batch_size, len(dataset))
    steps = len(dataset) // batch_size if config.drop_last else math.ceil(len(dataset) / batch_size)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_factor(config.schedule, config.epochs * steps))
    with seeded(generator, device):
        for epoch in watch(range(config.epochs)):
            model.train()
            total = torch.zeros((), device=device)
            order = torch.randperm(len(dataset), generator=generator).to(device)
            for picks in order[: steps * batch_size].split(batch_size):
                images = to_float(crop_flip(padded, picks, dataset.crop_padding, dataset.flip, generator=generator))
                loss = F.cross_entropy(model(images), labels[picks])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                scheduler.step()
                total += loss.detach()
            require_finite(total, f"epoch {epoch + 1} of {config.epochs} at lr {config.lr}")
    return model.eval()


def lr_factor(schedule: str, steps: int) -> Callable[[int], float]:
    """Step number -> factor on the learning rate."""
    if schedule == "cosine":
        return lambda step: 0.5 * (1 + math.cos(math.pi * min(step / steps, 1)))
    if schedule == "one_cycle":
        return lambda step: min((step + 1) / (0.2 * steps), max(steps - step, 0) / (0.8 * steps))
    return lambda step: 1.0


def require_finite(loss: torch.Tensor, where: str) -> None:
    """Raises FloatingPointError if the loss is NaN or infinite: such a model is no result."""
    if not torch.isfinite(loss):
        raise FloatingPointError(
            f"the loss became {loss.item()} in {where}: lower the learning rate or check the images"
        )
