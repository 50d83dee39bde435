"""Decoupling-based backdoor defense (DBD), Huang et al., ICLR 2022, arXiv 2202.03423.

Train on the poisoned set, but let no wrong label shape the features:
 1  learn the features without labels, by SimCLR
 2  freeze them, and train the linear layer alone on all labels with the symmetric cross-entropy, which forgives wrong ones
 3  the share of images with the lowest loss is credible: it keeps its labels, the others lose theirs
 4  train the whole network on both parts by MixMatch
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from bdlib import gpu
from bdlib.data import Dataset
from bdlib.defenses.mixmatch import MixmatchConfig, mixmatch
from bdlib.defenses.simclr import SimclrConfig, simclr
from bdlib.explain import embeddings, last_linear
from bdlib.randomness import seeded
from bdlib.train import MakeModel, Watch, require_finite


@dataclass(frozen=True, kw_only=True)
class DbdConfig:
    """Settings of DBD; sources: [b] BackdoorBench, [p] the paper.  Raises ValueError if one is out of range."""

    simclr: SimclrConfig = field(default_factory=SimclrConfig)
    warmup_epochs: int = 10  # of step 2 [b]
    warmup_lr: float = 0.002  # Adam [b]
    batch_size: int = 128  # images of step 2
    alpha: float = 0.1  # weight of the cross-entropy in step 2 [p]
    beta: float = 1.0  # weight of the reverse cross-entropy [p]
    credible: float = 0.5  # share of the images that keep their labels [b]
    mixmatch: MixmatchConfig = field(default_factory=MixmatchConfig)

    def __post_init__(self) -> None:
        for name in ("warmup_epochs", "warmup_lr", "batch_size"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if not 0 < self.credible < 1:
            raise ValueError(f"credible must be in (0, 1), got {self.credible}")


@dataclass(frozen=True)
class DbdResult:
    """The network in eval(), and the positions (M,) of the credible training images."""

    model: nn.Module
    credible: torch.Tensor


def dbd(
    make_model: MakeModel, train_set: Dataset, config: DbdConfig, *, generator: torch.Generator, watch: Watch = iter
) -> nn.Module:
    """A network trained on the poisoned split without its backdoor (arXiv:2202.03423), in eval().

    Raises ValueError for an empty split or a network without nn.Linear, FloatingPointError when a loss is no longer a number.
    """
    return run(make_model, train_set, config, generator=generator, watch=watch).model


def run(
    make_model: MakeModel, train_set: Dataset, config: DbdConfig, *, generator: torch.Generator, watch: Watch = iter
) -> DbdResult:
    """As `dbd`, with the credible images beside the network.

    DIFFERS: BackdoorBench measures the losses and splits the images anew before every epoch of MixMatch; ours does so once.
    """
    model = make_model(generator)
    train_split = train_set.to(next(model.parameters()).device)
    simclr(model, train_split, config.simclr, generator=generator, watch=watch)
    losses = warm_up(model, train_split, config, generator=generator, watch=watch)
    order = losses.argsort(stable=True)
    credible, others = order.tensor_split([max(1, round(config.credible * len(order)))])
    labeled, unlabeled = train_split.subset(credible), train_split.subset(others)
    mixmatch(model, labeled, unlabeled, config.mixmatch, generator=generator, watch=watch)
    return DbdResult(model.eval(), credible.cpu())


def recipe(count: int) -> DbdConfig:
    """BackdoorBench's setting; for a training split below 25,000 images fewer and shorter epochs."""
    if count >= 25_000:
        return DbdConfig()
    return DbdConfig(
        simclr=SimclrConfig(epochs=20, batch_size=256), mixmatch=MixmatchConfig(epochs=6, steps=100, batch_size=32)
    )


def warm_up(
    model: nn.Module, train_set: Dataset, config: DbdConfig, *, generator: torch.Generator, watch: Watch = iter
) -> torch.Tensor:
    """The symmetric cross-entropy (N,) of each image after the linear layer alone was trained, in place (step 2)."""
    # The features are frozen in eval(), so what the linear layer sees is computed once.
    points, linear = embeddings(model, train_set.floats()), last_linear(model)
    optimizer = gpu.adam(linear.parameters(), points.device, lr=config.warmup_lr)
    with seeded(generator, points.device):
        for epoch in watch(range(config.warmup_epochs)):
            total = torch.zeros((), device=points.device)
            for picks in torch.randperm(len(points), generator=generator).to(points.device).split(config.batch_size):
                loss = symmetric_loss(linear(points[picks]), train_set.labels[picks], config).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.detach()
            require_finite(total, f"epoch {epoch + 1} of DBD's warm-up")
    with torch.no_grad():
        return symmetric_loss(linear(points), train_set.labels, config)


def symmetric_loss(logits: torch.Tensor, labels: torch.Tensor, config: DbdConfig) -> torch.Tensor:
    """alpha CE + beta reverse CE (B,) of each image (Wang et al., ICCV 2019)."""
    truth = F.one_hot(labels, logits.shape[1]).to(logits).clamp(min=1e-4)
    # reverse CE: -sum of p log(truth), with log(0) taken as log(1e-4)
    reverse = -(logits.softmax(1).clamp(1e-7, 1) * truth.log()).sum(1)
    return config.alpha * F.cross_entropy(logits, labels, reduction="none") + config.beta * reverse
