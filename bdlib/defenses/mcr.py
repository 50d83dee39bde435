"""Mode connectivity repair (MCR), Zhao et al., ICLR 2020, arXiv 2005.00060.

On a path of low loss between two backdoored networks, trained on clean images alone, there are networks without the backdoor:
 1  the other end: another network of the same attacker (the paper), or a copy of the model, fine-tuned on the clean images [b]
 2  the path: a Bezier curve w(t) = (1 - t)^2 w_0 + 2 t (1 - t) w_1 + t^2 w_2 with a control point w_1, at first halfway
 3  train w_1: for each batch draw t in [0, 1], step w_1 downhill on the loss of w(t)
 4  the result is w(t) at one t, its batch-norm statistics collected anew on the clean images
"""

import copy
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.optim.swa_utils import update_bn

from bdlib.data import Dataset
from bdlib.defenses.fine_tuning import CONFIG, fine_tuning
from bdlib.randomness import seeded
from bdlib.train import Batches, TrainConfig, Watch, lr_factor, require_finite

Weights = dict[str, torch.Tensor]  # parameter name -> value


@dataclass(frozen=True, kw_only=True)
class McrConfig:
    """Settings of MCR; sources: [b] BackdoorBench.  Raises ValueError if one is out of range."""

    t: float = 0.1  # where on the path the result lies: 0 is the model, 1 the other end [b]
    end: TrainConfig = CONFIG  # of step 1, where the other end is the model's copy [b]
    path: TrainConfig = field(default_factory=lambda: replace(CONFIG, batch_size=128, lr=3e-5))  # of step 3 [b]

    def __post_init__(self) -> None:
        if not 0 <= self.t <= 1:
            raise ValueError(f"t must be in [0, 1], got {self.t}")


def mcr(
    model: nn.Module,
    clean: Dataset,
    config: McrConfig,
    *,
    generator: torch.Generator,
    watch: Watch = iter,
    other: nn.Module | None = None,
) -> nn.Module:
    """A network from the path between the model and another one (arXiv:2005.00060), in eval().

    clean: the defender's images, uint8, with their labels.  other: the second backdoored network, of the model's architecture; None
    takes the model's fine-tuned copy.  Neither input is changed.
    Raises ValueError without clean images, FloatingPointError when the loss is no longer a number.
    """
    if other is None:
        other = fine_tuning(model, clean, config.end, generator=generator, watch=watch)
    ends = weights_of(model), weights_of(other)
    middle = train_middle(other, ends, clean, config, generator=generator, watch=watch)
    result = copy.deepcopy(model)
    with torch.no_grad():
        for name, weight in on_path(ends, middle, config.t).items():
            result.get_parameter(name).copy_(weight)
    images = clean.floats().to(next(result.parameters()).device)
    with seeded(generator, images.device):  # for dropout
        update_bn(images.split(config.path.batch_size), result)
    return result.eval()


def recipe(count: int) -> McrConfig:
    """BackdoorBench's lengths at a rate at which the control point moves, and the point of the path farthest from both ends.

    DIFFERS: at its rate of 3e-5 the control point stays where it started, and at its t = .1 the network is nearly the backdoored one.
    Its batch for the path is 128 at any budget, ours a tenth of the images, 32 to 128.
    """
    batch_size = min(128, max(32, -(-count // 10)))
    return McrConfig(t=0.5, path=replace(CONFIG, batch_size=batch_size))


def train_middle(
    model: nn.Module,
    ends: tuple[Weights, Weights],
    clean: Dataset,
    config: McrConfig,
    *,
    generator: torch.Generator,
    watch: Watch = iter,
) -> Weights:
    """The control point w_1 by parameter name, detached (steps 2 and 3)."""
    carrier = copy.deepcopy(model)  # holds the batch-norm statistics, which train() does not read
    device = next(carrier.parameters()).device
    middle = {name: ((start + ends[1][name]) / 2).requires_grad_(True) for name, start in ends[0].items()}
    batches = Batches(clean, config.path.batch_size, device, generator=generator)
    optimizer = torch.optim.SGD(
        middle.values(), lr=config.path.lr, momentum=config.path.momentum, weight_decay=config.path.weight_decay
    )
    factor = lr_factor(config.path.schedule, config.path.epochs * len(batches))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    with seeded(generator, device):
        for epoch in watch(range(config.path.epochs)):
            carrier.train()
            total = torch.zeros((), device=device)
            for images, labels, _ in batches:
                t = torch.rand((), generator=generator).item()
                loss = F.cross_entropy(functional_call(carrier, on_path(ends, middle, t), (images,)), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                scheduler.step()
                total += loss.detach()
            require_finite(total, f"epoch {epoch + 1} of MCR's path")
    return {name: weight.detach() for name, weight in middle.items()}


def on_path(ends: tuple[Weights, Weights], middle: Weights, t: float) -> Weights:
    """w(t) by parameter name."""
    # w(t) = (1 - t)^2 w_0 + 2 t (1 - t) w_1 + t^2 w_2
    start, end = ends
    return {
        name: (1 - t) ** 2 * start[name] + 2 * t * (1 - t) * weight + t**2 * end[name]
        for name, weight in middle.items()
    }


def weights_of(model: nn.Module) -> Weights:
    """Copies of the model's parameters by name, detached."""
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}
