"""Picture files as uint8 RGB arrays of one size, and trees of class folders."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

Samples = list[tuple[str, int]]  # path and label of each picture


def class_tree(root: Path) -> tuple[Samples, tuple[str, ...]]:
    """Path and label of every picture of root/CLASS/..., and the class names in alphabetical order.

    Raises ValueError if there are fewer than two classes or one without a picture.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS, ImageFolder

    try:
        tree = ImageFolder(str(root), allow_empty=True)
    except FileNotFoundError as error:
        raise ValueError(f"{root} is no tree of CLASS/image: {error}") from error
    filled = set(tree.targets)
    empty = [name for label, name in enumerate(tree.classes) if label not in filled]
    if empty:
        raise ValueError(
            f"{root} has no picture of {len(empty)} of its classes, {', '.join(empty)}; "
            f"names of pictures end in {', '.join(IMG_EXTENSIONS)}"
        )
    if len(tree.classes) < 2:
        raise ValueError(f"{root} must have a folder for each of at least 2 classes, got only {tree.classes[0]!r}")
    return tree.samples, tuple(tree.classes)


def read(path: str | Path):
    """The picture (PIL, mode RGB) of a file in any mode.

    16-bit gray keeps its high byte; what is transparent is laid on white, as a page shows it (torchvision drops the alpha channel,
    which uncovers whatever colors a transparent pixel happens to hold).
    Raises ValueError that names the file if it is no picture, is cut off, or holds real numbers.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
            return _rgb(image)
    # What Pillow raises for broken files differs by format.
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as a picture ({error}): repair or remove it") from error


def _rgb(image):
    from PIL import Image

    if image.mode.startswith("I"):
        gray = np.asarray(image)
        if gray.min() < 0 or gray.max() > 65535:
            raise ValueError(f"gray values must be 8 or 16 bits, got {gray.min()} to {gray.max()}")
        # Pillow's own conversion would make everything above 255 white.
        image = Image.fromarray((gray // 256).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("pixels must be 8 or 16 bits, got real numbers")
    elif image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        picture = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), picture)
    return image.convert("RGB")


def read_all(samples: Samples, pixels: int) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 (N, pixels, pixels, 3) and labels int64 (N,) of these files; raises ValueError like `read`."""
    return resized(((read(path), label) for path, label in samples), len(samples), pixels)


def resized(pairs: Iterable[tuple], count: int, pixels: int) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 (count, pixels, pixels, 3) and labels int64 (count,) of (RGB picture, label) pairs, stretched to squares."""
    from tqdm import tqdm

    images, labels = np.empty((count, pixels, pixels, 3), np.uint8), np.empty(count, np.int64)
    for k, (image, label) in enumerate(
        tqdm(pairs, desc="reading images", total=count, leave=False, mininterval=1, disable=None)
    ):
        images[k], labels[k] = np.asarray(image.resize((pixels, pixels))), label
    return images, labels
