"""Poisoning: which training images get the trigger, which label they get, and the triggered test set."""

from dataclasses import dataclass, replace

import torch

from bdlib import triggers
from bdlib.data import Dataset, to_float

POOLS = ("all", "non_target")
_ALL_TO_ALL = "_a2a"
_CHUNK = 1000  # images triggered at once: bounds the float copy to a few MB


@dataclass(frozen=True, kw_only=True)
class Attack:
    """A trigger with a label rule.  Raises ValueError if a value is out of range."""

    name: str  # a trigger's name; with the suffix _a2a the label becomes label + 1 (all-to-all)
    target_label: int = 0  # class that triggered images are called; all-to-one attacks only
    poison_rate: float = 0.1  # share of the whole training split that is poisoned (BackdoorBench, RNP, CBD: 0.1)
    pool: str = "all"  # "all": any image may be poisoned (BackdoorBench); "non_target": not the target's own (AWM, ANP)

    def __post_init__(self) -> None:
        if self.trigger_name not in triggers.TRIGGERS:
            names = [*triggers.TRIGGERS, *(name + _ALL_TO_ALL for name in triggers.TRIGGERS)]
            raise ValueError(f"attack must be one of {', '.join(names)}, got {self.name!r}")
        if not 0 < self.poison_rate <= 1:
            raise ValueError(f"poison_rate must be in (0, 1], got {self.poison_rate}")
        if self.pool not in POOLS:
            raise ValueError(f"pool must be one of {', '.join(POOLS)}, got {self.pool!r}")

    @property
    def trigger_name(self) -> str:
        return self.name.removesuffix(_ALL_TO_ALL)

    @property
    def all_to_all(self) -> bool:
        return self.name.endswith(_ALL_TO_ALL)

    def trigger(self, images: torch.Tensor) -> torch.Tensor:
        """The images, float32 in [0, 1], with the trigger."""
        return triggers.make(self.trigger_name)(images)

    def wanted(self, labels: torch.Tensor, classes: int) -> torch.Tensor:
        """What the attacker wants triggered images of these labels to be called."""
        if self.all_to_all:
            return (labels + 1) % classes
        if not 0 <= self.target_label < classes:
            raise ValueError(f"target_label must be between 0 and {classes - 1}, got {self.target_label}")
        return torch.full_like(labels, self.target_label)


@dataclass(frozen=True)
class Poisoned:
    """The attacker's training split and the positions (P,) that were poisoned; a defense never sees the latter."""

    train: Dataset
    indices: torch.Tensor


@dataclass(frozen=True)
class Triggered:
    """Every test image with the trigger: `test` holds images and true labels, `wanted` (N,) the attacker's labels."""

    test: Dataset
    wanted: torch.Tensor


def poison(train: Dataset, attack: Attack, *, generator: torch.Generator) -> Poisoned:
    """A copy of the split in which round(poison_rate * N) random images carry the trigger and the wanted label.

    Pixels are rounded to 8 bits once, as in a file.  Raises ValueError if the pool has fewer images, or none is poisoned.
    """
    wanted = attack.wanted(train.labels, len(train.classes))
    eligible = torch.arange(len(train))
    if attack.pool == "non_target":
        eligible = torch.nonzero((train.labels != wanted).cpu()).flatten()
    count = round(attack.poison_rate * len(train))
    if not 1 <= count <= len(eligible):
        raise ValueError(
            f"poison_rate {attack.poison_rate} of {len(train)} images means {count}; "
            f"the pool {attack.pool!r} allows 1 to {len(eligible)}"
        )
    chosen = eligible[torch.randperm(len(eligible), generator=generator)[:count]].sort().values
    picks = chosen.to(train.images.device)
    images, labels = train.images.clone(), train.labels.clone()
    images[picks] = _apply(attack, train.images[picks])
    labels[picks] = wanted[picks]
    return Poisoned(replace(train, images=images, labels=labels), chosen)


def triggered_test(test: Dataset, attack: Attack) -> Triggered:
    """The whole test split with the trigger, 8 bits, beside the labels that the attacker wants."""
    return Triggered(replace(test, images=_apply(attack, test.images)), attack.wanted(test.labels, len(test.classes)))


def _apply(attack: Attack, images: torch.Tensor) -> torch.Tensor:
    """Triggered uint8 images: clip first, then round, so that no pixel wraps around."""
    return torch.cat(
        [attack.trigger(to_float(chunk)).clamp(0, 1).mul(255).round().to(torch.uint8) for chunk in images.split(_CHUNK)]
    )
