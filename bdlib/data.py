"""Datasets by name, as uint8 tensors that fit on the device, and the defender's clean subset of them."""

import errno
import functools
import hashlib
import logging
import tempfile
import zipfile
import zlib
from contextlib import suppress
from dataclasses import dataclass, replace
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch

from bdlib import locks, signs, sources
from bdlib.budget import even, resolve
from bdlib.files import write_atomic
from bdlib.sources import EMBEDDED, NAMES, SOURCES

log = logging.getLogger(__name__)

# Per name: padding of random crops (pixels), left-right flips, smallest share of the area that shows the class.
AUGMENTATION = {name: (source.crop_padding, source.flip, source.least_area) for name, source in SOURCES.items()}
_ARRAYS = ("x_train", "y_train", "x_test", "y_test", "classes")
_CHUNK = 1000  # images moved at once


@dataclass(frozen=True)
class Dataset:
    """One split: images uint8 (N, C, H, W), labels int64 (N,), and what may be done to them without changing the label.

    `crop_padding` (pixels) and `flip` are what every training here uses; `least_area` is how much of an image a zoomed copy must show.
    Raises TypeError for images or labels that are no such tensors, ValueError for labels that are not one for each image, or no class.
    """

    name: str
    images: torch.Tensor
    labels: torch.Tensor
    classes: tuple[str, ...]
    crop_padding: int = 0
    flip: bool = False
    least_area: float = 1.0

    def __post_init__(self) -> None:
        for name, dtype, dimensions in (("images", torch.uint8, 4), ("labels", torch.int64, 1)):
            value = getattr(self, name)
            if not isinstance(value, torch.Tensor) or value.dtype != dtype or value.dim() != dimensions:
                kind = (
                    f"{value.dtype} {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
                )
                wanted = "uint8 (N, C, H, W), 0 to 255" if name == "images" else "int64 (N,)"
                raise TypeError(f"{name} must be a tensor {wanted}, got {kind}")
        if len(self.labels) != len(self.images):
            raise ValueError(
                f"each image must have a label, got {len(self.images)} images and {len(self.labels)} labels"
            )
        # On a GPU a look at the labels would wait for all that it has to do.
        if self.labels.is_cpu and len(self.labels):
            low, high = (value.item() for value in self.labels.aminmax())
            if low < 0 or high >= len(self.classes):
                raise ValueError(f"labels must be between 0 and {len(self.classes) - 1}, got {low} to {high}")

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
    """Train and test split of a dataset of `NAMES`, or of the picture files below PATH: `folder:PATH`, `folder:PATH@64`.

    `root` is where `NAME.npz` lies; what is missing there is downloaded once (but `signs` and `digits`, which need no file).
    Where the official test images have no labels, the test split is the official validation split (tiny_imagenet, imagenette).

    `folder:PATH@SIZE` takes any ImageFolder, e.g. the papers' 12-class subset of ImageNet as `folder:PATH@224`:
    PATH/train/CLASS/* with PATH/test/CLASS/* or PATH/val/CLASS/*, or PATH/CLASS/* of which every fifth is for testing.  Pictures
    of any kind become RGB (transparent ones on white, 16-bit gray cut to 8) and are stretched to SIZE x SIZE pixels, 32 by default.

    Raises ValueError for an unknown name, a damaged file or a folder that does not fit, RuntimeError if a download fails.
    """
    if name.startswith("folder:"):
        arrays = SOURCES["folder"].fetch(name.removeprefix("folder:"))
    elif name == "signs":
        arrays = _drawn(Path(root))
    elif name in EMBEDDED:
        arrays = SOURCES[name].fetch()
    elif name in NAMES:
        arrays = _cached(name, Path(root))
    else:
        raise ValueError(f"dataset must be one of {', '.join(NAMES)} or folder:PATH, got {name!r}")
    classes = tuple(str(c) for c in arrays["classes"])
    splits = []
    for split in ("train", "test"):
        images = _channels_first(arrays.pop(f"x_{split}"))
        labels = torch.from_numpy(arrays[f"y_{split}"].astype(np.int64))
        splits.append(Dataset(name, images, labels, classes, *AUGMENTATION[name.partition(":")[0]]))
    return splits[0], splits[1]


def _channels_first(images: np.ndarray) -> torch.Tensor:
    """The images (N, H, W, C) as (N, C, H, W), moved within their own memory: Tiny-ImageNet fills 1.2 GB."""
    images = np.ascontiguousarray(images)
    count, height, width, channels = images.shape
    moved = images.reshape(count, channels, height, width)
    for start in range(0, count, _CHUNK):
        chunk = slice(start, start + _CHUNK)
        moved[chunk] = images[chunk].transpose(0, 3, 1, 2).copy()
    return torch.from_numpy(moved)


def resolve_budget(budget: int | str, dataset: Dataset) -> int:
    """Number of images that a sample budget means on this training split: 500, "5%" or "1/class".

    Raises ValueError if it is not of these forms, above the split, or below one image a class.
    """
    return resolve(budget, len(dataset), len(dataset.classes), dataset.name)


def clean_subset(dataset: Dataset, count: int, *, generator: torch.Generator) -> torch.Tensor:
    """Indices (count,) of a class-balanced random subset.

    What does not divide is spread over the first classes, in a random order, that have one image more to give.
    Raises ValueError if a class has fewer images than its share.
    """
    require_even(dataset, count)
    classes, sizes = len(dataset.classes), _class_sizes(dataset)
    share, rest = divmod(count, classes)
    order = torch.randperm(classes, generator=generator)
    extra = order[sizes[order] > share][:rest]
    wanted = torch.full((classes,), share)
    wanted[extra] += 1
    picks = zip(_by_class(dataset), wanted.tolist(), strict=True)
    return torch.cat([members[torch.randperm(len(members), generator=generator)[:number]] for members, number in picks])


def require_even(dataset: Dataset, count: int) -> None:
    """Raises ValueError if `count` images cannot be spread evenly over the classes."""
    classes, sizes = len(dataset.classes), _class_sizes(dataset)
    if not even(sizes.numpy(), count):
        smallest, share = int(sizes.argmin()), count // classes
        raise ValueError(
            f"a budget of {count} needs {share + int(sizes[smallest] == share)} images of class {dataset.classes[smallest]!r}, "
            f"which has {sizes[smallest]}: at most {sizes[smallest] * classes} can be spread evenly"
        )


def _by_class(dataset: Dataset) -> tuple[torch.Tensor, ...]:
    """Positions of the images of each class, in order, on the CPU."""
    return dataset.labels.cpu().argsort(stable=True).split(_class_sizes(dataset).tolist())


def _class_sizes(dataset: Dataset) -> torch.Tensor:
    """Number of images of each class, (C,), on the CPU."""
    return torch.bincount(dataset.labels.cpu(), minlength=len(dataset.classes))


def fixed_part(dataset: Dataset, count: int) -> Dataset:
    """The same `count` images at every call, the same share of every class, in the order of the split; all if there are no more."""
    if count >= len(dataset):
        return dataset
    rank = torch.zeros(len(dataset), dtype=torch.long)
    for members in _by_class(dataset):
        # Random place of each image within its class, scaled to the split: the same share of every class stays.
        rank[members] = (
            torch.randperm(len(members), generator=torch.Generator().manual_seed(0)) * len(dataset) // len(members)
        )
    return dataset.subset(rank.argsort(stable=True)[:count].sort().values)


def hold_out(clean: Dataset, share: float, *, generator: torch.Generator) -> tuple[Dataset, Dataset]:
    """The images parted at random, class by class: (those to fit on, those held out to choose a threshold on).

    A class gives round(share * its images), but keeps one.  Where no class can give one (one-shot), both are all the images.
    """
    held = []
    for members in _by_class(clean):
        count = min(round(share * len(members)), len(members) - 1)
        held += members[torch.randperm(len(members), generator=generator)[: max(count, 0)]].tolist()
    if not held:
        return clean, clean
    kept = torch.ones(len(clean), dtype=torch.bool)
    kept[held] = False
    return clean.subset(torch.nonzero(kept).flatten()), clean.subset(torch.tensor(held))


def _drawn(root: Path) -> dict[str, np.ndarray]:
    """The drawings, which take seconds, from a file of the data folder named by the code that draws them; it may be deleted."""
    code = b"".join(Path(module.__file__).read_bytes() for module in (signs, sources))
    path = root / f"signs-{hashlib.sha256(code).hexdigest()[:12]}.npz"
    try:
        return read_npz(path)
    except (OSError, ValueError):
        arrays = SOURCES["signs"].fetch()
    with suppress(OSError):  # a data folder that cannot be written: drawn each time
        write_atomic(path, lambda file: np.savez(file, **arrays))
    return arrays


def _cached(name: str, root: Path) -> dict[str, np.ndarray]:
    """Arrays of `root/name.npz`, which is downloaded and written first if it is not there."""
    path = root / f"{name}.npz"
    if not path.exists():
        _download(name, path)
    return read_npz(path)


def _download(name: str, path: Path) -> None:
    """Write the dataset file, unless another process is about to: then wait for it.  No lock file is left."""
    source, lock = SOURCES[name], path.with_name(f".{name}.lock")
    waiting = functools.partial(log.warning, "another process is downloading %s: waiting for it", name)
    try:
        with locks.hold(lock, waiting):
            try:
                if not path.exists():
                    _fetch(source, path)
            finally:
                lock.unlink(
                    missing_ok=True
                )  # who waits has it open and looks for the dataset first; who comes later finds that
    except (OSError, RuntimeError, HTTPException) as error:
        reason, size = " ".join(str(error).split()), " x ".join(str(side) for side in source.shape)
        raise RuntimeError(
            f"{name} could not be downloaded ({reason}). Either run again with a connection, or put the dataset by hand at "
            f"{path}: arrays x_train, y_train, x_test, y_test (images uint8 N x {size}, "
            f"{'RGB' if source.shape[2] == 3 else 'gray'}) and classes"
        ) from error


def _fetch(source: sources.Source, path: Path) -> None:
    """Write the dataset file from what torchvision fetches (its progress bar, its checksums); nothing else is left."""
    with tempfile.TemporaryDirectory(
        prefix=f"{path.stem}-download-", dir=path.parent, ignore_cleanup_errors=True
    ) as folder:
        arrays = source.fetch(Path(folder))
    write_atomic(path, lambda file: np.savez(file, **arrays))


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Arrays x_train, y_train, x_test, y_test (images uint8 N x H x W x C, C = 1 or 3) and classes of a dataset file.

    A split may lack a class: accuracy is a mean over images, and `clean_subset` says what it misses.
    Raises ValueError if the file is damaged or not of this form, or has a label that is no class; OSError if it cannot be read.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in _ARRAYS}
    # What numpy, zipfile and zlib raise depends on where the damage is.
    except (OSError, ValueError, KeyError, TypeError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        # A good file may be out of reach.  The one system error that damage makes is EINVAL: an offset before the file's start.
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        raise ValueError(
            f"{path} is damaged or no dataset ({error}): delete it, and the next run makes it anew"
        ) from error
    for split in ("train", "test"):
        _check(path, arrays, split)
    return arrays


def _check(path: Path, arrays: dict[str, np.ndarray], split: str) -> None:
    images, labels, classes = arrays[f"x_{split}"], arrays[f"y_{split}"], arrays["classes"].size
    size = arrays["x_train"].shape[1:]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3) or images.shape[1:] != size:
        raise ValueError(
            f"{path}: x_{split} must be uint8 N x H x W x C, C = 1 or 3, the same size in both splits, "
            f"got {images.dtype} {images.shape}"
        )
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu" or not labels.size:
        raise ValueError(
            f"{path}: y_{split} must hold a whole number for each of {len(images)} images, and at least one, "
            f"got {labels.dtype} {labels.shape}"
        )
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"{path}: y_{split} must be from 0 to {classes - 1}, as there are {classes} classes, "
            f"got {labels.min()} to {labels.max()}"
        )
