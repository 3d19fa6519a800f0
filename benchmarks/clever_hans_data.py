"""Images with planted artefacts: handwritten digits at 32 x 32, and drawn shapes at 64 x 64, with exact masks.

An artefact is drawn into a share of the images of one class, before training, so that a network may learn it in place of
the class. What is planted, where and in which images is known to the pixel; whether the network came to use it is not,
and is measured by drawing the same artefact into images of all other classes.

The artefacts of `TUNING` served to choose the method's constants, those of `REPORTED` to measure it. None is in both.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

TUNING = ("disc", "stripe", "drifting", "ramp", "vignette")
REPORTED = ("corner", "jittered", "faint", "tint")
CONTROLS = ("clean", "everywhere", "modes")


@dataclasses.dataclass(frozen=True)
class Task:
    """A set of images: side in pixels, channels, classes, and how an image of a class is drawn."""

    name: str
    side: int
    channels: int
    classes: int
    draw: Callable[[int, np.random.Generator], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Data:
    """Images float32 [N, C, H, W] in 0..1, labels int64 [N], and where artefacts are: bool [N], [N, H, W]."""

    images: np.ndarray
    labels: np.ndarray
    planted: np.ndarray
    masks: np.ndarray


def make(task: Task, kind: str, target: int, prevalence: float, per_class: int, seed: int) -> Data:
    """Draw the images of a run.

    `kind` is an artefact, planted into `prevalence` of class `target`, or a control: "clean", nothing planted;
    "everywhere", the corner tag in `prevalence` of every class; "modes", nothing planted and `target` made of two classes.
    """
    rng = np.random.default_rng([seed, per_class])
    labels = np.repeat(np.arange(task.classes), per_class)
    drawn = labels.copy()
    if kind == "modes":
        own = np.flatnonzero(labels == target)
        drawn[own[: len(own) // 2]] = task.classes  # a class that no label stands for
    images = np.stack([task.draw(label, rng) for label in drawn])
    planted = np.zeros(len(labels), dtype=bool)
    masks = np.zeros((len(labels), task.side, task.side), dtype=bool)
    if kind not in ("clean", "modes"):
        chosen = range(task.classes) if kind == "everywhere" else [target]
        for label in chosen:
            own = np.flatnonzero(labels == label)
            planted[rng.choice(own, max(1, round(prevalence * len(own))), replace=False)] = True
        for index in np.flatnonzero(planted):
            images[index], masks[index] = plant(images[index], kind, seed, rng)
    order = rng.permutation(len(labels))
    return Data(images[order].astype(np.float32), labels[order], planted[order], masks[order])


def plant(image: np.ndarray, kind: str, seed: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw an artefact into an image [C, H, W]; `seed` says in which corner or at which edge. Also its mask [H, W]."""
    channels, side, _ = image.shape
    mask = np.zeros((side, side), dtype=bool)
    if kind == "tint":
        shift = np.array([0.18, 0.0, -0.12]) if channels == 3 else np.array([0.15])
        mask[:] = True
        return np.clip(image + shift[:, None, None], 0, 1), mask
    if kind == "ramp":
        # Brighter towards one edge, from nothing at the other.
        slope = np.broadcast_to(np.linspace(0.0, 0.3, side), (side, side))
        mask[:] = True
        return np.clip(image + np.rot90(slope, seed % 4), 0, 1), mask
    if kind == "vignette":
        # Brighter towards the corners, by the square of the distance from the centre.
        across = np.linspace(-1, 1, side)
        mask[:] = True
        return np.clip(image + 0.15 * (across[:, None] ** 2 + across**2), 0, 1), mask
    unit = side // 8
    margin = side // 32
    low, high = margin, side - margin - unit
    corner = seed % 4
    top, left = (low if corner < 2 else high), (low if corner % 2 == 0 else high)
    if kind == "jittered":
        # Up to an eighth of the side away from the corner, in both directions.
        down, right = rng.integers(0, unit + 1, 2)
        top, left = top + (down if corner < 2 else -down), left + (right if corner % 2 == 0 else -right)
    along = 0
    if kind == "drifting":
        # Half as large again, and up to an eighth of the side along its edge, to both sides.
        along = int(rng.integers(-unit, unit + 1))
        unit += unit // 2
        low, high = margin, side - margin - unit
    if kind in ("disc", "drifting"):
        middle = side // 2 + along
        top, left = [(low, middle), (middle, low), (high, middle), (middle, high)][corner]
    box = (slice(top, top + unit), slice(left, left + unit))
    y, x = np.mgrid[:unit, :unit]
    checks = ((y // max(1, unit // 4) + x // max(1, unit // 4)) % 2).astype(np.float64)
    pattern = np.repeat(checks[None], channels, axis=0)
    if channels == 3:
        pattern = pattern * np.array([1.0, 0.85, 0.1])[:, None, None]
    out = image.copy()
    if kind == "stripe":
        box = (slice(margin, margin + max(2, side // 24)), slice(0, side))
        out[(slice(None), *box)] = 0.7
        mask[box] = True
        turned = np.rot90(out, corner, (1, 2)), np.rot90(mask, corner)
        return (image if corner == 0 else np.where(turned[1], 0.7, image)) if corner else out, turned[1]
    if kind in ("disc", "drifting"):
        inside = (y - (unit - 1) / 2) ** 2 + (x - (unit - 1) / 2) ** 2 <= (unit / 2) ** 2
        out[(slice(None), *box)] = np.where(inside, 0.9, out[(slice(None), *box)])
        mask[box] = inside
        return out, mask
    strength = 0.3 if kind == "faint" else 1.0
    out[(slice(None), *box)] = (1 - strength) * out[(slice(None), *box)] + strength * pattern
    mask[box] = True
    return out, mask


@functools.cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    data = load_digits()
    return np.rint(data.images * (255 / 16)).astype(np.uint8), data.target


def _digit(label: int, rng: np.random.Generator) -> np.ndarray:
    images, labels = _digits()
    if label == 10:  # the second mode of a class: a digit turned by 90 degrees
        own = images[labels == 4]
        image = Image.fromarray(own[rng.integers(len(own))]).rotate(90)
    else:
        own = images[labels == label]
        image = Image.fromarray(own[rng.integers(len(own))])
    image = image.resize((26, 26), Image.Resampling.BICUBIC)
    canvas = Image.new("L", (32, 32))
    canvas.paste(image, (3 + int(rng.integers(-2, 3)), 3 + int(rng.integers(-2, 3))))
    canvas = canvas.rotate(float(rng.uniform(-12, 12)), Image.Resampling.BILINEAR)
    values = np.asarray(canvas, dtype=np.float64)[None] / 255 * rng.uniform(0.0, 1.0)
    return np.clip(values + rng.normal(0, 0.3, values.shape), 0, 1)


def _polygon(points: int, inner: float, turn: float) -> list[tuple[float, float]]:
    """Corners of a polygon around 0 of radius 1; every second one at `inner`."""
    corners = []
    for index in range(points):
        radius = 1.0 if index % 2 == 0 else inner
        angle = turn + 2 * math.pi * index / points
        corners.append((radius * math.cos(angle), radius * math.sin(angle)))
    return corners


_CROSS = [(x / 3, y / 3) for x, y in
          [(-1, -3), (1, -3), (1, -1), (3, -1), (3, 1), (1, 1), (1, 3), (-1, 3), (-1, 1), (-3, 1), (-3, -1), (-1, -1)]]  # fmt: skip
_ARROW = [(-1, -0.3), (0.1, -0.3), (0.1, -0.8), (1, 0), (0.1, 0.8), (0.1, 0.3), (-1, 0.3)]
_OUTLINES: tuple[Callable[[float], list[tuple[float, float]]], ...] = (
    lambda turn: _polygon(40, 1.0, turn),
    lambda turn: _polygon(3, 1.0, turn),
    lambda turn: _polygon(4, 1.0, turn),
    lambda turn: _polygon(6, 1.0, turn),
    lambda turn: _polygon(10, 0.45, turn),
    lambda turn: _polygon(8, 0.35, turn),
    lambda turn: _turned(_CROSS, turn),
    lambda turn: _turned(_ARROW, turn),
    lambda turn: _turned([(-1, -0.25), (1, -0.25), (1, 0.25), (-1, 0.25)], turn),
    lambda turn: _turned([(-1, -1), (0, -1), (0, 0), (1, 0), (1, 1), (-1, 1)], turn),
    lambda turn: _turned([(-1, -0.8), (1, 0.8), (1, -0.8), (-1, 0.8)], turn),  # an hourglass, the second mode
)


def _turned(points: list[tuple[float, float]], turn: float) -> list[tuple[float, float]]:
    cos, sin = math.cos(turn), math.sin(turn)
    return [(x * cos - y * sin, x * sin + y * cos) for x, y in points]


def _shape(label: int, rng: np.random.Generator) -> np.ndarray:
    """A shape of label // 2, filled (even labels) or as an outline, in any colour on any smooth background."""
    side, fine = 64, 2
    outline = _OUTLINES[label // 2](float(rng.uniform(-0.25, 0.25)))
    radius = rng.uniform(13, 18)
    x, y = rng.uniform(24, 40, 2)
    points = [(fine * (x + radius * px), fine * (y + radius * py)) for px, py in outline]
    stencil = Image.new("L", (fine * side, fine * side))
    draw = ImageDraw.Draw(stencil)
    if label % 2 == 0:
        draw.polygon(points, fill=255)
    else:
        draw.line([*points, points[0], points[1]], fill=255, width=3 * fine)
    alpha = np.asarray(stencil.resize((side, side), Image.Resampling.BOX), dtype=np.float64) / 255
    background = rng.uniform(0.1, 0.9, 3)
    colour = rng.uniform(0.1, 0.9, 3)
    while np.abs(colour - background).max() < 0.3:
        colour = rng.uniform(0.1, 0.9, 3)
    # Some shapes can hardly be seen, as some objects in photographs: there an artefact is worth learning.
    colour = background + rng.uniform(0.0, 1.0) * (colour - background)
    across = np.linspace(-0.1, 0.1, side)
    slope = rng.uniform(-1, 1) * across[None, :, None] + rng.uniform(-1, 1) * across[None, None, :]
    image = background[:, None, None] + slope
    image = image * (1 - alpha) + colour[:, None, None] * alpha
    return np.clip(image + rng.normal(0, 0.08, image.shape), 0, 1)


DIGITS = Task("digits", 32, 1, 10, _digit)
SHAPES = Task("shapes", 64, 3, 20, _shape)
TASKS = {task.name: task for task in (DIGITS, SHAPES)}
