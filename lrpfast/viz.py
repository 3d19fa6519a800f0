"""Heatmaps as people expect of LRP: zero is white, evidence for the target red, evidence against it blue.

Two choices keep a picture honest. The scale is symmetric around zero, one scale an image (its largest magnitude, or a
percentile of the magnitudes), so that equal strength has equal colour on either side. And a relevance is one square
of pixels: nothing is interpolated, because smoothing invents relevance between the pixels that the model saw.

The colour maps are defined here by their anchor colours and evaluated at each value, rather than looked up in a table
of 256 entries: such a table has no middle entry, so zero would be a faint pink or blue. What is not finite is painted
grey, which no colour map holds: it is visible, and is neither for nor against.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lrpfast.errors import InputError, OutputError
from lrpfast.files import replacing

if TYPE_CHECKING:
    from lrpfast.explanation import Explanation

# Colours at equal steps from -1 to 1; the middle one, at zero, is white.
COLORMAPS: dict[str, tuple[tuple[int, int, int], ...]] = {
    "bwr": ((0, 0, 255), (255, 255, 255), (255, 0, 0)),
    "seismic": ((0, 0, 77), (0, 0, 255), (255, 255, 255), (255, 0, 0), (128, 0, 0)),
    # ColorBrewer's RdBu, reversed, its near-white middle made white: strong maps stay legible in print.
    "rdbu": (
        (5, 48, 97), (33, 102, 172), (67, 147, 195), (146, 197, 222), (209, 229, 240), (255, 255, 255),
        (253, 219, 199), (244, 165, 130), (214, 96, 77), (178, 24, 43), (103, 0, 31),
    ),
}  # fmt: skip
NOT_FINITE = (128, 128, 128)


def normalise(heatmap: Any, percentile: float | None = None) -> np.ndarray:
    """Scale a heatmap to [-1, 1] with zero kept at zero.

    Parameters
    ----------
    heatmap
        [H, W] tensor or array, any real dtype.
    percentile
        None: the largest finite magnitude becomes 1. A number in (0, 100]: that percentile of the magnitudes becomes
        1 and what is stronger is clipped, so that a few outliers do not bleach the rest. Where the percentile is zero
        (nearly all of the map is) the largest magnitude is used.

    Returns
    -------
    numpy.ndarray
        [H, W] float64; NaN where the heatmap is not finite. An all-zero map stays all zero.

    Raises
    ------
    InputError
        Not a two-dimensional map of real numbers, or a percentile out of range.
    """
    values = _to_map(heatmap)
    if percentile is not None and not 0 < percentile <= 100:
        raise InputError(f"percentile is {percentile}; it must be above 0 and at most 100")
    finite = np.isfinite(values)
    magnitudes = np.abs(values[finite])
    scale = float(magnitudes.max(initial=0.0))
    if percentile is not None and scale > 0:
        scale = float(np.percentile(magnitudes, percentile)) or scale
    out = np.where(finite, values, np.nan)
    return out if scale == 0 else np.clip(out / scale, -1.0, 1.0)


def colourise(values: np.ndarray, colormap: str = "bwr") -> np.ndarray:
    """Colours of values in [-1, 1], [H, W] to uint8 [H, W, 3]; NaN is grey. Raises `InputError` for an unknown map."""
    if colormap not in COLORMAPS:
        raise InputError(f"no colour map {colormap!r}; there are {', '.join(COLORMAPS)}")
    anchors = np.asarray(COLORMAPS[colormap], dtype=np.float64)
    known = ~np.isnan(values)
    at = np.where(known, values, 0.0)
    positions = np.linspace(-1.0, 1.0, len(anchors))
    colours = np.stack([np.interp(at, positions, anchors[:, channel]) for channel in range(3)], axis=-1)
    colours[~known] = NOT_FINITE
    return np.rint(colours).astype(np.uint8)


def render(
    heatmap: Any, *, percentile: float | None = None, colormap: str = "bwr", size: tuple[int, int] | None = None
) -> Image.Image:
    """Paint a heatmap.

    Parameters
    ----------
    heatmap
        [H, W] tensor or array of relevance.
    percentile
        See `normalise`.
    colormap
        A name in `COLORMAPS`.
    size
        (height, width) of the picture in pixels. None: a pixel a relevance. Each relevance becomes a block of its one
        colour.

    Returns
    -------
    PIL.Image.Image
        RGB.

    Raises
    ------
    InputError
        See `normalise` and `colourise`.
    """
    picture = Image.fromarray(colourise(normalise(heatmap, percentile), colormap))
    if size is None or size == (picture.height, picture.width):
        return picture
    return picture.resize((size[1], size[0]), Image.Resampling.NEAREST)


def overlay(
    image: Image.Image, heatmap: Any, *, percentile: float | None = None, colormap: str = "bwr", strength: float = 0.9
) -> Image.Image:
    """Paint a heatmap over the image that it explains.

    The image is shown in grey and lightened, so that the only colours are those of relevance. A relevance covers the
    image with the full colour of its sign, as opaque as the relevance is strong.

    Parameters
    ----------
    image
        What the model saw, at any resolution; the result has its size.
    heatmap
        [H, W] tensor or array of relevance.
    percentile, colormap
        As for `render`.
    strength
        Opacity of the strongest relevance, in [0, 1].

    Returns
    -------
    PIL.Image.Image
        RGB, as large as `image`.
    """
    values = normalise(heatmap, percentile)
    size = (image.height, image.width)
    colours = np.asarray(_enlarge(colourise(np.sign(values), colormap), size), dtype=np.float64)
    opacity = strength * np.abs(np.nan_to_num(values, nan=1.0))
    opacity = np.asarray(_enlarge(opacity.astype(np.float32), size), dtype=np.float64)[..., None]
    grey = 110.0 + np.asarray(image.convert("L"), dtype=np.float64)[..., None] * (145.0 / 255.0)
    return Image.fromarray(np.rint(grey * (1 - opacity) + colours * opacity).astype(np.uint8))


def contact_sheet(
    rows: Sequence[Sequence[Image.Image | None]],
    *,
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    cell: int = 128,
    gap: int = 6,
    title: str = "",
) -> Image.Image:
    """Lay pictures out in a labelled grid on white.

    Parameters
    ----------
    rows
        Pictures of any size and mode, row by row; rows may differ in length, and None leaves a cell empty. A picture
        smaller than a cell is enlarged by whole pixels, a larger one is made smaller.
    row_labels, column_labels
        Texts at the left of the rows and above the columns; a newline breaks the line.
    cell
        Width and height of a cell in pixels.
    gap
        Pixels between cells.
    title
        A text above all.

    Returns
    -------
    PIL.Image.Image
        RGB.
    """
    columns = max((len(row) for row in rows), default=0)
    if columns == 0:
        raise InputError("a contact sheet of no pictures")
    font = ImageFont.load_default(size=max(12, cell // 8))
    left = max((_text_size(text, font)[0] for text in row_labels), default=0) + (2 * gap if row_labels else gap)
    title_height = _text_size(title, font)[1] + gap if title else 0
    label_height = max((_text_size(text, font)[1] for text in column_labels), default=0) + (gap if column_labels else 0)
    top = gap + title_height + label_height
    sheet = Image.new("RGB", (left + columns * (cell + gap), top + len(rows) * (cell + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.multiline_text((left, gap), title, fill="black", font=font)
    for column, text in enumerate(column_labels):
        middle = left + column * (cell + gap) + cell / 2
        draw.multiline_text((middle, top - gap), text, fill="black", font=font, anchor="md", align="center")
    for row, text in enumerate(row_labels):
        middle = top + row * (cell + gap) + cell / 2
        draw.multiline_text((left - gap, middle), text, fill="black", font=font, anchor="rm", align="right")
    for row, pictures in enumerate(rows):
        for column, picture in enumerate(pictures):
            if picture is not None:
                fitted = _fit(picture.convert("RGB"), cell)
                x = left + column * (cell + gap) + (cell - fitted.width) // 2
                y = top + row * (cell + gap) + (cell - fitted.height) // 2
                sheet.paste(fitted, (x, y))
                draw.rectangle((x - 1, y - 1, x + fitted.width, y + fitted.height), outline=(200, 200, 200))
    return sheet


def save(image: Image.Image, path: str | os.PathLike[str]) -> None:
    """Write a picture, whole or not at all; the suffix chooses the format.

    Raises
    ------
    OutputError
        The suffix names no picture format, or the file cannot be written.
    """
    check_suffix(path)
    with replacing(path) as temporary:
        image.save(temporary)


def check_suffix(path: str | os.PathLike[str]) -> None:
    """Raise `OutputError` where the suffix of a file names no picture format that can be written."""
    path = Path(path)
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise OutputError(f"{path} has no suffix of a picture format; use .png")


def save_array(array: np.ndarray, path: str | os.PathLike[str]) -> None:
    """Write an array as .npy, whole or not at all. Raises `OutputError` where it cannot be written."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, array, allow_pickle=False)


def save_explanation(explanation: Explanation, path: str | os.PathLike[str]) -> None:
    """Render an explanation to the one file `path`.

    One map is written as it is, a pixel a relevance. Several are one contact sheet, so that the file asked for is the
    file that appears: a row a sample, and a column a target where there are several; each map has its own scale.

    Raises
    ------
    InputError
        There are no maps of two dimensions in it (the inputs are no images), or no samples.
    OutputError
        The file cannot be written, or its suffix names no picture format.
    """
    maps = _to_array(explanation.heatmap())
    if maps.ndim not in (3, 4) or 0 in maps.shape:
        raise InputError(
            f"the heatmaps have shape {list(maps.shape)}; [N, H, W] or [N, K, H, W] can be rendered. "
            "Save explanation.relevance as an array instead"
        )
    grid = maps[:, None] if maps.ndim == 3 else maps
    if grid.shape[:2] == (1, 1):
        save(render(grid[0, 0]), path)
        return
    targets = _to_array(explanation.target).reshape(len(grid), -1)
    cell = max(64, *grid.shape[2:])
    if maps.ndim == 3:
        # One column of N maps would be a tower: N maps are laid out row by row in a square.
        columns = math.ceil(math.sqrt(len(grid)))
        pictures = [render(sample[0]) for sample in grid]
        rows = [pictures[start : start + columns] for start in range(0, len(pictures), columns)]
        save(contact_sheet(rows, cell=cell), path)
        return
    rows = [[render(heatmap) for heatmap in sample] for sample in grid]
    same = targets.shape[1] == grid.shape[1] and bool((targets == targets[:1]).all())
    labels = [f"target {index:g}" for index in targets[0]] if same else []
    save(contact_sheet(rows, cell=cell, column_labels=labels), path)


def _to_array(values: Any) -> np.ndarray:
    """A tensor (any device, bfloat16 too) or array-like as a float64 array, without importing torch."""
    if hasattr(values, "detach"):
        values = values.detach().cpu().double().numpy()
    array = np.asarray(values)
    if array.dtype.kind not in "fiub":
        raise InputError(f"a heatmap of dtype {array.dtype}; real numbers are expected")
    return array.astype(np.float64)


def _to_map(heatmap: Any) -> np.ndarray:
    array = _to_array(heatmap)
    if array.ndim != 2 or array.size == 0:
        raise InputError(f"a heatmap of shape {list(array.shape)}; [H, W] is expected. Sum over channels first")
    return array


def _enlarge(values: np.ndarray, size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(values).resize((size[1], size[0]), Image.Resampling.NEAREST)


def _fit(picture: Image.Image, cell: int) -> Image.Image:
    longest = max(picture.size)
    if longest <= cell:
        times = cell // longest
        return picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)
    width, height = (max(1, round(side * cell / longest)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.BOX)


def _text_size(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> tuple[int, int]:
    left, top, right, bottom = ImageDraw.Draw(Image.new("L", (1, 1))).multiline_textbbox((0, 0), text, font=font)
    return math.ceil(right - min(left, 0)), math.ceil(bottom - min(top, 0))
