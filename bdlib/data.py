"""Datasets by name, as uint8 tensors that fit on the device, and the defender's clean subset of them."""

import functools
import hashlib
import re
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from bdlib import signs
from bdlib.files import write_atomic

NAMES = ("signs", "digits", "cifar10", "gtsrb")
# What keeps the label, per name: padding of random crops (pixels), left-right flips, smallest share of the area that shows the class.
# CIFAR-10 as in the papers' code.  A sign's class needs most of the sign; the papers' code augments no GTSRB images but by crops.
AUGMENTATION = {
    "signs": (0, True, 0.5),
    "digits": (2, False, 0.5),
    "cifar10": (4, True, 0.08),
    "gtsrb": (4, False, 0.5),
    "folder": (4, True, 0.08),
}
SIGNS_TRAIN, SIGNS_TEST = 5000, 2000


@dataclass(frozen=True)
class Dataset:
    """One split: images uint8 (N, C, H, W), labels int64 (N,), and what may be done to them without changing the label.

    `crop_padding` (pixels) and `flip` are what every training here uses; `least_area` is how much of an image a zoomed copy must show.
    """

    name: str
    images: torch.Tensor
    labels: torch.Tensor
    classes: tuple[str, ...]
    crop_padding: int = 0
    flip: bool = False
    least_area: float = 1.0

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: torch.Tensor) -> "Dataset":
        """The images at these positions, in this order."""
        return replace(self, images=self.images[indices], labels=self.labels[indices])

    def to(self, device: torch.device | str) -> "Dataset":
        """The same split on another device."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def floats(self) -> torch.Tensor:
        """All images as float32 in [0, 1]."""
        return to_float(self.images)

    def sha256(self) -> str:
        """Hash of images and labels: two splits with the same hash train the same model."""
        digest = hashlib.sha256(str(tuple(self.images.shape)).encode())
        digest.update(np.ascontiguousarray(self.images.cpu().numpy()))
        digest.update(np.ascontiguousarray(self.labels.cpu().numpy()))
        return digest.hexdigest()


def to_float(images: torch.Tensor) -> torch.Tensor:
    """Images uint8 as float32 in [0, 1]."""
    return images.to(torch.float32).div_(255)


def load(name: str, root: str | Path = "data") -> tuple[Dataset, Dataset]:
    """Train and test split of `signs`, `digits`, `cifar10`, `gtsrb` or `folder:PATH` (`folder:PATH@64` for 64 x 64 pixels).

    `root` is where `cifar10.npz` and `gtsrb.npz` lie; what is missing there is downloaded once.
    Raises ValueError for an unknown name or a damaged file, RuntimeError if a download fails.
    """
    if name.startswith("folder:"):
        arrays = _folder(name.removeprefix("folder:"))
    elif name in NAMES:
        arrays = {"signs": _signs, "digits": _digits}.get(name, lambda: _cached(name, Path(root)))()
    else:
        raise ValueError(f"dataset must be one of {', '.join(NAMES)} or folder:PATH, got {name!r}")
    augmentation = AUGMENTATION[name.partition(":")[0]]
    classes = tuple(str(c) for c in arrays["classes"])
    splits = []
    for split in ("train", "test"):
        images = torch.from_numpy(np.ascontiguousarray(arrays[f"x_{split}"].transpose(0, 3, 1, 2)))
        labels = torch.from_numpy(arrays[f"y_{split}"].astype(np.int64))
        splits.append(Dataset(name, images, labels, classes, *augmentation))
    return splits[0], splits[1]


def resolve_budget(budget: int | str, dataset: Dataset) -> int:
    """Number of images that a sample budget means on this training split: 500, "5%" or "1/class".

    Raises ValueError if it is not of these forms, above the split, or below one image a class.
    """
    size, classes = len(dataset), len(dataset.classes)
    text = str(budget).strip()
    if isinstance(budget, bool) or not re.fullmatch(r"-?\d+|\d+(\.\d+)?%|\d+/class", text):
        raise ValueError(
            f'budget must be a number (500), a share ("5%") or a number per class ("1/class"), got {budget!r}'
        )
    if text.endswith("%"):
        exact = size * float(text[:-1]) / 100
    else:
        exact = int(text.removesuffix("/class")) * (classes if text.endswith("/class") else 1)
    count = round(exact)
    if count < classes or exact > size:
        raise ValueError(
            f"budget must be between {classes} (one image a class) and {size} (the training split of {dataset.name}), "
            f"got {budget!r} = {count} images"
        )
    return count


def clean_subset(dataset: Dataset, count: int, *, generator: torch.Generator) -> torch.Tensor:
    """Indices (count,) of a class-balanced random subset; what does not divide is spread over the first classes of a random order.

    Raises ValueError if a class has fewer images than its share.
    """
    classes = len(dataset.classes)
    labels = dataset.labels.cpu()
    extra = torch.randperm(classes, generator=generator)[: count % classes]
    share = torch.full((classes,), count // classes)
    share[extra] += 1
    chosen = []
    for label, wanted in enumerate(share.tolist()):
        members = torch.nonzero(labels == label).flatten()
        if len(members) < wanted:
            raise ValueError(
                f"a budget of {count} needs {wanted} images of class {dataset.classes[label]!r}, which has {len(members)}: "
                f"at most {len(members) * classes} can be spread evenly"
            )
        chosen.append(members[torch.randperm(len(members), generator=generator)[:wanted]])
    return torch.cat(chosen)


def fixed_part(dataset: Dataset, count: int) -> Dataset:
    """The same `count` images at every call, the same share of every class, in the order of the split; all if there are no more."""
    if count >= len(dataset):
        return dataset
    labels = dataset.labels.cpu()
    rank = torch.zeros_like(labels)
    for label in range(len(dataset.classes)):
        members = torch.nonzero(labels == label).flatten()
        # Random place of each image within its class, scaled to the split: the same share of every class stays.
        rank[members] = (
            torch.randperm(len(members), generator=torch.Generator().manual_seed(0)) * len(labels) // len(members)
        )
    return dataset.subset(rank.argsort(stable=True)[:count].sort().values)


def hold_out(clean: Dataset, share: float, *, generator: torch.Generator) -> tuple[Dataset, Dataset]:
    """The images parted at random, class by class: (those to fit on, those held out to choose a threshold on).

    A class gives round(share * its images), but keeps one.  Where no class can give one (one-shot), both are all the images.
    """
    held = []
    for label in range(len(clean.classes)):
        members = torch.nonzero(clean.labels.cpu() == label).flatten()
        count = min(round(share * len(members)), len(members) - 1)
        held += members[torch.randperm(len(members), generator=generator)[: max(count, 0)]].tolist()
    if not held:
        return clean, clean
    kept = torch.ones(len(clean), dtype=torch.bool)
    kept[held] = False
    return clean.subset(torch.nonzero(kept).flatten()), clean.subset(torch.tensor(held))


@functools.cache
def _signs() -> dict[str, np.ndarray]:
    images, labels = signs.draw(SIGNS_TRAIN + SIGNS_TEST, seed=2002)
    return _split(images.transpose(0, 2, 3, 1), labels, signs.CLASSES, test=np.arange(len(labels)) >= SIGNS_TRAIN)


def _digits() -> dict[str, np.ndarray]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    small = (digits.images * 255 / 16).astype(np.uint8)
    images = small.repeat(4, axis=1).repeat(4, axis=2)[..., None]
    return _split(images, digits.target, [str(k) for k in range(10)], test=_every_fifth(digits.target))


def _folder(spec: str) -> dict[str, np.ndarray]:
    """PATH/train/CLASS/* and PATH/test/CLASS/* (or val), or PATH/CLASS/* of which every fifth image of a class is for testing."""
    from torchvision.datasets import ImageFolder

    path, _, size = spec.partition("@")
    if size and not (size.isdecimal() and int(size) >= 8):
        raise ValueError(f"folder:PATH@SIZE needs a size of at least 8 pixels, got {size!r}")
    root, pixels = Path(path).expanduser(), int(size or 32)
    if not root.is_dir():
        raise ValueError(f"folder:PATH needs an existing folder, got {path!r}")
    test = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    try:
        if not (root / "train").is_dir() or test is None:
            images, labels, classes = _resized(ImageFolder(str(root)), pixels)
            return _split(images, labels, classes, test=_every_fifth(labels))
        trees = [ImageFolder(str(root / "train")), ImageFolder(str(test))]
    except FileNotFoundError as error:
        raise ValueError(f"folder:{path} is no tree of PATH/CLASS/image or PATH/train/CLASS/image: {error}") from error
    if trees[0].classes != trees[1].classes:
        raise ValueError(
            f"folder:{path} has other classes in train ({trees[0].classes}) than in {test.name} ({trees[1].classes})"
        )
    train, test = (_resized(tree, pixels) for tree in trees)
    return _arrays(train[:2], test[:2], train[2])


def _resized(tree, pixels: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Images uint8 (N, pixels, pixels, 3) RGB, labels and class names of a torchvision dataset of pictures."""
    from tqdm import tqdm

    pairs = tqdm(tree, desc="reading images", leave=False, mininterval=1)
    images, labels = zip(
        *((np.asarray(image.convert("RGB").resize((pixels, pixels))), label) for image, label in pairs), strict=True
    )
    return np.stack(images), np.array(labels), list(getattr(tree, "classes", ()))


def _every_fifth(labels: np.ndarray) -> np.ndarray:
    """Boolean (N,): of each class, its 5th, 10th, ... image."""
    test = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        test[np.flatnonzero(labels == label)[4::5]] = True
    return test


def _split(images: np.ndarray, labels: np.ndarray, classes, test: np.ndarray) -> dict[str, np.ndarray]:
    return _arrays((images[~test], labels[~test]), (images[test], labels[test]), classes)


def _arrays(train: tuple, test: tuple, classes) -> dict[str, np.ndarray]:
    """A dataset file's arrays from (images, labels) of both splits and the class names."""
    return dict(x_train=train[0], y_train=train[1], x_test=test[0], y_test=test[1], classes=np.array(classes))


def _cached(name: str, root: Path) -> dict[str, np.ndarray]:
    """Arrays of `root/name.npz`, which is downloaded and written first if it is not there."""
    path = root / f"{name}.npz"
    if not path.exists():
        arrays = _download(name, root)
        write_atomic(path, lambda file: np.savez(file, **arrays))
    return read_npz(path)


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Arrays x_train, y_train, x_test, y_test (images uint8 N x H x W x C) and classes of a dataset file.

    Raises ValueError if the file is damaged or not of this form.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in ("x_train", "y_train", "x_test", "y_test", "classes")}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} is damaged or no dataset ({error}): delete it, and the next run makes it anew"
        ) from error
    for split in ("train", "test"):
        images, labels = arrays[f"x_{split}"], arrays[f"y_{split}"]
        if (
            images.dtype != np.uint8
            or images.ndim != 4
            or len(images) != len(labels)
            or labels.max() >= len(arrays["classes"])
        ):
            raise ValueError(
                f"{path}: x_{split} must be uint8 N x H x W x C with one label below {len(arrays['classes'])} each"
            )
    return arrays


def _download(name: str, root: Path) -> dict[str, np.ndarray]:
    """Arrays of a dataset fetched by torchvision (its progress bar, its checksums); what it fetched is removed afterwards."""
    raw = root / f"{name}-download"
    fetch: dict[str, Callable[[Path], dict[str, np.ndarray]]] = {"cifar10": _fetch_cifar10, "gtsrb": _fetch_gtsrb}
    try:
        arrays = fetch[name](raw)
    except (OSError, RuntimeError) as error:
        shutil.rmtree(raw, ignore_errors=True)
        raise RuntimeError(
            f"{name} could not be downloaded ({error}). Either run again with a connection, or put the dataset by hand at "
            f"{root / (name + '.npz')}: arrays x_train, y_train, x_test, y_test (images uint8 N x 32 x 32 x 3, RGB) and classes"
        ) from error
    shutil.rmtree(raw)
    return arrays


def _fetch_cifar10(raw: Path) -> dict[str, np.ndarray]:
    from torchvision.datasets import CIFAR10

    train, test = (CIFAR10(str(raw), train=train, download=True) for train in (True, False))
    return _arrays((train.data, np.array(train.targets)), (test.data, np.array(test.targets)), train.classes)


def _fetch_gtsrb(raw: Path) -> dict[str, np.ndarray]:
    from torchvision.datasets import GTSRB

    train, test = (_resized(GTSRB(str(raw), split=split, download=True), 32) for split in ("train", "test"))
    return _arrays(train[:2], test[:2], [f"{c:02d}" for c in range(43)])
