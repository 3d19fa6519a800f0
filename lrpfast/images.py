"""From image files to a model's input, and back to the picture that the model saw.

A network's preprocessing is part of the network: with another resize or another normalisation the classes and the
maps are wrong without any sign of it. So it is one plain record here, which can be read from torchvision's and timm's
descriptions, is stored as JSON in a saved program, and is carried out with Pillow alone, bit for bit as torchvision
and timm do it on Pillow images. A program can then be used on a machine that has neither.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from lrpfast.errors import InputError

if TYPE_CHECKING:
    import torch

SUFFIXES = frozenset(
    (
        ".jpg",
        ".jpeg",
        ".jfif",
        ".png",
        ".webp",
        ".bmp",
        ".gif",
        ".tif",
        ".tiff",
        ".ppm",
        ".pgm",
        ".pbm",
        ".avif",
        ".tga",
    )
)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_INTERPOLATIONS = {
    name.lower(): Image.Resampling[name] for name in ("NEAREST", "BILINEAR", "BICUBIC", "LANCZOS", "BOX", "HAMMING")
}
_MODES = ("center", "squash", "border")


def find(paths: Sequence[str | os.PathLike[str]], exclude: str | os.PathLike[str] | None = None) -> list[Path]:
    """List the images among `paths`: files as they are, folders searched recursively.

    Parameters
    ----------
    paths
        Files and folders. A file is taken whatever its name, also one that does not exist: reading it tells. In
        folders, files with a suffix of `SUFFIXES` are taken in the order of their names; hidden files and folders are
        passed over.
    exclude
        A folder that is not searched: the one that results go to, which may lie inside.

    Returns
    -------
    list of Path
        Each once, in the order given.
    """
    found: dict[str, Path] = {}
    for path in map(Path, paths):
        for file in _walk(path, exclude) if path.is_dir() else (path,):
            found.setdefault(os.path.abspath(file), file)
    return list(found.values())


def _walk(folder: Path, exclude: str | os.PathLike[str] | None) -> Iterator[Path]:
    shut = None if exclude is None else os.path.realpath(exclude)
    for root, folders, files in os.walk(folder):
        # In place: os.walk descends into what is left, in this order.
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and os.path.realpath(os.path.join(root, name)) != shut
        )
        for name in sorted(files):
            if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES:
                yield Path(root, name)


def read(path: str | os.PathLike[str], channels: int = 3, content: IO[bytes] | None = None) -> Image.Image:
    """Read an image upright (its EXIF orientation applied), 8 bits a channel.

    Parameters
    ----------
    path
        The file. Of an animation the first picture is taken; transparency is dropped, as torchvision's loader does.
    channels
        3: RGB, 1: grey.
    content
        The file's content, where `path` is only its name: a member of an archive.

    Raises
    ------
    InputError
        The file is absent, is no image or a damaged one, or holds pixels that are no brightness from 0 to a known
        maximum.
    """
    try:
        with Image.open(path if content is None else content) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I;16"):
                image = Image.fromarray((np.asarray(image).astype(np.float32) / 257.0).round().astype(np.uint8))
            elif image.mode in ("I", "F"):
                raise InputError(f"{path} has pixels of 32 bits without a known maximum; convert it to 8 or 16 bits")
            elif image.mode in ("P", "PA"):
                image = image.convert("RGBA")
            return image.convert("RGB" if channels == 3 else "L")
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist") from error
    except UnidentifiedImageError as error:
        raise InputError(f"{path} is not an image that can be read") from error
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        # What Pillow's decoders raise for damaged files differs by format.
        raise InputError(f"{path} cannot be read as an image: {error}") from error


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """What turns an image into a model's input.

    Parameters
    ----------
    size
        (height, width) of the model's input.
    resize
        (height, width) that the image is resized towards before `size` is cut from its centre (or padded, where it is
        smaller).
    mode
        How it is resized. "center": the sides keep their ratio and cover `resize`; "squash": exactly to `resize`;
        "border": the sides keep their ratio and fit into `resize`, and the borders have the mean colour.
    interpolation
        A resampling filter of Pillow, in lower case.
    mean, std
        Of each channel, for values in [0, 1]: the input is `(value - mean) / std`. Their length is the number of
        channels, 3 or 1.

    Raises
    ------
    InputError
        A field that makes no sense.
    """

    size: tuple[int, int] = (224, 224)
    resize: tuple[int, int] = (256, 256)
    mode: str = "center"
    interpolation: str = "bilinear"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        if min(*self.size, *self.resize) < 1:
            raise InputError(f"image sizes must be positive, got size {self.size} and resize {self.resize}")
        if self.mode not in _MODES or self.interpolation not in _INTERPOLATIONS:
            raise InputError(
                f"unknown mode {self.mode!r} or interpolation {self.interpolation!r} of an image's preprocessing"
            )
        if len(self.mean) != len(self.std) or len(self.mean) not in (1, 3):
            raise InputError(
                f"mean {self.mean} and std {self.std}: both need 3 numbers (RGB) or both 1 (grey), one a channel"
            )
        if not all(value > 0 for value in self.std):
            raise InputError(f"std {self.std}: every value must be positive")

    @property
    def channels(self) -> int:
        """3 for RGB, 1 for grey."""
        return len(self.mean)

    @property
    def low(self) -> tuple[float, ...]:
        """The input value of a black pixel, a channel: the `low` of ZBox."""
        return tuple((0.0 - mean) / std for mean, std in zip(self.mean, self.std, strict=True))

    @property
    def high(self) -> tuple[float, ...]:
        """The input value of a white pixel, a channel: the `high` of ZBox."""
        return tuple((1.0 - mean) / std for mean, std in zip(self.mean, self.std, strict=True))

    def view(self, image: Image.Image) -> Image.Image:
        """Resize and crop: the picture that the model sees, of `size`, RGB or grey.

        Raises
        ------
        InputError
            The image is so long and thin that its short side cannot be enlarged to `resize` in sensible memory.
        """
        image = image.convert("RGB" if self.channels == 3 else "L")
        height, width = self._resized(image.height, image.width)
        if height * width > (Image.MAX_IMAGE_PIXELS or math.inf):
            raise InputError(
                f"an image of {image.height} x {image.width} pixels would have to be enlarged to {height} x {width}"
            )
        if (height, width) != (image.height, image.width):
            image = image.resize((width, height), _INTERPOLATIONS[self.interpolation])
        top, left = (_offset(side, target) for side, target in zip((height, width), self.size, strict=True))
        if top >= 0 and left >= 0 and top + self.size[0] <= height and left + self.size[1] <= width:
            return image.crop((left, top, left + self.size[1], top + self.size[0]))
        fill = tuple(round(255 * mean) for mean in self.mean) if self.mode == "border" else (0,) * self.channels
        canvas = Image.new(image.mode, (self.size[1], self.size[0]), fill if self.channels == 3 else fill[0])
        canvas.paste(image, (-left, -top))
        return canvas

    def tensor(self, view: Image.Image) -> torch.Tensor:
        """Normalise a picture that `view` returned: float32 [C, H, W]."""
        import torch

        values = np.array(view, dtype=np.uint8).reshape(*self.size, self.channels).transpose(2, 0, 1)
        out = torch.from_numpy(np.ascontiguousarray(values)).to(torch.float32).div_(255)
        mean, std = (torch.tensor(values, dtype=torch.float32).view(-1, 1, 1) for values in (self.mean, self.std))
        return out.sub_(mean).div_(std)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, as JSON can hold them."""
        return {
            key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Preprocessing:
        """Undo `to_dict`. Raises `InputError` where the fields are not those of a preprocessing."""
        try:
            values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
            return cls(**values)
        except TypeError as error:
            raise InputError(f"not a preprocessing: {fields}") from error

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after resizing, rounded as torchvision (square, centre) and timm (all else) round."""
        target_height, target_width = self.resize
        if self.mode == "squash":
            return self.resize
        if self.mode == "center" and target_height == target_width:
            short, long = sorted((height, width))
            long = int(target_height * long / short)
            return (target_height, long) if height <= width else (long, target_height)
        ratios = (height / target_height, width / target_width)
        ratio = max(ratios) if self.mode == "border" else min(ratios)
        return max(1, round(height / ratio)), max(1, round(width / ratio))


def _offset(side: int, target: int) -> int:
    """Where a centred window of `target` begins on a side; negative where the side is padded instead."""
    return -((target - side) // 2) if target > side else round((side - target) / 2.0)
