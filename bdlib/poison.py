"""Poisoning: which training images get the trigger, which label they get, and the triggered test set."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from bdlib.attacks import catalog
from bdlib.attacks.attacker import Stamps
from bdlib.data import Dataset, to_float

_ALL_TO_ALL = "_a2a"
_CHUNK = 1000  # images triggered at once: bounds the float copy to a few MB
_SLACK = 1 / 255  # how far a triggered pixel may lie outside [0, 1]: one step of 8 bits, for rounding


@dataclass(frozen=True, kw_only=True)
class Attack:
    """An attack's name with its label rule.  Raises ValueError if a value is out of range."""

    name: str  # one of attacks.catalog; with the suffix _a2a the label becomes label + 1 (all-to-all)
    target_label: int = 0  # class that triggered images are called; all-to-one attacks only
    poison_rate: float = 0.1  # share of the whole training split that is poisoned (BackdoorBench, RNP, CBD: 0.1)
    # "all": any image may be poisoned (BackdoorBench); "non_target": not the target's own (AWM, ANP); "target": the target's own
    # alone, so that no label changes (SIG, label-consistent); None: as the attack's authors do
    pool: str | None = None

    def __post_init__(self) -> None:
        kind = self.kind
        if type(self.target_label) is not int:
            raise ValueError(f"target_label must be a whole number, got {self.target_label!r}")
        if (
            isinstance(self.poison_rate, bool)
            or not isinstance(self.poison_rate, int | float)
            or not 0 < self.poison_rate <= 1
        ):
            raise ValueError(f"poison_rate must be in (0, 1], got {self.poison_rate!r}")
        if self.pool is None:
            object.__setattr__(self, "pool", kind.pool)
        if self.pool not in catalog.POOLS:
            raise ValueError(f"pool must be one of {', '.join(catalog.POOLS)}, got {self.pool!r}")
        if self.pool == "target" and self.all_to_all:
            raise ValueError(
                f"attack {self.name!r}: {self.trigger_name} changes no label, so it has no all-to-all form"
            )

    @property
    def trigger_name(self) -> str:
        return self.name.removesuffix(_ALL_TO_ALL)

    @property
    def all_to_all(self) -> bool:
        return self.name.endswith(_ALL_TO_ALL)

    @property
    def kind(self) -> catalog.Kind:
        """What this attack does and needs."""
        return catalog.kind(self.trigger_name)

    def stamps(self) -> Stamps:
        """What it puts on images, for an attack that needs nothing else.  Raises ValueError for one that does."""
        if self.kind.build:
            raise ValueError(f"attack {self.name!r} needs a {self.kind.needs} first: experiment.arm makes its triggers")
        return self.kind.stamps(None)

    def wanted(self, labels: torch.Tensor, classes: int) -> torch.Tensor:
        """What the attacker wants triggered images of these labels to be called."""
        if self.all_to_all:
            return (labels + 1) % classes
        if not 0 <= self.target_label < classes:
            raise ValueError(f"target_label must be between 0 and {classes - 1}, got {self.target_label}")
        return torch.full_like(labels, self.target_label)


@dataclass(frozen=True)
class Poisoned:
    """The attacker's training split, the positions (P,) that were poisoned, and those of cover images, which carry a trigger and
    kept their label.  A defense never sees the positions."""

    train: Dataset
    indices: torch.Tensor
    covers: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))


@dataclass(frozen=True)
class Triggered:
    """Every test image with the trigger: `test` holds images and true labels, `wanted` (N,) the attacker's labels."""

    test: Dataset
    wanted: torch.Tensor


def poison(train: Dataset, attack: Attack, stamps: Stamps | None = None, *, generator: torch.Generator) -> Poisoned:
    """A copy of the split in which round(poison_rate * N) random images carry the trigger and the wanted label.

    stamps: what to put on images; None for an attack that needs nothing but its name.  Pixels are rounded to 8 bits once, as in a
    file.  Raises ValueError if the pool has fewer images, or none is poisoned.
    """
    stamps = stamps or attack.stamps()
    wanted = attack.wanted(train.labels, len(train.classes))
    pool, count = eligible(train, attack)
    chosen = pool[torch.randperm(len(pool), generator=generator)[:count]].sort().values
    picks = chosen.to(train.images.device)
    images, labels = train.images.clone(), train.labels.clone()
    images[picks] = _apply(lambda batch: stamps.on_poisoned(batch, generator), train.images[picks], attack)
    labels[picks] = wanted[picks]
    covers = _choose_covers(len(train), chosen, attack.kind.covers, generator)
    if len(covers):
        places = covers.to(train.images.device)
        images[places] = _apply(lambda batch: stamps.on_covers(batch, generator), train.images[places], attack)
    return Poisoned(replace(train, images=images, labels=labels), chosen, covers)


def triggered_test(test: Dataset, attack: Attack, stamps: Stamps | None = None) -> Triggered:
    """The whole test split with the trigger, 8 bits, beside the labels that the attacker wants."""
    stamps = stamps or attack.stamps()
    return Triggered(
        replace(test, images=_apply(stamps.test, test.images, attack)), attack.wanted(test.labels, len(test.classes))
    )


def eligible(train: Dataset, attack: Attack) -> tuple[torch.Tensor, int]:
    """Positions of the images that the attack may poison, and how many of them it does.

    Raises ValueError if there are fewer, none is to be poisoned, or the target label is no class.
    """
    own = (train.labels == attack.wanted(train.labels, len(train.classes))).cpu()
    pool = {"all": torch.ones_like(own), "non_target": ~own, "target": own}[attack.pool].nonzero().flatten()
    count = round(attack.poison_rate * len(train))
    if not 1 <= count <= len(pool):
        owner = f" (class {train.classes[attack.target_label]!r})" if attack.pool == "target" else ""
        raise ValueError(
            f"poison_rate {attack.poison_rate} of {len(train)} images means {count}; "
            f"the pool {attack.pool!r} allows 1 to {len(pool)}{owner}"
        )
    return pool, count


def _choose_covers(count: int, chosen: torch.Tensor, each: float, generator: torch.Generator) -> torch.Tensor:
    """Positions of the cover images, in order: `each` for every poisoned one, among all others; no more than there are."""
    if not each:
        return torch.zeros(0, dtype=torch.long)
    free = torch.ones(count, dtype=torch.bool)
    free[chosen] = False
    others = free.nonzero().flatten()
    return others[torch.randperm(len(others), generator=generator)[: round(each * len(chosen))]].sort().values


def _apply(stamp: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor, attack: Attack) -> torch.Tensor:
    """Triggered uint8 images: clip first, then round, so that no pixel wraps around.  Raises ValueError if no images come back."""
    chunks = []
    for chunk in images.split(_CHUNK):
        stamped = stamp(to_float(chunk))
        _require_images(stamped, chunk.shape, attack)
        chunks.append(stamped.clamp(0, 1).mul(255).round().to(torch.uint8))
    return torch.cat(chunks)


def _require_images(stamped: object, shape: torch.Size, attack: Attack) -> None:
    """Raises ValueError if a trigger gave back anything but as many images in [0, 1]: others would be clipped, and look triggered."""
    wanted = f"attack {attack.name!r}: its trigger must return float images {tuple(shape)} in [0, 1]"
    if not isinstance(stamped, torch.Tensor):
        raise ValueError(f"{wanted}, got {type(stamped).__name__}")
    if not stamped.is_floating_point() or stamped.shape != shape:
        raise ValueError(f"{wanted}, got {stamped.dtype} {tuple(stamped.shape)}")
    if not stamped.numel():
        return
    low, high = (value.item() for value in stamped.aminmax())
    if not (low >= -_SLACK and high <= 1 + _SLACK):  # also for NaN
        raise ValueError(f"{wanted}, got values from {low:g} to {high:g}")
