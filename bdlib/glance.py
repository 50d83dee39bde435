"""Whether the values of a run plainly fit, seen without torch, whose import takes longer than the plan of ten thousand runs.

What is not seen to fit need not be wrong: `fits` looks closer, and says what is.
"""

import functools
import zipfile
import zlib
from pathlib import Path

import numpy as np

from bdlib import names, profiles
from bdlib.budget import even, resolve
from bdlib.places import dataset_file
from bdlib.sources import SOURCES


def fits(values: dict) -> bool:
    """True only if `fits.complaints` has nothing to say about these values."""
    try:
        return _named(values) and _sized(values)
    except (ValueError, TypeError, KeyError, OSError, EOFError, zipfile.BadZipFile, zlib.error):
        return False


def _named(values: dict) -> bool:
    """Names that exist, and numbers in their ranges."""
    attack = values["attack"]
    network, colon, width = values["arch"].partition(":")
    all_to_all = attack.endswith("_a2a")
    return (
        values["notebook"] in names.PAPERS
        and values["profile"] in profiles.NAMES
        and attack.removesuffix("_a2a") in names.ATTACKS
        and not (all_to_all and attack.removesuffix("_a2a") in names.CLEAN_LABEL)
        and network in names.NETWORKS
        and (not colon or (width.isdecimal() and int(width) >= 1))
        and type(values["seed"]) is int
        and values["seed"] >= 0
        and 0 < values["poison_rate"] <= 1
    )


def _sized(values: dict) -> bool:
    """A budget and an attack for which the training split has images enough, with one or two of a class to spare."""
    known = _class_sizes(values["profile"], values["dataset"])
    if known is None:  # not at hand: the notebook itself checks the rest
        return True
    sizes, total = known
    budget, target_label = values["budget"], values["target_label"]
    limits_training = values["notebook"] in profiles.BUDGET_IS_TRAINING_SET
    count = total if limits_training and str(budget) == "0" else resolve(budget, total, len(sizes), values["dataset"])
    if limits_training:
        sizes, total = _part(sizes, total, count), count
    elif not even(sizes, count):
        return False
    if not 0 <= target_label < len(sizes):
        return False
    pool = sizes[target_label] if values["attack"] in names.CLEAN_LABEL else total
    return 1 <= round(values["poison_rate"] * total) <= pool - 2


def _class_sizes(profile: str, dataset: str) -> tuple[np.ndarray, int] | None:
    """Training images (C,) of each class, at least, and of all; None for a dataset that would be downloaded.

    Raises KeyError for one that has no fixed place, or does not exist.
    """
    if dataset in names.EMBEDDED:
        sizes = np.array(names.EMBEDDED[dataset])
    elif SOURCES[dataset].needs != "download":
        raise KeyError(dataset)
    elif not (path := dataset_file(dataset)).exists():
        return None
    else:
        sizes = _counted(path, path.stat().st_mtime_ns)
    total = int(sizes.sum())
    count = min(total, profiles.train_limit(profile) or total)
    return _part(sizes, total, count), count


@functools.cache
def _counted(path: Path, changed: int) -> np.ndarray:
    """Training images (C,) of each class in a dataset file, which was changed at that time."""
    with np.load(path, allow_pickle=False) as arrays:
        return np.bincount(arrays["y_train"], minlength=len(arrays["classes"]))


def _part(sizes: np.ndarray, total: int, count: int) -> np.ndarray:
    """At least so many images of each class are in a part of `count` of all images that keeps the classes' shares."""
    return sizes * count // total if count < total else sizes
