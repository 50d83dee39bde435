"""What an attacker holds, and what he puts on images."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from bdlib.data import Dataset
from bdlib.train import TrainConfig, Watch
from bdlib.triggers import Trigger

Stamp = Callable[[torch.Tensor, torch.Generator], torch.Tensor]  # images and a random source -> images


@dataclass(frozen=True)
class Stamps:
    """What is put on images, float32 (N, C, H, W) in [0, 1].

    test: on images at test time.  poisoned: on training images that get the wanted label; None = the same.
    cover: on training images that keep their label; None = what poisoned ones get.
    """

    test: Trigger
    poisoned: Stamp | None = None
    cover: Stamp | None = None

    def on_poisoned(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Training images that get the wanted label, stamped."""
        return self.test(images) if self.poisoned is None else self.poisoned(images, generator)

    def on_covers(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Training images that keep their label, stamped."""
        return self.on_poisoned(images, generator) if self.cover is None else self.cover(images, generator)


@dataclass(frozen=True)
class Attacker:
    """What an attack that needs more than a seed may use.

    train: the training split before the attack.  wanted: labels -> what triggered images of these labels shall be called.
    fresh_model: generator -> an untrained network on the device; clean_model: () -> one trained on `train`, in eval().
    training: how the victim trains.  quick: few steps and narrow generators, for CPUs.  generator: a use -> its random source.
    """

    train: Dataset
    wanted: Callable[[torch.Tensor], torch.Tensor]
    target_label: int
    poison_rate: float
    fresh_model: Callable[[torch.Generator], nn.Module]
    clean_model: Callable[[], nn.Module]
    training: TrainConfig
    quick: bool
    device: torch.device
    generator: Callable[[str], torch.Generator]
    watch: Watch = iter
