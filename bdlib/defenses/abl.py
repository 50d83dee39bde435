"""Anti-backdoor learning (ABL), Li et al., NeurIPS 2021, arXiv 2110.11571.

Train on the poisoned set itself: poisoned images are learned first, so they can be told by their low loss, and unlearned:
 1  train for a while with a loss that keeps clean images from being learned too: local gradient ascent, sign(L - gamma) L, or
    flooding, |L - gamma| + gamma
 2  isolate the share of images with the lowest loss
 3  train on all other images with the plain loss
 4  unlearn: gradient ascent on the isolated images
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from bdlib.data import Dataset
from bdlib.train import SCHEDULES, MakeModel, TrainConfig, Watch, cross_entropy, fit, sample_losses

LOSSES = ("flooding", "ascent")


@dataclass(frozen=True, kw_only=True)
class AblConfig:
    """Settings of ABL; sources: [b] BackdoorBench's settings file.  Raises ValueError if one is out of range.

    DIFFERS: BackdoorBench's code overrides that file: rates of .01 in steps 1 and 3 (.001 after 40 epochs) and 1e-4 in step 4, weight
    decay 1e-4, Nesterov's momentum, batches of 256, and no augmentation in step 1.
    """

    batch_size: int = 128  # images; never more than there are
    isolation_epochs: int = 20  # of step 1 [b]
    isolation_loss: str = "flooding"  # "flooding" [b]; "ascent" = local gradient ascent
    gamma: float = 0.5  # loss that step 1 holds [b]
    share: float = 0.01  # of the images isolated [b]
    epochs: int = 60  # of step 3 [b]
    lr: float = 0.1  # of steps 1 and 3 [b]
    schedule: str = "cosine"  # of step 3
    unlearning_epochs: int = 20  # of step 4 [b]
    unlearning_lr: float = 5e-4  # of step 4 [b]
    momentum: float = 0.9
    weight_decay: float = 5e-4

    def __post_init__(self) -> None:
        for name in ("batch_size", "isolation_epochs", "epochs", "lr", "unlearning_epochs", "unlearning_lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.gamma < 0:
            raise ValueError(f"gamma must not be negative, got {self.gamma}")
        if not 0 < self.share < 1:
            raise ValueError(f"share must be in (0, 1), got {self.share}")
        for name, allowed in (("isolation_loss", LOSSES), ("schedule", SCHEDULES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class AblResult:
    """The network in eval(), and the positions (M,) of the training images that were isolated."""

    model: nn.Module
    isolated: torch.Tensor


def abl(
    make_model: MakeModel, train_set: Dataset, config: AblConfig, *, generator: torch.Generator, watch: Watch = iter
) -> nn.Module:
    """A network trained on the poisoned split without its backdoor (arXiv:2110.11571), in eval().

    Raises ValueError for an empty split, FloatingPointError when a loss is no longer a number.
    """
    return run(make_model, train_set, config, generator=generator, watch=watch).model


def run(
    make_model: MakeModel, train_set: Dataset, config: AblConfig, *, generator: torch.Generator, watch: Watch = iter
) -> AblResult:
    """As `abl`, with the isolated images beside the network."""
    model = make_model(generator)
    train_split = train_set.to(next(model.parameters()).device)
    hold_loss(model, train_split, config, generator=generator, watch=watch)
    isolated = isolate(model, train_split, config.share)
    others = torch.ones(len(train_split), dtype=torch.bool, device=isolated.device)
    others[isolated] = False
    plain = training_of(config, config.epochs, config.lr, config.schedule)
    fit(model, train_split.subset(torch.nonzero(others).flatten()), plain, generator=generator, watch=watch)
    unlearn(model, train_split.subset(isolated), config, generator=generator, watch=watch)
    return AblResult(model.eval(), isolated.cpu())


def recipe(count: int) -> AblConfig:
    """BackdoorBench's setting; for a training split below 25,000 images fewer and smaller steps.

    DIFFERS: at a rate of .1 networks collapse on a few thousand images (see CBD), and their easy task needs no 80 epochs.  The
    hundredth of them that is isolated fits into one batch, so 20 epochs of unlearning are 20 steps, not the 80 of 50,000 images
    (BackdoorBench: 40, as its batches are larger): after 80 the network knew nothing any more.
    """
    if count >= 25_000:
        return AblConfig()
    return AblConfig(batch_size=64, isolation_epochs=5, epochs=10, lr=0.03, schedule="one_cycle")


def hold_loss(
    model: nn.Module, train_set: Dataset, config: AblConfig, *, generator: torch.Generator, watch: Watch = iter
) -> None:
    """Train the model, in place, with a loss that does not fall below gamma (step 1)."""

    def held(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return held_loss(model(images), labels, config)

    training = training_of(config, config.isolation_epochs, config.lr)
    fit(model, train_set, training, generator=generator, watch=watch, objective=held)


def held_loss(logits: torch.Tensor, labels: torch.Tensor, config: AblConfig) -> torch.Tensor:
    """The loss of step 1 on a batch, a scalar."""
    loss = F.cross_entropy(logits, labels)
    if config.isolation_loss == "flooding":
        return (loss - config.gamma).abs() + config.gamma  # |L - gamma| + gamma
    return torch.sign(loss.detach() - config.gamma) * loss  # sign(L - gamma) L


def isolate(model: nn.Module, train_set: Dataset, share: float) -> torch.Tensor:
    """Positions (M,) of the share of images with the lowest loss, one at least (step 2)."""
    count = max(1, round(share * len(train_set)))
    return sample_losses(model, train_set).argsort(stable=True)[:count]


def unlearn(
    model: nn.Module, isolated: Dataset, config: AblConfig, *, generator: torch.Generator, watch: Watch = iter
) -> None:
    """Ascend the loss on the isolated images, in place (step 4)."""
    training = training_of(config, config.unlearning_epochs, config.unlearning_lr)
    fit(model, isolated, training, generator=generator, watch=watch, objective=lambda *batch: -cross_entropy(*batch))


def training_of(config: AblConfig, epochs: int, lr: float, schedule: str = "constant") -> TrainConfig:
    """How one of the steps trains, on every image."""
    return TrainConfig(
        epochs=epochs, batch_size=config.batch_size, lr=lr, momentum=config.momentum, weight_decay=config.weight_decay,
        schedule=schedule, drop_last=False,
    )  # fmt: skip
