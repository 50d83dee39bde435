"""Where each dataset comes from and what keeps its labels: one row of `SOURCES` and one function for each."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bdlib import pictures, signs

Arrays = dict[str, np.ndarray]  # x_train, y_train, x_test, y_test (images uint8 N x H x W x C) and classes
SIGNS_TRAIN, SIGNS_TEST = 5000, 2000
SPLITS = ("train", "test", "val", "valid", "validation", "dev")  # what people call folders of splits, in any case
# Stanford's archive and its MD5 sum; torchvision has no class for it.
TINY_IMAGENET = ("http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de")


def folder(spec: str) -> Arrays:
    """PATH/train/CLASS/* and PATH/test/CLASS/* (or val), or PATH/CLASS/* of which every fifth image of a class is for testing.

    spec: PATH or PATH@SIZE.  Raises ValueError if the folder does not fit or a picture cannot be read.
    """
    root, pixels = _path_and_size(spec)
    _require_layout(root)
    test = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    if (root / "train").is_dir() and test:
        (train_samples, classes), (test_samples, others) = (
            pictures.class_tree(part) for part in (root / "train", test)
        )
        if classes != others:
            differ = sorted(set(classes) ^ set(others))
            raise ValueError(f"folder:{root} has other classes in train than in {test.name}: only one has {differ}")
    else:
        samples, classes = pictures.class_tree(root)
        labels = np.array([label for _, label in samples])
        scarce = [classes[label] for label in np.flatnonzero(np.bincount(labels) < 5)]
        if scarce:
            raise ValueError(
                f"folder:{root} needs at least 5 pictures of each class, of which every fifth is for testing, "
                f"or folders train and test; fewer has {', '.join(scarce)}"
            )
        held = _every_fifth(labels)
        train_samples, test_samples = ([samples[k] for k in np.flatnonzero(part)] for part in (~held, held))
    train = pictures.read_all(train_samples, pixels)
    return _arrays(train, pictures.read_all(test_samples, pixels), classes)


def _require_layout(root: Path) -> None:
    """Raises ValueError for folders that are called like splits but are not the two that are understood: they are no classes.

    One of many may be a class, a train among cars, if its pictures lie in it and not in folders.
    """
    names = sorted(path.name for path in root.iterdir() if path.is_dir())
    splits = [name for name in names if name.lower() in SPLITS]
    missing = [] if "train" in splits else ["train"]
    if not {"test", "val"} & set(splits):
        missing.append("test")
    if not splits or not missing:
        return
    if len(splits) > 1 or splits == names or any(path.is_dir() for path in (root / splits[0]).iterdir()):
        raise ValueError(
            f"folder:{root} holds {', '.join(splits)} but no {' and no '.join(missing)}: "
            "two splits are called train and test (or val), in small letters; else PATH holds the classes"
        )


def _path_and_size(spec: str) -> tuple[Path, int]:
    path, at, size = spec.rpartition("@")
    # An @ within the path, as in /home/me@university/cats or cats@v2
    if not at or "/" in size or Path(spec).expanduser().is_dir():
        path, size = spec, "32"
    if not (size.isdecimal() and int(size) >= 8):
        raise ValueError(f"folder:PATH@SIZE needs a size of at least 8 pixels, got {size!r}")
    root = Path(path).expanduser()
    if not root.is_dir():
        raise ValueError(f"folder:PATH needs an existing folder, got {path!r}")
    return root, int(size)


def _signs() -> Arrays:
    images, labels = _drawn_signs()
    return _split(images.transpose(0, 2, 3, 1), labels, signs.CLASSES, test=np.arange(len(labels)) >= SIGNS_TRAIN)


@functools.cache
def _drawn_signs() -> tuple[np.ndarray, np.ndarray]:
    return signs.draw(SIGNS_TRAIN + SIGNS_TEST, seed=2002)


def _digits() -> Arrays:
    from sklearn.datasets import load_digits

    digits = load_digits()
    small = (digits.images * 255 / 16).astype(np.uint8)
    images = small.repeat(4, axis=1).repeat(4, axis=2)[..., None]
    return _split(images, digits.target, [str(k) for k in range(10)], test=_every_fifth(digits.target))


def _cifar(kind: str, raw: Path) -> Arrays:
    from torchvision import datasets

    train, test = (getattr(datasets, kind)(str(raw), train=train, download=True) for train in (True, False))
    return _arrays((train.data, np.array(train.targets)), (test.data, np.array(test.targets)), train.classes)


def _gtsrb(raw: Path) -> Arrays:
    from torchvision.datasets import GTSRB

    trees = (GTSRB(str(raw), split=split, download=True) for split in ("train", "test"))
    train, test = (pictures.resized(tree, len(tree), 32) for tree in trees)
    return _arrays(train, test, [f"{c:02d}" for c in range(43)])


def _svhn(raw: Path) -> Arrays:
    from torchvision.datasets import SVHN

    parts = (SVHN(str(raw), split=split, download=True) for split in ("train", "test"))  # not "extra"
    train, test = ((part.data.transpose(0, 2, 3, 1), part.labels) for part in parts)
    return _arrays(train, test, [str(k) for k in range(10)])


def _tiny_imagenet(raw: Path) -> Arrays:
    """The official validation images are the test split: the official test images have no labels."""
    from torchvision.datasets.utils import download_and_extract_archive

    url, md5 = TINY_IMAGENET
    download_and_extract_archive(url, str(raw), md5=md5)
    root = raw / "tiny-imagenet-200"
    samples, ids = pictures.class_tree(root / "train")
    label = {name: k for k, name in enumerate(ids)}
    test = [
        (str(root / "val/images" / file), label[name]) for file, name, *_ in _table(root / "val/val_annotations.txt")
    ]
    names = {name: words for name, words, *_ in _table(root / "words.txt")}
    classes = [names[name].partition(",")[0] for name in ids]  # the first of a class's synonyms
    return _arrays(pictures.read_all(samples, 64), pictures.read_all(test, 64), classes)


def _table(path: Path) -> list[list[str]]:
    """Rows of a file with columns parted by tabs."""
    return [
        line.split("\t") for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if "\t" in line
    ]


def _imagenette(raw: Path) -> Arrays:
    from torchvision.datasets import Imagenette

    # One archive holds both splits, and some releases of torchvision refuse to download what is there: only the first asks.
    train, test = (
        Imagenette(str(raw), split=split, size="160px", download=split == "train", loader=pictures.read)
        for split in ("train", "val")
    )
    classes = [synonyms[0] for synonyms in train.classes]
    return _arrays(*(pictures.resized(tree, len(tree), 64) for tree in (train, test)), classes)


def _mnist(kind: str, raw: Path) -> Arrays:
    """28 x 28 pixels with a black border of 2, so that every network and trigger fits."""
    from torchvision import datasets

    parts = [getattr(datasets, kind)(str(raw), train=train, download=True) for train in (True, False)]
    train, test = (
        (np.pad(part.data.numpy(), ((0, 0), (2, 2), (2, 2)))[..., None], part.targets.numpy()) for part in parts
    )
    return _arrays(train, test, [name.partition(" - ")[0] for name in parts[0].classes])  # "0 - zero" -> "0"


def _every_fifth(labels: np.ndarray) -> np.ndarray:
    """Boolean (N,): of each class, its 5th, 10th, ... image."""
    test = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        test[np.flatnonzero(labels == label)[4::5]] = True
    return test


def _split(images: np.ndarray, labels: np.ndarray, classes, test: np.ndarray) -> Arrays:
    return _arrays((images[~test], labels[~test]), (images[test], labels[test]), classes)


def _arrays(train: tuple, test: tuple, classes) -> Arrays:
    """A dataset's arrays from (images, labels) of both splits and the class names."""
    return dict(x_train=train[0], y_train=train[1], x_test=test[0], y_test=test[1], classes=np.array(classes))


@dataclass(frozen=True)
class Source:
    """How a dataset is got, and what may be done to its images without changing the label."""

    fetch: Callable[..., Arrays]  # new arrays at every call; its argument: none, a folder to download to, or PATH@SIZE
    needs: str  # "nothing", "download" or "path"
    shape: tuple[int, int, int] | None  # height, width, channels; None: as the user asks
    crop_padding: int  # pixels around an image of which random crops are cut
    flip: bool  # left to right
    least_area: float  # smallest share of the area that still shows the class


# Crops by 4 pixels are BackdoorBench's for all its datasets, 64 x 64 ones too.
# DIFFERS: BackdoorBench flips CIFAR-10 only; here every natural image is flipped, because its mirror image keeps the class.
SOURCES = {
    # Drawn at random places, with a shape that is its own mirror image; the class needs most of the sign.
    "signs": Source(_signs, "nothing", (32, 32, 3), 0, True, 0.5),
    # A digit's mirror image is none, and a part of it may be another digit.  Its pixels are 4 wide and touch the border.
    "digits": Source(_digits, "nothing", (32, 32, 1), 2, False, 0.5),
    # As in the papers' code.
    "cifar10": Source(functools.partial(_cifar, "CIFAR10"), "download", (32, 32, 3), 4, True, 0.08),
    # A sign's class needs most of the sign, and "left" mirrored is "right"; the papers' code has but crops.
    "gtsrb": Source(_gtsrb, "download", (32, 32, 3), 4, False, 0.5),
    # Natural images like CIFAR-10's.
    "cifar100": Source(functools.partial(_cifar, "CIFAR100"), "download", (32, 32, 3), 4, True, 0.08),
    # House numbers: digits, with their neighbors at the sides.
    "svhn": Source(_svhn, "download", (32, 32, 3), 4, False, 0.5),
    # Natural images.
    "tiny_imagenet": Source(_tiny_imagenet, "download", (64, 64, 3), 4, True, 0.08),
    "imagenette": Source(_imagenette, "download", (64, 64, 3), 4, True, 0.08),
    # Digits; a crop by 2 pixels cuts from the black border that was added, never from the digit.
    "mnist": Source(functools.partial(_mnist, "MNIST"), "download", (32, 32, 1), 2, False, 0.5),
    # Clothes may be worn either way round, but only the outline tells a shirt from a dress.
    "fashion_mnist": Source(functools.partial(_mnist, "FashionMNIST"), "download", (32, 32, 1), 2, True, 0.5),
    # Taken for natural images.
    "folder": Source(folder, "path", None, 4, True, 0.08),
}
NAMES = tuple(name for name, source in SOURCES.items() if source.needs != "path")
EMBEDDED = tuple(name for name, source in SOURCES.items() if source.needs == "nothing")  # these need no file
