"""What a sample budget means in images, without torch, for plans of runs."""

import re

import numpy as np


def resolve(budget: int | str, size: int, classes: int, name: str) -> int:
    """Number of images that a budget means on the training split `name` of so many images and classes: 500, "5%" or "1/class".

    Raises ValueError if it is not of these forms, above the split, or below one image a class.
    """
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
            f"budget must be between {classes} (one image a class) and {size} (the training split of {name}), "
            f"got {budget!r} = {count} images"
        )
    return count


def even(sizes: np.ndarray, count: int) -> bool:
    """Whether classes of these sizes (C,) have images enough for `count` that are spread evenly, to within one a class."""
    share, rest = divmod(count, len(sizes))
    return bool(sizes.min() >= share and (sizes > share).sum() >= rest)
