"""The options that several commands have, each declared once, and the records that they become.

A command's callback gets the two records, `model` (what is explained, and how images become its input) and `engine`
(how it is explained), and not twenty loose arguments.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """What the options about the model say; None: not given."""

    spec: str
    weights: str | None = None
    checkpoint: Path | None = None
    num_classes: int | None = None
    classes: Path | None = None
    size: tuple[int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    no_normalise: bool = False


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """What the options about the explaining say; None: not given."""

    composite: str | None = None
    precision: str | None = None
    backend: str | None = None
    device: str | None = None


def size(text: str) -> tuple[int, int]:
    """Parse pixels, as 224 or 224x320, to (height, width)."""
    match = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text)
    if match is None:
        raise click.BadParameter(f"{text!r} is no size; give pixels as 224 or 224x320 (height x width)")
    return int(match[1]), int(match[2] or match[1])


def numbers(text: str) -> tuple[float, ...]:
    """Parse three numbers (RGB) separated by commas, or one (grey)."""
    try:
        parsed = tuple(float(part) for part in text.split(","))
    except ValueError:
        parsed = ()
    if len(parsed) not in (1, 3):
        raise click.BadParameter(f"{text!r} is neither three numbers separated by commas nor one")
    return parsed


_FILE = click.Path(path_type=Path)
_MODEL = (
    click.option("--model", "spec", required=True, metavar="MODEL", help="The model, see below."),
    click.option("--weights", metavar="NAME", help="Pretrained weights of torchvision or timm: DEFAULT, or a name."),
    click.option(
        "--checkpoint", type=_FILE, metavar="FILE", help="Weights from a file: a state dict (.pt, .pth, .safetensors)."
    ),
    click.option(
        "--num-classes", type=click.IntRange(1), metavar="N", help="Build a torchvision or timm model for N classes."
    ),
    click.option(
        "--classes",
        type=_FILE,
        metavar="FILE",
        help="Names of the classes, one a line. [default: those of the weights]",
    ),
    click.option(
        "--size",
        type=size,
        metavar="H[xW]",
        help="Resize images to cover this size, and cut it from the centre. "
        "[default: as the weights ask; else 256, then 224]",
    ),
    click.option(
        "--mean",
        type=numbers,
        metavar="R,G,B",
        help="Mean of the channels, for values in 0..1; one number: grey. [default: as the weights; else ImageNet's]",
    ),
    click.option("--std", type=numbers, metavar="R,G,B", help="Standard deviation of the channels, likewise."),
    click.option("--no-normalise", is_flag=True, help="Give the model values in 0..1 as they are."),
)
_ENGINE = (
    click.option(
        "--composite",
        metavar="NAME",
        help="Which rule each layer gets; `lrpfast info` lists the names. [default: epsilon_plus_flat]",
    ),
    click.option(
        "--precision",
        type=click.Choice(["float32", "bfloat16", "float16"]),
        help="What to compute in. [default: the model's own precision]",
    ),
    click.option(
        "--backend",
        type=click.Choice(["auto", "native", "triton", "torch"]),
        help="native: compiled for CPUs; triton: for GPUs; torch: the reference; auto: the fastest here. [default: auto]",
    ),
    click.option("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... [default: cuda where it is there, else cpu]"),
)


def model_and_engine(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of both records, and call it with `model` and `engine`."""

    @functools.wraps(command)
    def call(**given: Any) -> None:
        model = ModelOptions(**_taken(given, ModelOptions))
        engine = EngineOptions(**_taken(given, EngineOptions))
        command(model=model, engine=engine, **given)

    for option in reversed(_MODEL + _ENGINE):
        call = option(call)
    return call


def _taken(given: dict[str, Any], record: type) -> dict[str, Any]:
    return {field.name: given.pop(field.name) for field in dataclasses.fields(record)}
