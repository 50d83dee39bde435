"""The embedded dataset: 10 classes of road-sign-like drawings, 32 x 32 RGB, drawn by code from a seed.

A class is a shape (circle, square, diamond, triangle up, triangle down) with a glyph (bar, cross).  Colors, place, size,
tilt, background, blur and noise are random and say nothing about the class.  Every step is integer arithmetic on the frozen
stream of numpy's RandomState, so the same seed gives the same bytes on every machine.
"""

import numpy as np

SIZE = 32
SHAPES = ("circle", "square", "diamond", "triangle-up", "triangle-down")
GLYPHS = ("bar", "cross")
CLASSES = tuple(f"{shape} {glyph}" for glyph in GLYPHS for shape in SHAPES)

_FINE = 2 * SIZE  # drawn at twice the size, then averaged: smooth edges
_UNIT = 1024  # fixed-point length of a sign's radius
_CHUNK = 500  # images drawn at once: bounds the memory to about 100 MB


def draw(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 (count, 3, 32, 32) and labels uint8 (count,), classes balanced, in random order.

    Raises ValueError if count is below 1.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    random = np.random.RandomState(seed)
    labels = random.permutation(np.arange(count, dtype=np.int32) % len(CLASSES))
    images = [_draw_chunk(labels[start : start + _CHUNK], random) for start in range(0, count, _CHUNK)]
    return np.concatenate(images), labels.astype(np.uint8)


def _draw_chunk(labels: np.ndarray, random: np.random.RandomState) -> np.ndarray:
    count = len(labels)
    u, v = _sign_coordinates(count, random)
    shape, glyph = labels % len(SHAPES), labels // len(SHAPES)
    inside = _inside_shape(u, v, shape, _UNIT)
    face = _inside_shape(u, v, shape, _UNIT * 3 // 4)
    bar = (abs(v) < _UNIT // 7) & (abs(u) < _UNIT * 3 // 8)
    upright = (abs(u) < _UNIT // 7) & (abs(v) < _UNIT * 3 // 8) & (glyph == 1)[:, None, None]
    rim_color, face_color, glyph_color = _colors(count, random)
    canvas = _background(count, random).astype(np.int16)
    for mask, color in ((inside, rim_color), (face, face_color), (bar | upright, glyph_color)):
        np.copyto(canvas, color[:, :, None, None].astype(np.int16), where=mask[:, None])
    rows = canvas[:, :, ::2] + canvas[:, :, 1::2]
    small = ((rows[..., ::2] + rows[..., 1::2]) // 4).astype(np.int32)
    return _camera(small, random)


def _sign_coordinates(count: int, random: np.random.RandomState) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates (count, 64, 64) in the sign's own frame: moved, tilted by up to 15 degrees, scaled to radius 1024."""
    center = random.randint(_FINE // 2 - 8, _FINE // 2 + 9, size=(2, count, 1, 1), dtype=np.int32)
    radius = random.randint(19, 28, size=(count, 1, 1), dtype=np.int32)
    sine = random.randint(-265, 266, size=(count, 1, 1), dtype=np.int32)
    cosine = _UNIT - sine * sine // (2 * _UNIT)
    y, x = np.mgrid[:_FINE, :_FINE].astype(np.int32)
    dx, dy = x - center[0], y - center[1]
    return (cosine * dx - sine * dy) // radius, (sine * dx + cosine * dy) // radius


def _inside_shape(u: np.ndarray, v: np.ndarray, shape: np.ndarray, radius: int) -> np.ndarray:
    """Boolean (count, 64, 64): the pixels of each image's own shape, an index into SHAPES."""
    rules = (
        lambda u, v: u * u + v * v <= radius * radius,
        lambda u, v: np.maximum(abs(u), abs(v)) * 100 <= radius * 82,
        lambda u, v: (abs(u) + abs(v)) * 100 <= radius * 115,
        lambda u, v: (v * 100 <= radius * 62) & (abs(u) * 173 <= (v + radius) * 100),
        lambda u, v: (-v * 100 <= radius * 62) & (abs(u) * 173 <= (radius - v) * 100),
    )
    inside = np.empty(u.shape, dtype=bool)
    for k, rule in enumerate(rules):
        inside[shape == k] = rule(u[shape == k], v[shape == k])
    return inside


def _colors(count: int, random: np.random.RandomState) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Colors (count, 3) of rim, face and glyph; the glyph is dark on a light face or light on a dark one."""
    rim = random.randint(0, 256, size=(count, 3), dtype=np.int32)
    light = random.randint(150, 251, size=(count, 3), dtype=np.int32)
    dark = random.randint(5, 90, size=(count, 3), dtype=np.int32)
    swap = random.randint(0, 2, size=(count, 1), dtype=np.int32) == 1
    return rim, np.where(swap, dark, light), np.where(swap, light, dark)


def _background(count: int, random: np.random.RandomState) -> np.ndarray:
    """Smooth color fields (count, 3, 64, 64): 5 x 5 random colors, interpolated linearly."""
    knots = random.randint(0, 256, size=(count, 3, 5, 5), dtype=np.int32)
    step = _FINE // 4
    left, weight = np.arange(_FINE) // step, np.arange(_FINE) % step
    rows = knots[:, :, left] * (step - weight)[:, None] + knots[:, :, left + 1] * weight[:, None]
    field = rows[..., left] * (step - weight) + rows[..., left + 1] * weight
    return field // (step * step)


def _camera(images: np.ndarray, random: np.random.RandomState) -> np.ndarray:
    """Half the images blurred (3 x 3 mean), then exposure, sensor noise of +-18 levels, 8 bits."""
    count = len(images)
    padded = np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1)), mode="edge")
    total = sum(padded[..., dy : dy + SIZE, dx : dx + SIZE] for dy in range(3) for dx in range(3))
    blurred = random.randint(0, 2, size=(count, 1, 1, 1), dtype=np.int32) == 1
    images = np.where(blurred, total // 9, images)
    exposure = random.randint(70, 131, size=(count, 1, 1, 1), dtype=np.int32)
    noise = random.randint(-18, 19, size=images.shape, dtype=np.int32)
    return np.clip(images * exposure // 100 + noise, 0, 255).astype(np.uint8)
