"""The training loop: the whole split on the device, a batch is an index, augmentation is a function on a batch."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, repeat

import torch
import torch.nn.functional as F
from torch import nn

from bdlib import gpu
from bdlib.augment import crop_flip, pad_for_crops
from bdlib.data import Dataset, to_float
from bdlib.randomness import seeded

VERSION = 2  # part of every stored model's key: raise it when a change here or in models.py alters trained weights
SCHEDULES = ("cosine", "one_cycle", "constant")
Watch = Callable[[Iterable], Iterable]  # wraps the epochs, e.g. with a progress bar
# What an attacker who controls training does to a batch: images (B, C, H, W) and labels (B,) in, the same out.
Change = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
# What training makes small: model, images and labels of a batch -> a scalar.
Objective = Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]
MakeModel = Callable[
    [torch.Generator], nn.Module
]  # a fresh network on the device, its weights drawn from the generator


def cross_entropy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The usual objective of training, a scalar."""
    return F.cross_entropy(model(images), labels)


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


class Batches:
    """Shuffled batches of a split on a device, with the crops and flips that the dataset allows; to iterate once is one epoch.

    A batch is (images float32 (B, C, H, W) in [0, 1], labels (B,), positions in the split (B,)).  On a GPU `generator` only starts
    another one there, which everything random is drawn from.
    Raises ValueError for an empty split.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        device: torch.device,
        *,
        generator: torch.Generator,
        drop_last: bool = False,
    ):
        if not len(dataset):
            raise ValueError("training needs at least one image, got an empty split")
        self.padding, self.flip = dataset.crop_padding, dataset.flip
        self.padded = pad_for_crops(dataset.images.to(device), dataset.crop_padding)
        self.labels, self.generator = dataset.labels.to(device), gpu.generator_on(device, generator)
        self.batch_size = min(batch_size, len(dataset))
        self.steps = (math.floor if drop_last else math.ceil)(len(dataset) / self.batch_size)

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        source = self.generator
        order = torch.randperm(len(self.labels), generator=source, device=source.device).to(self.labels.device)
        order = order[: self.steps * self.batch_size]
        # On a GPU one launch cuts the crops of a whole epoch.
        at_once = len(order) if order.device.type == "cuda" else self.batch_size
        for part in order.split(at_once):
            crops = self.crops(part)
            for picks, images in zip(part.split(self.batch_size), crops.split(self.batch_size), strict=True):
                yield to_float(images), self.labels[picks], picks

    def forever(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """One epoch after the other, without end."""
        return chain.from_iterable(repeat(self))

    def crops(self, picks: torch.Tensor) -> torch.Tensor:
        """The images at these positions (B,), newly cropped and flipped, uint8 (B, C, H, W)."""
        return crop_flip(self.padded, picks, self.padding, self.flip, generator=self.generator)

    def view(self, picks: torch.Tensor) -> torch.Tensor:
        """The same as float32 in [0, 1]."""
        return to_float(self.crops(picks))


def fit(
    model: nn.Module,
    dataset: Dataset,
    config: TrainConfig,
    *,
    generator: torch.Generator,
    watch: Watch = iter,
    change: Change | None = None,
    objective: Objective = cross_entropy,
) -> nn.Module:
    """The model itself, trained on the split with SGD to make the objective small, in eval().

    Crops and flips are those that the dataset allows; `change` comes after them.  On a GPU a step computes in bfloat16 and is
    recorded, so an `objective` may not read a tensor's value in Python (`gpu.replayed`).
    Raises ValueError for an empty split, FloatingPointError when the loss is no longer a number.
    """
    device = next(model.parameters()).device
    batches = Batches(dataset, config.batch_size, device, generator=generator, drop_last=config.drop_last)
    optimizer = gpu.sgd(
        model.parameters(), device, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_factor(config.schedule, config.epochs * len(batches)))

    in_all = config.epochs * len(dataset)
    # An objective of one's own may look into the network, which a compiled one does not allow.
    forward = gpu.compiled(model, device, in_all, batches.batch_size) if objective is cross_entropy else model

    def descend(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with gpu.half(device):
            loss = objective(forward, images, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    step = gpu.replayed(descend, device)
    with seeded(generator, device), gpu.fastest_convolutions(device, in_all):
        for epoch in watch(range(config.epochs)):
            model.train()
            total = torch.zeros((), device=device)
            for images, labels, _ in batches:
                seen, wanted = change(images, labels) if change else (images, labels)
                total += step(seen, wanted)
                scheduler.step()
            require_finite(total, f"epoch {epoch + 1} of {config.epochs} at lr {config.lr}")
    return model.eval()


def lr_factor(schedule: str, steps: int) -> Callable[[int], float]:
    """Step number -> factor on the learning rate."""
    if schedule == "cosine":
        return lambda step: 0.5 * (1 + math.cos(math.pi * min(step / steps, 1)))
    if schedule == "one_cycle":
        return lambda step: min((step + 1) / (0.2 * steps), max(steps - step, 0) / (0.8 * steps))
    return lambda step: 1.0


@torch.no_grad()
def predict(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Classes (N,) that the model, in eval(), calls these uint8 images (N, C, H, W), on the images' device."""
    device = next(model.parameters()).device
    with evaluating(model):
        called = torch.cat([model(to_float(batch.to(device))).argmax(1) for batch in images.split(_at_once(device))])
    return called.to(images.device)


def accuracy(model: nn.Module, dataset: Dataset) -> float:
    """Share of the images that the model, in eval(), calls their class.  Raises ValueError if there are none."""
    if not len(dataset):
        raise ValueError("accuracy needs at least one image, got none")
    return (predict(model, dataset.images) == dataset.labels).double().mean().item()


@torch.no_grad()
def sample_losses(model: nn.Module, dataset: Dataset) -> torch.Tensor:
    """Cross-entropy (N,) of the model, in eval(), on each image, on the images' device."""
    device = next(model.parameters()).device
    parts = zip(dataset.images.split(_at_once(device)), dataset.labels.split(_at_once(device)), strict=True)
    with evaluating(model):
        losses = [
            F.cross_entropy(model(to_float(images.to(device))), labels.to(device), reduction="none")
            for images, labels in parts
        ]
    return torch.cat(losses).to(dataset.labels.device)


def _at_once(device: torch.device) -> int:
    """Images of one step of a prediction."""
    return 2500 if device.type == "cuda" else 500


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval() for a block; after it every module's mode is as before."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def require_finite(loss: torch.Tensor, where: str) -> None:
    """Raises FloatingPointError if the loss is NaN or infinite: such a model is no result."""
    if not torch.isfinite(loss):
        raise FloatingPointError(
            f"the loss became {loss.item()} in {where}: lower the learning rate or check the images"
        )
