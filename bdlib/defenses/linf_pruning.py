"""l-infinity neuron pruning, Cheng et al., arXiv 2002.12162.

A trigger makes a few feature maps of the last layer peak; their l-infinity norm shows it better than l1 or l2.  OUR READING: only the
abstract and summaries of the paper are known, and no official code; what they do not say is our choice, marked [o].
 1  synthesize a trigger on the clean images, for every class; the smallest that works betrays the target label      [o]
 2  score each channel k of the last feature map: mean over clean images of |A_k(x with trigger)|_inf - |A_k(x)|_inf       [o]
 3  silence channels in order of falling score, until accuracy on held-out clean images has fallen by `max_drop`           [o]
A silenced channel is a feature map multiplied by 0: in a residual network a weight of 0 would leave the shortcut's share.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from bdlib.data import Dataset, hold_out
from bdlib.explain import (
    NORMS,
    SynthesisConfig,
    SyntheticTrigger,
    feature_maps,
    last_feature_map,
    layer,
    map_norms,
    synthesize_trigger,
)
from bdlib.train import Watch, accuracy, evaluating

ORDERS = (*NORMS, "activation", "random")


@dataclass(frozen=True, kw_only=True)
class LinfConfig:
    """Settings of the pruning, all ours.  Raises ValueError if one is out of range."""

    layer: str | None = None  # whose output is pruned; None = the last feature map
    # "linf", "l1", "l2": by the bias of this norm under the trigger; "activation": Fine-Pruning's, the least active first; "random"
    order: str = "linf"
    target_label: int | None = None  # class to synthesize a trigger for; None = every class, and the smallest is taken
    held_out: float = 0.5  # share of the clean images kept for choosing how many channels go
    # Clean accuracy that pruning may cost, as a fraction.  A hundred held-out images tell it to about .02: with .03 here new images
    # stay within .05 as a mean; of the stored networks single ones lose up to .06, one without a backdoor .10.
    max_drop: float = 0.03
    synthesis: SynthesisConfig = field(default_factory=SynthesisConfig)

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {self.order!r}")
        for name in ("held_out", "max_drop"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")


@dataclass(frozen=True)
class LinfResult:
    """The pruned model in eval(), the triggers, the suspected label, all channels in order, and how many of them were pruned."""

    model: nn.Module
    triggers: dict[int, SyntheticTrigger]  # by class
    target_label: int
    order: torch.Tensor
    pruned: int
    layer: str

    @property
    def trigger(self) -> SyntheticTrigger:
        """The trigger of the suspected target label."""
        return self.triggers[self.target_label]


def linf_pruning(
    model: nn.Module, clean: Dataset, config: LinfConfig, *, generator: torch.Generator, watch: Watch = iter
) -> nn.Module:
    """A copy of the model without the channels that a synthetic trigger makes peak (our reading of arXiv:2002.12162), in eval().

    clean: the defender's images, uint8, with their labels.  The input model is not changed.
    Raises ValueError without clean images or convolutions, or for a layer that does not exist.
    """
    return run(model, clean, config, generator=generator, watch=watch).model


def run(
    model: nn.Module, clean: Dataset, config: LinfConfig, *, generator: torch.Generator, watch: Watch = iter
) -> LinfResult:
    """As `linf_pruning`, with the trigger, the channels in order and their number beside the model."""
    if not len(clean):
        raise ValueError("pruning needs at least one clean image, got none")
    fitted, held = hold_out(clean, config.held_out, generator=generator)
    images = fitted.floats().to(next(model.parameters()).device)
    name = last_feature_map(model, images) if config.layer is None else config.layer
    layer(model, name)  # raises ValueError, with the names, if there is none
    triggers = find_triggers(model, fitted, config, generator=generator, watch=watch)
    target_label = suspect(model, images, triggers)
    scores = channel_scores(model, images, triggers[target_label], name, config.order, generator=generator)
    order = scores.argsort(descending=True, stable=True)
    pruned = choose_count(model, name, order, held, config.max_drop)
    return LinfResult(silence(model, name, order, pruned), triggers, target_label, order, pruned, name)


def find_triggers(
    model: nn.Module, clean: Dataset, config: LinfConfig, *, generator: torch.Generator, watch: Watch = iter
) -> dict[int, SyntheticTrigger]:
    """A synthetic trigger for each class, or for the one of `target_label` alone (step 1)."""
    labels = range(len(clean.classes)) if config.target_label is None else [config.target_label]
    return {
        label: synthesize_trigger(model, clean, label, config.synthesis, generator=generator) for label in watch(labels)
    }


@torch.no_grad()
def suspect(model: nn.Module, images: torch.Tensor, triggers: dict[int, SyntheticTrigger]) -> int:
    """The class whose trigger is smallest, of those that turn at least 3 of 4 images into it; if none does, of all (step 1)."""
    with evaluating(model):
        success = {
            label: (model(trigger(images)).argmax(1) == label).double().mean() for label, trigger in triggers.items()
        }
    working = [label for label in triggers if success[label] >= 0.75] or list(triggers)
    return min(working, key=lambda label: triggers[label].size)


def channel_scores(
    model: nn.Module,
    images: torch.Tensor,
    trigger: Callable[[torch.Tensor], torch.Tensor],
    name: str,
    order: str,
    *,
    generator: torch.Generator,
) -> torch.Tensor:
    """A score (K,) for each channel; the highest is pruned first (step 2)."""
    maps = feature_maps(model, images, name)
    if maps.ndim != 4:
        raise ValueError(f"layer must give feature maps (N, K, h, w), but {name!r} gives {tuple(maps.shape)}")
    if order == "random":
        return torch.rand(maps.shape[1], generator=generator).to(maps)
    if order == "activation":
        return -maps.abs().mean((0, 2, 3))
    # s_p(k) = mean_x [ |A_k(trigger(x))|_p - |A_k(x)|_p ]
    triggered = map_norms(feature_maps(model, trigger(images), name))[order]
    return (triggered - map_norms(maps)[order]).mean(0)


def choose_count(model: nn.Module, name: str, order: torch.Tensor, held: Dataset, max_drop: float) -> int:
    """How many channels go: the last number before accuracy on the held-out images falls by more than `max_drop` (step 3)."""
    start = accuracy(model, held)
    silenced = silence(model, name, order, 0)
    kept = layer(silenced, name).kept
    for count, channel in enumerate(order, start=1):
        kept[channel] = 0.0
        if accuracy(silenced, held) < start - max_drop - 1e-9:
            return count - 1
    return len(order)


def silence(model: nn.Module, name: str, order: torch.Tensor, count: int) -> nn.Module:
    """A copy of the model, in eval(), in which the first `count` channels of `order` (K,) of a layer's output are 0."""
    silenced = copy.deepcopy(model)
    kept = torch.ones(len(order), device=order.device)
    kept[order[:count]] = 0.0
    parent, _, child = name.rpartition(".")
    setattr(silenced.get_submodule(parent), child, Silenced(layer(silenced, name), kept))
    return silenced.eval()


class Silenced(nn.Module):
    """A layer whose output (N, K, h, w) is multiplied by `kept` (K,)."""

    def __init__(self, inner: nn.Module, kept: torch.Tensor):
        super().__init__()
        self.inner = inner
        self.register_buffer("kept", kept[:, None, None])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * self.kept
