"""Reconstructive neuron pruning (RNP), Li et al., ICML 2023, arXiv 2305.14876.

Make the network forget its task on the clean images, let it learn the task again with one switch a channel, and see which
channels were not needed for that:
 1  unlearn: ascend the loss on the clean images with all weights, until accuracy on them is at most `accuracy_floor`
 2  recover: on the unlearned network, descend the loss with a mask m in [0, 1] on every batch-norm scale alone
 3  prune: in the ORIGINAL network set the scale of every channel with m <= threshold to 0; no fine-tuning
The clean task is forgotten in step 1, the backdoor is not: what only the backdoor needs stays off in step 2.

The defaults are the official code's (bboylyg/RNP, eeae192).  It leaves the threshold to the reader, who sees the attack's success
for each; ours is chosen by clean accuracy alone (`choose_threshold`).
"""

import copy
import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.optim.swa_utils import update_bn

from bdlib.data import Dataset, hold_out
from bdlib.masks import Masks, convolutions, prune, require_batch_norm, scales
from bdlib.randomness import seeded
from bdlib.selection import NoResult, strictest
from bdlib.train import Batches, Watch, evaluating, predict, require_finite

LEVELS = ("neuron", "filter")


@dataclass(frozen=True, kw_only=True)
class RnpConfig:
    """Settings of RNP; sources: [c] official code, [o] ours.  Raises ValueError if one is out of range."""

    batch_size: int = 128  # images [c]; never more than there are
    unlearn_level: str = "neuron"  # "neuron": ascend with all weights [c]; "filter": with the batch-norm scales alone
    unlearn_lr: float = 0.01  # [c]; divided by 10 after each of `milestones`
    milestones: tuple[int, ...] = (10, 20)  # epochs [c]
    max_unlearn_epochs: int = 21  # [c]
    # Largest norm of a step's gradient, in both steps; None = no limit [c].  The code means to clip at 20, but does so where it has no
    # effect: after the gradients are zeroed and before they are computed.
    clip_gradient: float | None = None
    accuracy_floor: float = 0.20  # accuracy on the clean images at which unlearning ends [c]
    momentum: float = 0.9  # of both steps [c]
    weight_decay: float = 5e-4  # of unlearning [c]
    recover_level: str = "filter"  # "filter": masks on batch-norm scales [c]; "neuron": on every convolution weight
    recover_epochs: int = 20  # [c]
    recover_lr: float = 0.2  # [c]
    loss_weight: float = 0.2  # factor on the recovery's loss [c]
    # Share of the clean images kept for choosing the threshold [o].  DIFFERS: the official code unlearns and recovers with all.
    held_out: float = 0.2
    max_drop: float = 0.05  # clean accuracy that the chosen threshold may cost, as a fraction [o]
    thresholds: tuple[float, ...] = tuple(step / 20 for step in range(20))  # 0 to .9 [c] and .95, in steps of .05

    def __post_init__(self) -> None:
        for name in ("batch_size", "unlearn_lr", "max_unlearn_epochs", "recover_epochs", "recover_lr", "loss_weight"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.clip_gradient is not None and not self.clip_gradient > 0:
            raise ValueError(f"clip_gradient must be above 0 or None, got {self.clip_gradient}")
        for name in ("accuracy_floor", "held_out", "max_drop"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        for name in ("unlearn_level", "recover_level"):
            if getattr(self, name) not in LEVELS:
                raise ValueError(f"{name} must be one of {', '.join(LEVELS)}, got {getattr(self, name)!r}")
        if not self.thresholds or not all(0 <= value <= 1 for value in self.thresholds):
            raise ValueError(f"thresholds must be values in [0, 1], at least one, got {self.thresholds}")


@dataclass(frozen=True)
class RnpResult:
    """What RNP found: the pruned and the unlearned model in eval(), the masks by parameter name, the threshold."""

    model: nn.Module
    unlearned: nn.Module
    masks: Masks
    threshold: float


def rnp(
    model: nn.Module, clean: Dataset, config: RnpConfig, *, generator: torch.Generator, watch: Watch = iter
) -> nn.Module:
    """A copy of the model, pruned where the recovered masks stay low (arXiv:2305.14876), in eval().

    clean: the defender's images, uint8, with their labels.  The input model is not changed.
    Raises ValueError without clean images or batch norm, NoResult if unlearning never reaches `accuracy_floor`,
    FloatingPointError when the loss is no longer a number.
    """
    return run(model, clean, config, generator=generator, watch=watch).model


def run(
    model: nn.Module, clean: Dataset, config: RnpConfig, *, generator: torch.Generator, watch: Watch = iter
) -> RnpResult:
    """As `rnp`, with the unlearned model, the masks and the chosen threshold beside the result."""
    fitted, held = hold_out(clean, config.held_out, generator=generator)
    unlearned = unlearn(model, fitted, config, generator=generator, watch=watch)
    masks = recover(unlearned, fitted, config, generator=generator, watch=watch)
    threshold = choose_threshold(model, masks, held, config)
    return RnpResult(prune(model, masks, threshold), unlearned, masks, threshold)


def recipe(model: nn.Module, count: int) -> RnpConfig:
    """The official setting; with fewer than 500 clean images, or 1,000 channels, a smaller batch and a far slower recovery.

    DIFFERS: the official 500 images in batches of 128 make four steps an epoch, which is kept.  The recovery's rate is lower because
    every channel of a narrow network does some of the task, and on few images of an easy dataset the unlearned loss is huge: at the
    official rate many masks are 0 after the first steps, and which of them the clean task needs cannot be told any more.  (On CIFAR-10
    with 424 channels 60 were off; pruning them took the backdoor, and 27 points of accuracy.)  At this rate they part in order.
    """
    if count >= 500 and sum(map(len, scales(model).values())) >= 1000:
        return RnpConfig()
    config = RnpConfig(recover_lr=0.003)
    return replace(config, batch_size=max(8, math.ceil(count * (1 - config.held_out) / 4)))


def variants(config: RnpConfig) -> dict[str, RnpConfig]:
    """Other levels for the two steps, which the paper argues against: both the same, or the other way round.

    Filters unlearn at ten times the rate: at that of all weights together their accuracy never fell to the floor.
    """
    filters = replace(config, unlearn_level="filter", unlearn_lr=10 * config.unlearn_lr)
    return {
        "filters forget, filters recover": filters,
        "neurons forget, neurons recover": replace(config, recover_level="neuron"),
        "filters forget, neurons recover": replace(filters, recover_level="neuron"),
    }


def unlearn(
    model: nn.Module, clean: Dataset, config: RnpConfig, *, generator: torch.Generator, watch: Watch = iter
) -> nn.Module:
    """A copy of the model that ascended the loss until its accuracy on the clean images fell to the floor, in eval() (step 1).

    DIFFERS: the code reads the accuracy once an epoch, over its augmented batches; ours is read after every step, on all clean
    images, with the batch statistics of those very images, and the running statistics are renewed at the end.  On an easy dataset
    the loss grows tenfold within an epoch, and running statistics lag ten steps behind: a network that went too far would be
    handed on.
    Raises NoResult with the accuracy reached if `max_unlearn_epochs` do not suffice.
    """
    require_batch_norm(model, "RNP")
    unlearned = copy.deepcopy(model).requires_grad_(True)
    device = next(unlearned.parameters()).device
    batches = Batches(clean, config.batch_size, device, generator=generator)
    weights = list(unlearned.parameters()) if config.unlearn_level == "neuron" else list(scales(unlearned).values())
    optimizer = torch.optim.SGD(
        weights, lr=config.unlearn_lr, momentum=config.momentum, weight_decay=config.weight_decay
    )
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, list(config.milestones))
    images_all, labels_all = clean.floats().to(device), clean.labels.to(device)
    reached = 1.0
    with seeded(generator, device):
        for epoch in watch(range(config.max_unlearn_epochs)):
            for images, labels, _ in batches:
                loss = unlearn_step(unlearned, optimizer, images, labels, config)
                reached = accuracy_now(unlearned, images_all, labels_all)
                if reached <= config.accuracy_floor:
                    require_finite(loss, f"epoch {epoch + 1} of RNP's unlearning")
                    update_bn(images_all.split(config.batch_size), unlearned)
                    return unlearned.eval()
            scheduler.step()
            require_finite(loss, f"epoch {epoch + 1} of RNP's unlearning")
    raise NoResult(
        f"unlearning reached a clean accuracy of {reached:.3f} in {config.max_unlearn_epochs} epochs of {len(batches)} steps, "
        f"not the floor of {config.accuracy_floor}: raise max_unlearn_epochs or unlearn_lr, lower batch_size (more steps), "
        "or raise accuracy_floor"
    )


def unlearn_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: torch.Tensor, labels: torch.Tensor, config: RnpConfig
) -> torch.Tensor:
    """One step up the loss on a batch, in train(), in place; the loss before it, detached."""
    model.train()
    loss = F.cross_entropy(model(images), labels)
    optimizer.zero_grad()
    (-loss).backward()  # max over theta of L(f(x; theta), y)
    clip(optimizer, config)
    optimizer.step()
    return loss.detach()


@torch.no_grad()
def accuracy_now(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of the images called their class with the batch statistics of these images; running statistics are left as they were."""
    spare = {name: value.clone() for name, value in model.named_buffers()}
    with evaluating(model):
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.train()
        return (functional_call(model, spare, (images,)).argmax(1) == labels).double().mean().item()


def clip(optimizer: torch.optim.Optimizer, config: RnpConfig) -> None:
    """Shrink the gradients of what the optimizer steps to a common norm of at most `clip_gradient`, in place."""
    if config.clip_gradient is not None:
        nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], config.clip_gradient)


def recover(
    unlearned: nn.Module, clean: Dataset, config: RnpConfig, *, generator: torch.Generator, watch: Watch = iter
) -> Masks:
    """Masks in [0, 1] under which the unlearned model does the clean task again (step 2), detached."""
    frozen = copy.deepcopy(unlearned).requires_grad_(False)
    device = next(frozen.parameters()).device
    batches = Batches(clean, config.batch_size, device, generator=generator)
    masked = scales(frozen) if config.recover_level == "filter" else convolutions(frozen)
    masks = {name: torch.ones_like(weight).requires_grad_(True) for name, weight in masked.items()}
    optimizer = torch.optim.SGD(masks.values(), lr=config.recover_lr, momentum=config.momentum)
    with seeded(generator, device):
        for epoch in watch(range(config.recover_epochs)):
            frozen.train()  # batch statistics, as in the code; the copy's running ones move, and are thrown away with it
            total = torch.zeros((), device=device)
            for images, labels, _ in batches:
                weights = {name: weight * masks[name] for name, weight in masked.items()}
                # min over m in [0, 1] of L(f(x; m * theta), y)
                loss = config.loss_weight * F.cross_entropy(functional_call(frozen, weights, (images,)), labels)
                optimizer.zero_grad()
                loss.backward()
                clip(optimizer, config)
                optimizer.step()
                with torch.no_grad():
                    for mask in masks.values():
                        mask.clamp_(0, 1)
                total += loss.detach()
            require_finite(total, f"epoch {epoch + 1} of RNP's recovery")
    return {name: mask.detach() for name, mask in masks.items()}


def choose_threshold(model: nn.Module, masks: Masks, held: Dataset, config: RnpConfig) -> float:
    """The largest threshold up to which the pruned model loses at most `max_drop` of accuracy on the held-out clean images.

    DIFFERS: the code prints test accuracy and attack success for every threshold and leaves the choice to the reader; a defender
    knows no attack success.
    """
    chosen = strictest(
        model, sorted(config.thresholds), lambda threshold: prune(model, masks, threshold), held, config.max_drop
    )
    if chosen is None:
        raise NoResult(
            f"even the smallest threshold, {min(config.thresholds)}, costs more than {config.max_drop} of clean accuracy: raise "
            "max_drop, or unlearn more gently (larger batch_size, lower unlearn_lr)"
        )
    return chosen


def suspected_label(unlearned: nn.Module, clean: Dataset) -> tuple[int, torch.Tensor]:
    """The class that the unlearned model calls most clean images, and the share (C,) of every class."""
    shares = torch.bincount(predict(unlearned, clean.images), minlength=len(clean.classes)) / len(clean)
    return int(shares.argmax()), shares


@torch.no_grad()
def sample_scores(model: nn.Module, unlearned: nn.Module, dataset: Dataset) -> torch.Tensor:
    """Scores (N,), high for triggered images: the unlearned model's log-probability of what the model calls each image."""
    images = dataset.floats().to(next(model.parameters()).device)
    with evaluating(model), evaluating(unlearned):
        scores = [-F.cross_entropy(unlearned(x), model(x).argmax(1), reduction="none") for x in images.split(500)]
    return torch.cat(scores)
