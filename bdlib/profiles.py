"""The profiles: how a model is trained and which values runall.py fills in, for each dataset."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bdlib.train import TrainConfig

NAMES = ("quick", "paper", "paper_fast")

# Notebooks whose budget is training images, 0 = all: a defense that trains on the poisoned set and holds no clean images.
BUDGET_IS_TRAINING_SET = ("04_cbd",)

# Images of the training split that the quick profile uses at most: what two CPU cores train in minutes.
QUICK_TRAIN_LIMIT = 20_000


def require(profile: str) -> None:
    """Raises ValueError if there is no such profile."""
    if profile not in NAMES:
        raise ValueError(f"profile must be one of {', '.join(NAMES)}, got {profile!r}")


def training(profile: str, dataset: str) -> TrainConfig:
    """How the attacker trains.

    quick: few epochs at a high learning rate.  paper: BackdoorBench's protocol for CIFAR-10 and GTSRB, taken for other datasets too
    (its 200 epochs on Tiny ImageNet, whose rate falls on plateaus, are not here).  paper_fast: ours, for the same networks and images
    in a third of the epochs.
    """
    from bdlib.train import TrainConfig  # brings torch, which a plan of runs has no use for

    require(profile)
    if profile == "quick":
        epochs = {"signs": 12, "digits": 30}.get(dataset, 15)
        return TrainConfig(epochs=epochs, batch_size=128, lr=0.1, schedule="one_cycle")
    if profile == "paper_fast":
        return TrainConfig(epochs=15 if dataset == "gtsrb" else 30, batch_size=256, lr=0.2, schedule="one_cycle")
    return TrainConfig(epochs=50 if dataset == "gtsrb" else 100, batch_size=128, lr=0.01, schedule="cosine")


def train_limit(profile: str) -> int | None:
    """Images of the training split used at most; None = all."""
    require(profile)
    return QUICK_TRAIN_LIMIT if profile == "quick" else None


def defaults(profile: str, dataset: str | None = None, notebook: str = "") -> dict[str, object]:
    """Parameters of a notebook that runall.py fills in where the command line names none."""
    require(profile)
    dataset = dataset or ("signs" if profile == "quick" else "cifar10")
    arch = "preact_resnet18:8" if profile == "quick" else "preact_resnet18"
    budget = 200 if dataset in ("signs", "digits") else 500
    if notebook in BUDGET_IS_TRAINING_SET:
        budget = 0
        arch = arch if profile == "quick" else "wrn_16_1"
    return {"profile": profile, "dataset": dataset, "arch": arch, "budget": budget}
